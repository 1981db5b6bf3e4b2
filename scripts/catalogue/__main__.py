"""Every merge method on real experts: python -m scripts.catalogue [METHOD ...], after make demo; about an hour.

The demo's experts merged with each method, time and peak memory of `mediator merge`, and how often the merged model
answers exactly, on rows that no expert was trained on. Results are kept in demo/catalogue, so a run that was stopped
goes on. `python -m scripts.catalogue.report` puts them into the README beside this file.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from scripts.benchmark.measure import Run, run
from scripts.catalogue.grid import Trial, trials

CHECKOUT = Path(__file__).resolve().parent.parent.parent
DEMO = CHECKOUT / "demo"
WORK = DEMO / "catalogue"
RESULTS, OUTPUT = WORK / "results.json", WORK / "merged"
ROWS = 50
"""Test rows of each task: a share of one half then has a standard error of 7 points, the mean over tasks of 3.5."""
RANK = 64
"""Rank of the adapters that are extracted from full experts, for methods that merge adapters."""
MEDIATOR = (sys.executable, "-m", "mediator_cli")


@dataclass(frozen=True)
class Result:
    """What one merge took, and the share of exact answers by task."""

    seconds: float
    peak: int
    accuracy: dict[str, float]


def main() -> None:
    """Run the trials that have no result yet."""
    parser = argparse.ArgumentParser(prog="python -m scripts.catalogue", description=__doc__)
    parser.add_argument("methods", nargs="*", help="default: all")
    parser.add_argument("--again", action="store_true", help="run what has a result already too")
    parser.add_argument("--times", action="store_true", help="measure the merge alone anew of what has a result")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, highlight=False)
    for trial in trials():
        if arguments.methods and trial.method not in arguments.methods:
            continue
        known = read_results().get(trial.name)
        if known and arguments.times:
            merged = merge(trial)
            result = Result(merged.wall, merged.peak, known["accuracy"])
        elif known and not arguments.again:
            continue
        else:
            result = try_out(trial)
        keep(trial, result)
        console.print(_told(trial, result), markup=False)


def read_results() -> dict[str, Any]:
    """Read what is known of each trial, by its name."""
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return known


def keep(trial: Trial, result: Result) -> None:
    """Write a result beside those that are there."""
    facts = {"method": trial.method, "parameters": dict(trial.parameters), "experts": list(trial.experts)}
    known = {**read_results(), trial.name: {**facts, **vars(result)}}
    RESULTS.write_text(json.dumps(known, indent=1), encoding="utf-8")


def try_out(trial: Trial) -> Result:
    """Merge, then answer."""
    merged = merge(trial)
    return Result(merged.wall, merged.peak, _answer(trial, OUTPUT))


def merge(trial: Trial) -> Run:
    """Run the command that merges."""
    recipe = WORK / "recipe.yaml"
    experts = [{"name": name, "model": str(_expert(name, trial.adapters))} for name in trial.experts]
    average = {"method": trial.method, **trial.parameters}
    facts = {"version": 1, "base": str(DEMO / "base"), "experts": experts, "assign": {"rule": "none"}}
    recipe.write_text(yaml.safe_dump(facts | {"average": average, "output": {"path": str(OUTPUT)}}), encoding="utf-8")
    return run([*MEDIATOR, "merge", str(recipe), "--overwrite", "--quiet"])


def _answer(trial: Trial, model: Path) -> dict[str, float]:
    """Evaluate in a process of its own: one that is started by a large process counts that one's memory too."""
    tasks = [part for name in trial.experts for part in ("--tasks", str(DEMO / "data" / f"{name}.test.jsonl"))]
    base = ["--base", str(DEMO / "base")] if trial.adapters else []
    command = [*MEDIATOR, "evaluate", str(model), *tasks, *base, "--limit", str(ROWS), "--json"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (found,) = json.loads(told)["models"]
    return {task["task"]: task["accuracy"] for task in found["tasks"]}


def _expert(name: str, as_adapter: bool) -> Path:
    """Find an expert; where adapters are wanted, extract one from a full checkpoint, once."""
    folder, adapter = DEMO / "experts" / name, WORK / "adapters" / name
    if not as_adapter or (folder / "adapter_config.json").exists():
        return folder
    if not adapter.exists():
        adapter.parent.mkdir(exist_ok=True)
        run([*MEDIATOR, "extract-lora", str(DEMO / "base"), str(folder), "-o", str(adapter), "--rank", str(RANK)])
    return adapter


def _told(trial: Trial, result: Result) -> str:
    shares = "  ".join(f"{name} {100 * share:.0f}" for name, share in result.accuracy.items())
    return f"{trial.name}: {shares}  ({result.seconds:.1f} s, {result.peak >> 20} MB)"


if __name__ == "__main__":
    main()
