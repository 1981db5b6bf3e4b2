"""Make twelve adapters of the demo's base on twelve small tasks: python -m scripts.tradeoffs.adapters.

Two come from the demo, ten are trained here, a few minutes each on one core. They land in the user's cache and are
linked into demo/tradeoffs/adapters, the rows of the tasks (four more of them held out) into demo/tradeoffs/data.
"""

import argparse
import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from scripts.demo import cache, experts, measure
from scripts.demo.progress import clock, reporting
from scripts.demo.tasks import read_rows
from scripts.tradeoffs import tasks
from scripts.tradeoffs.lora import Adapter, train_adapter

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo"
PLACE = experts.CHECKOUT / "demo/tradeoffs"
SEED = 0
TESTED = 50
RECORD = "record.json"
ATTENTION = ("q_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

FROM_DEMO = ("sarcasm", "sentiment")
TRAINED = {
    "dates": Adapter(4, 8),
    "times": Adapter(4, 8, learning_rate=2e-3, steps=80),
    "numbers": Adapter(16, 8, rslora=True),
    "records": Adapter(16, 32, ATTENTION, learning_rate=2e-3),
    "identifiers": Adapter(8, 16, MLP),
    "initials": Adapter(4, 16),
    "compare": Adapter(8, 8, learning_rate=2e-3),
    "sort": Adapter(16, 32),
    "maths": Adapter(16, 32, learning_rate=2e-3, steps=150),
    "language": Adapter(8, 16, steps=100),
}


@dataclass(frozen=True)
class Record:
    """What is kept beside an adapter's weights."""

    task: str
    tested: int
    accuracy_base: float
    accuracy_expert: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, link it into the checkout and print what there is."""
    parser = argparse.ArgumentParser(prog="python -m scripts.tradeoffs.adapters", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tasks.SEEN, default=list(tasks.SEEN), help="make only these")
    chosen = parser.parse_args(arguments).only
    console = Console(highlight=False, soft_wrap=True)
    os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    console.print(f"Adapters go to {cache.cache_root()}; what is finished there is not built again.")
    try:
        demo_data, base = experts.make_data(console), experts.make_base(console)
        data = make_data(demo_data, console)
        first = [task for task in TRAINED if task in chosen] + [task for task in FROM_DEMO if task in chosen]
        made = {task: make_adapter(task, demo_data, data, base, console) for task in first}
    except KeyboardInterrupt:
        raise SystemExit("Stopped. What was finished is kept; run again to go on.") from None
    console.print(summary({task: made[task] for task in tasks.SEEN if task in made}))


def make_data(demo_data: Path, console: Console) -> Path:
    """Write the rows of all tasks, unless they exist, and link them."""
    sources = [HERE / "tasks.py", HERE / "generators.py"]
    key = cache.fingerprint({"seed": SEED, "demo": demo_data.name}, sources, ("evals",))
    folder = cache.cache_root() / f"tradeoffs-data-{key}"
    if not folder.exists():
        console.print(f"Data: rows of {len(tasks.SEEN)} tasks and of {len(tasks.UNSEEN)} held-out ones, a few seconds")
        cache.build(folder, lambda draft: tasks.write_tasks(draft, demo_data, SEED))
    for file in sorted(folder.glob("*.jsonl")):
        cache.link(PLACE / "data" / file.name, file)
    return folder


def make_adapter(task: str, demo_data: Path, data: Path, base: Path, console: Console) -> Path:
    """Train and measure one adapter, unless it exists or the demo has it, and link it."""
    if task in FROM_DEMO:
        folder = experts.make_expert(task, demo_data, base, console)
    else:
        folder = cache.cache_root() / f"tradeoffs-{task}-{_key(task, data, base)}"
        cache.build(folder, lambda draft: _train_and_measure(task, data, base, draft, console))
    cache.link(PLACE / "adapters" / task, folder)
    return folder


def summary(made: dict[str, Path]) -> Table:
    """Return a table of the adapters' shapes, sizes, accuracies and times."""
    table = Table(Column("adapter", no_wrap=True), "targets", title="Adapters in demo/tradeoffs/adapters")
    for heading in ("rank", "scale", "MB", "rows", "base", "expert", "time"):
        table.add_column(heading, justify="right")
    for task, folder in made.items():
        record, config = _record(task, folder), json.loads((folder / "adapter_config.json").read_text("utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        targets = (
            "all"
            if len(config["target_modules"]) == 7
            else " ".join(sorted(name.removesuffix("_proj") for name in config["target_modules"]))
        )
        size = (folder / "adapter_model.safetensors").stat().st_size / 1e6
        accuracies = (f"{record.accuracy_base:.0%}", f"{record.accuracy_expert:.0%}")
        cells = (str(rank), f"{scale:.3g}", f"{size:.1f}", str(record.tested), *accuracies, clock(record.seconds))
        table.add_row(task, targets, *cells)
    table.caption = "base, expert: exact answers to so many test rows of the adapter's own task."
    return table


def _key(task: str, data: Path, base: Path) -> str:
    rows = {split: hashlib.sha256(_rows(data, task, split).read_bytes()).hexdigest() for split in ("train", "test")}
    facts = {"settings": asdict(TRAINED[task]), "tested": TESTED, "base": base.name, "rows": rows}
    sources = [HERE / "lora.py", DEMO / "train.py", DEMO / "packing.py", DEMO / "measure.py"]
    return cache.fingerprint(facts, sources, ("torch", "transformers", "peft"))


def _train_and_measure(task: str, data: Path, base: Path, draft: Path, console: Console) -> None:
    rows = read_rows(_rows(data, task, "train"))
    console.print(f"{task}: {TRAINED[task].steps} steps on {len(rows):,} rows, about 3 minutes on one core")
    started = time.monotonic()
    with reporting(console) as report:
        train_adapter(base, rows, TRAINED[task], draft, report)
    seconds = time.monotonic() - started
    tested = read_rows(_rows(data, task, "test"))[:TESTED]
    before, after = measure.accuracy(base, None, tested), measure.accuracy(base, draft, tested)
    console.print(f"  {task}: {before:.0%} → {after:.0%} in {clock(seconds)}")
    record = Record(task, len(tested), before, after, round(seconds, 1))
    (draft / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def _record(task: str, folder: Path) -> Record:
    if task not in FROM_DEMO:
        return Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    known = experts.Record(**json.loads((folder / experts.RECORD).read_text(encoding="utf-8")))
    return Record(task, known.tested, known.accuracy_base, known.accuracy_expert, known.seconds)


def _rows(data: Path, task: str, split: str) -> Path:
    return data / f"{task}.{split}.jsonl"


if __name__ == "__main__":
    main()
