"""Two really different experts in one model: `make heterogeneous`, after `make demo-experts`; some 15 idle minutes.

Trains a small GPT-NeoX on letters, joins it with the demo's maths expert, trains the projectors for some minutes, and
measures all on both tasks; beside them the experts as they are behind a router that reads the prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from scripts.demo import cache
from scripts.demo.progress import clock, reporting
from scripts.demo.tasks import read_rows
from scripts.heterogeneous import task
from scripts.heterogeneous.compare import RESULTS, measure_all
from scripts.heterogeneous.table import write_table

if TYPE_CHECKING:
    from scripts.heterogeneous.compare import Models

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
DEMO = CHECKOUT / "demo"
RECIPE = CHECKOUT / "recipes/smollm2/heterogeneous.yaml"
SEED = 0
WHAT, STEPS, BATCH, PEAK = "projectors", 150, 24, 5e-4
SHARES = {"letters": 5.0, "maths": 1.0}


def main() -> None:
    """Build what is missing, measure, and write the table."""
    console = Console(highlight=False, soft_wrap=True)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ["TQDM_DISABLE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not (DEMO / "experts/maths/config.json").exists():
        raise SystemExit("The demo's experts are missing: `make demo-experts` first.")
    _make_data(console)
    _make_letters(console)
    models = _make_joined(console)
    results = measure_all(models, DEMO / "data", console)
    (HERE / RESULTS).write_text(json.dumps([asdict(each) for each in results], indent=1) + "\n", encoding="utf-8")
    console.print(write_table(results, HERE / "README.md"))


def _make_data(console: Console) -> None:
    key = cache.fingerprint({"seed": SEED}, [HERE / "task.py"], ())

    def make(draft: Path) -> None:
        for split, rows in task.rows(SEED).items():
            lines = (json.dumps({"prompt": row.prompt, "answer": row.answer}) + "\n" for row in rows)
            (draft / f"letters.{split}.jsonl").write_text("".join(lines), encoding="utf-8")

    folder = cache.build(cache.cache_root() / f"letters-data-{key}", make)
    for file in sorted(folder.glob("*.jsonl")):
        cache.link(DEMO / "data" / file.name, file)
    console.print(f"Data: {', '.join(f'{n} {split}' for split, n in task.SIZES.items())} rows of letters to sort")


def _make_letters(console: Console) -> None:
    from scripts.heterogeneous import expert

    rows = read_rows(DEMO / "data/letters.train.jsonl")
    facts = {"rows": hashlib.sha256((DEMO / "data/letters.train.jsonl").read_bytes()).hexdigest(), "seed": SEED}
    key = cache.fingerprint(facts, [HERE / "expert.py"], ("torch", "transformers"))
    folder = cache.cache_root() / f"letters-{key}"
    if not folder.exists():
        console.print(f"Letters: a GPT-NeoX of 1.9 M parameters, {expert.STEPS} steps, about 4 minutes on one core")

        def make(draft: Path) -> None:
            started = time.monotonic()
            with reporting(console) as report:
                expert.train_letters(rows, draft, SEED, report)
            (draft / "seconds.json").write_text(json.dumps(time.monotonic() - started))

        cache.build(folder, make)
    cache.link(DEMO / "experts/letters", folder)


def _make_joined(console: Console) -> Models:
    """Merge the recipe and train the result a little; both are kept, in demo/."""
    from mediator_cli.moe.train.run import train
    from mediator_cli.moe.train.settings import TrainSettings
    from mediator_cli.pipeline.heterogeneous.make import plan_heterogeneous
    from mediator_cli.pipeline.heterogeneous.write import merge_heterogeneous
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.recipe.heterogeneous import load_heterogeneous
    from scripts.heterogeneous.compare import Models

    joined, trained = DEMO / "heterogeneous", DEMO / "heterogeneous-trained"
    started = time.monotonic()
    plan = plan_heterogeneous(load_heterogeneous(RECIPE))
    _, notices = merge_heterogeneous(plan, joined, Settings(overwrite=True))
    merged_in = time.monotonic() - started
    console.print(f"Merged {RECIPE.relative_to(CHECKOUT)} in {clock(merged_in)}; {'; '.join(notices)}")
    shutil.rmtree(trained, ignore_errors=True)
    settings = TrainSettings(what=WHAT, steps=STEPS, batch=BATCH, learning_rate=PEAK, shares=SHARES, held_out=0)
    console.print(f"Training {WHAT} for {STEPS} steps of {BATCH} rows, about 5 minutes on one core")
    started = time.monotonic()
    rows = {name: read_rows(DEMO / f"data/{name}.train.jsonl") for name in ("maths", "letters")}
    report = train(joined, rows, trained, settings)
    console.print(f"  loss {report.losses[0]:.2f} → {report.losses[-1]:.2f} in {clock(time.monotonic() - started)}")
    return Models(DEMO, merged_in, time.monotonic() - started, report.n_trained)


if __name__ == "__main__":
    main()
