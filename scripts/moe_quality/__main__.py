"""What a Mixture of Experts is worth: python -m scripts.moe_quality [TEXT ...], after make demo; about two hours.

The demo's four experts as static merges, bundles and MoEs of every kind, each asked the same test rows. With texts,
only trials whose name has one of them. Results are kept in demo/moe-quality, so a run that was stopped goes on.
`python -m scripts.moe_quality.report` puts them into mediator_cli/moe/README.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from scripts.moe_quality.grid import TASKS, Trial, trials

CHECKOUT = Path(__file__).resolve().parent.parent.parent
DEMO = CHECKOUT / "demo"
WORK = DEMO / "moe-quality"
RESULTS = WORK / "results.json"
ROWS = 25
"""Test rows of each task: a share of one half then has a standard error of 10 points, the mean over tasks of 5."""
MEDIATOR = (sys.executable, "-m", "mediator_cli")


def main() -> None:
    """Run the trials that have no result yet."""
    parser = argparse.ArgumentParser(prog="python -m scripts.moe_quality", description=__doc__)
    parser.add_argument("texts", nargs="*", help="default: all trials")
    parser.add_argument("--again", action="store_true", help="run what has a result already too")
    parser.add_argument("--rows", type=int, default=ROWS, help="test rows of each task")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, highlight=False)
    for trial in trials():
        is_meant = not arguments.texts or any(text in trial.key for text in arguments.texts)
        if not is_meant or (trial.key in read_results() and not arguments.again):
            continue
        result = try_out(trial, arguments.rows)
        keep(trial, result)
        shares = "  ".join(f"{name} {100 * share:.0f}" for name, share in result["accuracy"].items())
        console.print(f"{trial.key}: {shares}  ({result['seconds']:.0f} s)", markup=False)


def read_results() -> dict[str, Any]:
    """Read what is known of each trial, by its key."""
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return known


def keep(trial: Trial, result: dict[str, Any]) -> None:
    """Write a result beside those that are there."""
    known = {**read_results(), trial.key: result}
    RESULTS.write_text(json.dumps(known, indent=1), encoding="utf-8")


def try_out(trial: Trial, rows: int) -> dict[str, Any]:
    """Make the model, then ask it; give accuracies by task, parameters, and seconds of each step."""
    work = WORK / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started = time.monotonic()
    folder = DEMO / trial.model if trial.model else _merged(trial, work)
    steps: dict[str, float] = {"merge": time.monotonic() - started}
    for at, step in enumerate(trial.steps):
        before, after = time.monotonic(), work / f"step{at}"
        _run([step[0], str(folder), *step[1:], *_all_rows(), "-o", str(after)])
        steps[step[0]] = time.monotonic() - before
        folder = after
    asked = evaluate(folder, trial, rows)
    return {
        "accuracy": {task["task"]: task["accuracy"] for task in asked["tasks"]},
        "seconds_per_answer": asked["seconds_per_answer"],
        "n_bytes": asked["n_bytes"],
        "rows": rows,
        "steps": steps,
        "seconds": time.monotonic() - started,
        **_sizes(folder),
    }


def _merged(trial: Trial, work: Path) -> Path:
    """Write the recipe over the demo's experts, and merge."""
    experts = [{"name": name, "model": str(DEMO / "experts" / name), "prompts": _rows(name)} for name in TASKS]
    recipe, output = work / "recipe.yaml", work / "merged"
    facts = {"version": 1, "base": str(DEMO / "base"), "experts": experts, "output": {"path": str(output)}}
    recipe.write_text(yaml.safe_dump({**facts, **trial.recipe}), encoding="utf-8")
    _run(["merge", str(recipe), "--overwrite", "--quiet"])
    return output


def _rows(task: str) -> str:
    return str(DEMO / "data" / f"{task}.train.jsonl")


def _all_rows() -> list[str]:
    return ["--rows", *(_rows(name) for name in TASKS)]


def evaluate(folder: Path, trial: Trial, rows: int) -> dict[str, Any]:
    """Ask a model the test rows of all tasks, in a process of its own."""
    tasks = [part for name in TASKS for part in ("--tasks", str(DEMO / "data" / f"{name}.test.jsonl"))]
    base = ["--base", str(DEMO / "base")] if (folder / "adapter_config.json").exists() else []
    model = f"{folder}{trial.part}"
    told = _run(["evaluate", model, *tasks, *base, *trial.options, "--limit", str(rows), "--json"])
    (found,) = json.loads(told)["models"]
    return dict(found)


def _sizes(folder: Path) -> dict[str, int]:
    """Tell the parameters of an MoE, in all and for a token, by its config and tensors."""
    from scripts.moe_quality.sizes import parameters

    return parameters(folder) if (folder / "config.json").exists() else {}


def _run(arguments: list[str]) -> str:
    return subprocess.run([*MEDIATOR, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
