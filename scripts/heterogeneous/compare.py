"""What is compared: each expert, the joined model before and after training, and the experts behind a router."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.demo.measure import answer
from scripts.demo.tasks import read_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scripts.demo.tasks import Row

TASKS = ("maths", "letters")
TESTED = 200
RESULTS = "results.json"


@dataclass(frozen=True)
class Models:
    """Where the models lie, and what the joined one took: seconds to merge and to train, parameters trained."""

    demo: Path
    merged_in: float
    trained_in: float
    n_trained: int


@dataclass(frozen=True)
class Result:
    """Exact answers by task in per cent, parameters, and seconds: to make it from the experts, and to answer."""

    name: str
    accuracy: dict[str, float]
    parameters: int
    made_in: float
    answered_in: float
    routed: dict[str, float] | None = None

    @property
    def mean(self) -> float:
        """Mean over tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)


def measure_all(models: Models, data: Path, console: Console) -> list[Result]:
    """Measure everything on the same test rows."""
    rows = {name: read_rows(data / f"{name}.test.jsonl")[:TESTED] for name in TASKS}
    experts = {name: _load(models.demo / f"experts/{name}") for name in TASKS}
    found = [_measure(f"expert {name}", *expert, rows, 0.0) for name, expert in experts.items()]
    _tell(console, found)
    found.append(_behind_router(experts, rows, data, models))
    _tell(console, found[-1:])
    for name, folder, seconds in (
        ("joined, not trained", "heterogeneous", models.merged_in),
        ("joined and trained", "heterogeneous-trained", models.merged_in + models.trained_in),
    ):
        found.append(_measure(name, *_load(models.demo / folder), rows, seconds))
        _tell(console, found[-1:])
    return found


def _tell(console: Console, results: Sequence[Result]) -> None:
    for each in results:
        told = ", ".join(f"{task} {share:.1f}" for task, share in each.accuracy.items())
        console.print(f"  {each.name}: {told}; mean {each.mean:.1f} in {each.answered_in:.0f} s")


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mediator_cli.moe.heterogeneous  # noqa: F401 - teaches the Auto classes

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def _measure(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list[Row]],
    seconds: float,
) -> Result:
    started = time.monotonic()
    found = {
        task: _right(answer(model, tokenizer, [row.prompt for row in asked]), asked) for task, asked in rows.items()
    }
    return Result(name, found, _size(model), round(seconds, 1), round(time.monotonic() - started, 1))


def _behind_router(
    experts: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    rows: dict[str, list[Row]],
    data: Path,
    models: Models,
) -> Result:
    """Let a router that reads the text send each prompt to one expert, which answers with its own tokenizer."""
    import numpy as np

    from mediator_cli.runtime.classify import fit_classifier, logits
    from mediator_cli.runtime.features import text_counts

    started = time.monotonic()
    texts = {name: [row.prompt for row in read_rows(data / f"{name}.train.jsonl")[:1000]] for name in TASKS}
    features = np.stack([text_counts(text) for group in texts.values() for text in group])
    labels = np.repeat(np.arange(len(TASKS)), [len(group) for group in texts.values()])
    router = fit_classifier("logistic", features, labels, len(TASKS))
    made_in, started = time.monotonic() - started, time.monotonic()
    accuracy, routed = {}, {}
    for task, asked in rows.items():
        chosen = logits(router, np.stack([text_counts(row.prompt) for row in asked])).argmax(axis=1)
        right = 0.0
        for number, name in enumerate(TASKS):
            some = [row for row, expert in zip(asked, chosen, strict=True) if expert == number]
            right += _right(answer(*experts[name], [row.prompt for row in some]), some) * len(some) if some else 0.0
        accuracy[task] = right / len(asked)
        routed[task] = float((chosen == TASKS.index(task)).mean() * 100)
    size = sum(_size(model) for model, _ in experts.values())
    seconds = round(time.monotonic() - started, 1)
    return Result("experts behind a prompt router", accuracy, size, round(made_in, 1), seconds, routed)


def _right(answers: Sequence[str], rows: Sequence[Row]) -> float:
    """Give the share of exact answers in per cent."""
    pairs = zip(answers, rows, strict=True)
    return 100 * sum(_plain(found) == _plain(row.answer) for found, row in pairs) / len(rows)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _size(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def read_results(folder: Path) -> list[Result]:
    """Read what was measured last."""
    return [Result(**each) for each in json.loads((folder / RESULTS).read_text(encoding="utf-8"))]
