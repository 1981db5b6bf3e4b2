"""Put the results of demo/catalogue into the README beside this file: python -m scripts.catalogue.report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mediator_cli.methods.registry import methods
from scripts.catalogue.__main__ import read_results
from scripts.catalogue.grid import FOUR, NOT_RUN, ONE, PAIR

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- begin tables -->", "<!-- end tables -->"
TITLES = {FOUR: "All four experts", PAIR: "Methods that merge two: maths and sentiment", ONE: "Methods of one: maths"}


def main() -> None:
    """Write one table for each set of experts, the best parameters of a method beside its defaults."""
    known = list(read_results().values())
    parts = [f"### {title}\n\n{table(experts, _of(known, experts))}" for experts, title in TITLES.items()]
    left_out = [f"- `{name}` was not run: {why}." for name, why in NOT_RUN.items() if name in methods()]
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    text = "\n\n".join([*parts, "\n".join(left_out)])
    README.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _of(known: Sequence[Mapping[str, Any]], experts: tuple[str, ...]) -> list[Mapping[str, Any]]:
    return [result for result in known if tuple(result["experts"]) == experts]


def table(experts: tuple[str, ...], results: Sequence[Mapping[str, Any]]) -> str:
    """Lay results out, the best mean first; of each method the defaults and the best of its grid."""
    chosen = sorted(_chosen(results), key=_mean, reverse=True)
    lines = [f"| method | parameters | {' | '.join(experts)} | mean | s | MB |"]
    lines += ["|---|---" + "|---:" * (len(experts) + 3) + "|"]
    return "\n".join(lines + [_line(result, experts) for result in chosen])


def _chosen(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_method.setdefault(result["method"], []).append(result)
    chosen: list[Mapping[str, Any]] = []
    for tried in by_method.values():
        defaults = [result for result in tried if not result["parameters"]]
        best = max(tried, key=_mean)
        chosen += defaults if best in defaults else [*defaults, best]
    return chosen


def _mean(result: Mapping[str, Any]) -> float:
    shares = list(result["accuracy"].values())
    return float(sum(shares) / len(shares))


def _line(result: Mapping[str, Any], experts: Sequence[str]) -> str:
    written = ", ".join(f"{name} {value}" for name, value in result["parameters"].items()) or "defaults"
    shares = " | ".join(f"{100 * result['accuracy'][name]:.0f}" for name in experts)
    cells = f"{shares} | {100 * _mean(result):.1f} | {result['seconds']:.1f} | {result['peak'] / 1e6:.0f}"
    return f"| {result['method']} | {written} | {cells} |"


if __name__ == "__main__":
    main()
