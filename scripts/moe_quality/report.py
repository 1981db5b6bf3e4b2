"""Put the results of demo/moe-quality into mediator_cli/moe/README.md: python -m scripts.moe_quality.report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.moe_quality.__main__ import read_results
from scripts.moe_quality.grid import TASKS, trials

README = Path(__file__).resolve().parent.parent.parent / "mediator_cli" / "moe" / "README.md"
BEGIN, END = "<!-- begin quality -->", "<!-- end quality -->"


def main() -> None:
    """Write the table of all trials that have a result, in the order of the grid."""
    known = read_results()
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(f"{head}{BEGIN}\n\n{table(known)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def table(known: Mapping[str, Any]) -> str:
    """Lay results out: accuracies in per cent, parameters in millions, milliseconds for an answer."""
    lines = [f"| | model | {' | '.join(TASKS)} | mean | M parameters | M active | ms an answer |"]
    lines += ["|---|---" + "|---:" * (len(TASKS) + 4) + "|"]
    group = ""
    for trial in trials():
        if trial.key in known:
            lines.append(_line("" if trial.group == group else trial.group, trial.name, known[trial.key]))
            group = trial.group
    return "\n".join(lines)


def _line(group: str, name: str, result: Mapping[str, Any]) -> str:
    shares = [result["accuracy"][task] for task in TASKS]
    cells = [f"{100 * share:.0f}" for share in shares] + [f"{100 * sum(shares) / len(shares):.1f}"]
    cells += [f"{result[which] / 1e6:.0f}" if which in result else "" for which in ("total", "active")]
    return f"| {group} | {name} | {' | '.join(cells)} | {1000 * result['seconds_per_answer']:.0f} |"


if __name__ == "__main__":
    main()
