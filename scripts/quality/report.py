"""Put the tables of demo/quality into the README beside this file: python -m scripts.quality.report."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.quality.validate import WORK

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- begin tables -->", "<!-- end tables -->"
TABLES = {
    "main": "Experts, static merges and the recipe, paraphrased instructions",
    "test-template": "One template for each task",
    "test-bare": "Bare texts without an instruction",
    "policies": "Policies",
    "extraction": "What is kept, right expert given",
    "layers": "Which layers, right expert given; `same bytes` keeps more of fewer layers",
}


def main() -> None:
    """Write the tables that are there."""
    parts = [f"### {title}\n\n{table(WORK / f'{name}.json')}" for name, title in TABLES.items() if _is_there(name)]
    foreign = WORK / "foreign.md"
    if foreign.is_file():
        parts.append(f"### Tasks that no expert was trained on, right choices\n\n{foreign.read_text('utf-8')}")
    mixed = WORK / "mixed.md"
    if mixed.is_file():
        parts.append(f"### Two questions at once, right choices\n\n{mixed.read_text('utf-8')}")
    if _is_there("routers"):
        parts.append(f"### Routers\n\n{routers(json.loads((WORK / 'routers.json').read_text('utf-8')))}")
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    README.write_text(f"{head}{BEGIN}\n\n{chr(10).join(parts)}\n{END}{tail}", encoding="utf-8")


def _is_there(name: str) -> bool:
    return (WORK / f"{name}.json").is_file()


def table(file: Path) -> str:
    """Lay a report out: accuracies, size, and the difference from the oracle experts with its interval."""
    report = json.loads(file.read_text(encoding="utf-8"))
    against = {d["model"]: d for d in report["differences"] if d["task"] is None}
    tasks = [task["task"] for task in report["models"][0]["tasks"]]
    lines = [f"| | {' | '.join(tasks)} | mean | MB | to oracle |", "|---" + "|---:" * (len(tasks) + 3) + "|"]
    lines += [_line(model, against.get(model["name"])) for model in report["models"]]
    return "\n".join(lines) + "\n"


def _line(model: Mapping[str, Any], difference: Mapping[str, float] | None) -> str:
    cells = [_share(task) for task in model["tasks"]]
    mean = f"{100 * model['accuracy']:.1f} ± {100 * model['standard_error']:.1f}"
    gap = ""
    if difference:
        gap = (
            f"{100 * difference['difference']:+.1f} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"
        )
    return f"| {model['name']} | {' | '.join(cells)} | {mean} | {model['n_bytes'] / 1e6:.0f} | {gap} |"


def _share(task: Mapping[str, Any]) -> str:
    chosen = task["choice_accuracy"]
    return f"{100 * task['accuracy']:.1f}" + ("" if chosen is None else f" ({100 * chosen:.1f})")


def routers(found: list[dict[str, Any]]) -> str:
    """Lay the routers out: share of prompts sent to the right expert, calibration, recognition of foreign tasks."""
    return "\n".join(_router_lines(found)) + "\n"


def _router_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "| features | classifier | paraphrased | template | bare | log loss | ECE | AUROC score | AUROC entropy |"
    yield "|---|---" + "|---:" * 7 + "|"
    for row in found:
        shares = " | ".join(f"{100 * row[name]:.1f}" for name in ("test", "test-template", "test-bare"))
        rest = " | ".join(f"{row[name]:.3f}" for name in ("log loss", "ece", "auroc score", "auroc entropy"))
        yield f"| {row['features']} | {row['classifier']} | {shares} | {rest} |"


if __name__ == "__main__":
    main()
