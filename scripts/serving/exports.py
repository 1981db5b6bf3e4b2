"""What is lost on the way out: python -m scripts.serving.exports [--rows 40].

Writes the demo's bundle in every format that transformers or PEFT loads, and asks each the test rows of its task: the
bundle's own experts as dense checkpoints, LoRA adapters of rank 32 and of 90 % of the energy, SHiRA adapters, and one
Mixture of Experts. Answers are greedy and must be exact. Wants `make demo`; some ten minutes of one core.
"""

import argparse
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mediator_cli.cli.opening import quiet_transformers
from scripts.demo.measure import accuracy
from scripts.demo.tasks import Row
from scripts.serving.__main__ import DEMO, MEDIATOR, RESULTS, TASKS, WORK

BUNDLE = DEMO / "bundle"


@dataclass(frozen=True)
class Format:
    """An export: what it is called, the options that make it, and the model or adapter of a task in its folder."""

    name: str
    options: tuple[str, ...]
    place: Callable[[Path, str], tuple[Path, Path | None]]


def _adapter(folder: Path, task: str) -> tuple[Path, Path | None]:
    return WORK / "static", folder / task


# The first is the model that the adapters after it are put on.
FORMATS = (
    Format("static", ("--to", "dense", "--static"), lambda folder, task: (folder, None)),
    Format("lora-32", ("--to", "lora", "--rank", "32"), _adapter),
    Format("lora-energy", ("--to", "lora", "--energy", "0.9"), _adapter),
    Format("shira", ("--to", "shira"), _adapter),
    Format("moe", ("--to", "moe"), lambda folder, task: (folder, None)),
)


def main() -> None:
    """Export, ask, and put the shares of right answers beside the servers' numbers."""
    parser = argparse.ArgumentParser(prog="python -m scripts.serving.exports", description=__doc__)
    parser.add_argument("--rows", type=int, default=40)
    n_rows = parser.parse_args().rows
    say = Console(highlight=False, soft_wrap=True).print
    quiet_transformers()
    rows = {task: read_rows(task, n_rows) for task in TASKS}
    found = {"expert": {task: 100 * accuracy(whole(task), None, rows[task]) for task in TASKS}}
    say(f"expert: {found['expert']}", markup=False)
    for each in FORMATS:
        found[each.name] = share(each, rows)
        say(f"{each.name}: {found[each.name]}", markup=False)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results["exports"] = {"rows": n_rows, "right": found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def share(each: Format, rows: Mapping[str, list[Row]]) -> dict[str, float]:
    """Write one format and give the right answers of each task, in per cent."""
    folder = WORK / each.name
    export(folder, each.options)
    return {task: round(100 * accuracy(*each.place(folder, task), rows[task]), 1) for task in TASKS}


def export(folder: Path, options: tuple[str, ...]) -> None:
    """Export the bundle unless that was done."""
    if not folder.exists():
        subprocess.run([MEDIATOR, "export", BUNDLE, *options, "-o", folder, "--quiet"], check=True)


def whole(task: str) -> Path:
    """Write an expert of the bundle as a checkpoint."""
    folder = WORK / f"expert-{task}"
    export(folder, ("--to", "dense", "--expert", task))
    return folder


def read_rows(task: str, n_rows: int) -> list[Row]:
    """Read the first test rows of a task."""
    lines = (DEMO / f"data/{task}.test.jsonl").read_text(encoding="utf-8").splitlines()[:n_rows]
    return [Row(json.loads(line)["prompt"], json.loads(line)["answer"]) for line in lines]


if __name__ == "__main__":
    main()
