"""Put serving.json into the README beside this file: python -m scripts.servers.serving_report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.servers.serving import RESULTS, TASKS

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- begin serving -->", "<!-- end serving -->"


def main() -> None:
    """Write the table."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    README.write_text(with_table(README.read_text(encoding="utf-8"), found), encoding="utf-8")


def with_table(text: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Put the table between its marks."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Lay the results out, one server and way of asking a row."""
    head = "| asked | rows | same answer as transformers | right | offline |" + "".join(f" {task} |" for task in TASKS)
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *(_row(result) for result in results)])


def _row(result: Mapping[str, Any]) -> str:
    shares = [result["equal"], result["accuracy"], result["offline_accuracy"], *result["by_task"].values()]
    return f"| {result['what']} | {result['rows']} | {' | '.join(f'{share:.1%}' for share in shares)} |"


if __name__ == "__main__":
    main()
