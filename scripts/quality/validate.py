"""Choose on validation rows: python -m scripts.quality.validate. Finished cells are kept in demo/quality."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from mediator_cli.cli.opening import quiet_transformers
from mediator_cli.compare.run import Comparison, Outcome, compare
from mediator_cli.compare.variants import references
from scripts.quality.choices import bundle_grid, static_grid
from scripts.quality.data import version

CHECKOUT = Path(__file__).parents[2]
RECIPE = CHECKOUT / "recipes/smollm2/mediator.yaml"
WORK = CHECKOUT / "demo/quality"
DATA = CHECKOUT / "demo/data"


def accuracy(outcome: Outcome) -> dict[str, float]:
    """Return the share of exact answers by task, and the mean of tasks."""
    found = {task: sum(score.exact for score in scores) / len(scores) for task, scores in outcome.scores.items()}
    return found | {"mean": sum(found.values()) / len(found)}


def main() -> None:
    """Score all candidates and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--only", choices=["static", "bundle"])
    parser.add_argument("--set", dest="changes", action="append", default=[])
    arguments = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    quiet_transformers()
    job = Comparison(
        RECIPE,
        version(DATA, "valid", arguments.rows),
        WORK,
        changes=tuple(arguments.changes),
        conflicts=CHECKOUT / "demo/conflicts.json",
        say=lambda text: console.print(text, markup=False),
    )
    variants = list(references([]))
    variants += [] if arguments.only == "bundle" else static_grid()
    variants += [] if arguments.only == "static" else bundle_grid()
    for outcome in compare(job, variants):
        shown = {name: round(100 * value, 1) for name, value in accuracy(outcome).items()}
        console.print(f"    {json.dumps(shown)} {outcome.n_bytes / 1e6:.0f} MB", markup=False)


if __name__ == "__main__":
    main()
