"""What the demo's bundle can do: python -m scripts.demo.show. One question of each task, then a small table."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mediator_cli.cli.mixtures import mixture_text
from mediator_cli.cli.opening import quiet_transformers
from mediator_cli.evaluate.models import find_candidates
from mediator_cli.evaluate.report import ModelResult, Report, cells, mean_over_tasks
from mediator_cli.evaluate.run import EvaluateSettings, evaluate
from mediator_cli.evaluate.tasks import Task, load_tasks
from mediator_cli.runtime.generate import Sampling, answer, chat_ids
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import load_tokenizer
from scripts.demo.experts import CHECKOUT, EXPERTS

DEMO = CHECKOUT / "demo"
ROWS = 50


def main() -> None:
    """Ask, then measure."""
    quiet_transformers()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    tasks = load_tasks([DEMO / f"data/{task}.test.jsonl" for task in EXPERTS])
    console.print(questions(open_bundle(DEMO / "bundle"), tasks))
    console.print(accuracies(tasks))


def questions(model: RoutedModel, tasks: tuple[Task, ...]) -> Table:
    """Ask the first test question of each task, all in one batch; return what was answered and by whom."""
    tokenizer = load_tokenizer(DEMO / "bundle")
    rows = [task.rows[0] for task in tasks]
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": row.prompt}]) for row in rows]
    routing = model.route(prompts)
    said = answer(model, tokenizer, prompts, routing.weights, Sampling(max_new_tokens=12))
    table = Table("question", "answer", "expected", "mixture", title="One question of each task")
    for row, text, weights in zip(rows, said, routing.weights.tolist(), strict=True):
        table.add_row(row.prompt.replace("\n\n", "\n"), text, row.answer, mixture_text(weights, routing.experts))
    return table


def accuracies(tasks: tuple[Task, ...]) -> Table:
    """Measure base, static merge, bundle and each expert on its own task."""
    settings = EvaluateSettings(limit=ROWS)
    names = [str(DEMO / name) for name in ("base", "static", "bundle")]
    found = evaluate(find_candidates(names, [task.name for task in tasks]), tasks, settings)
    whole = Report((*found.models, oracle(tasks, settings, found.models[0].n_bytes)), ())
    head, rows = cells(whole)
    table = Table(title=f"Exact answers in per cent, {ROWS} test rows of each task, ± standard error")
    for column in head:
        table.add_column(column.rstrip("#"), justify="right" if column.endswith("#") else "left")
    for row in rows:
        table.add_row(Path(row[0]).name, *row[1:])
    table.caption = (
        "oracle: each expert, complete, on its own task. In brackets: the right choice is the most probable."
    )
    return table


def oracle(tasks: tuple[Task, ...], settings: EvaluateSettings, n_bytes: int) -> ModelResult:
    """Measure each expert on its own task, as one line."""
    single = [
        evaluate(find_candidates([str(DEMO / "experts" / task.name)], [], DEMO / "base"), [task], settings).models[0]
        for task in tasks
    ]
    results = tuple(model.tasks[0] for model in single)
    seconds = sum(model.seconds_per_answer for model in single) / len(single)
    return ModelResult("oracle", results, *mean_over_tasks(results), n_bytes * len(tasks), None, seconds)


if __name__ == "__main__":
    main()
