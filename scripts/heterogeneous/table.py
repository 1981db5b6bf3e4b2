"""The table of the README."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scripts.heterogeneous.compare import Result


def write_table(results: Sequence[Result], page: Path) -> str:
    """Put the table between the marks of a page; give it."""
    tasks = tuple(results[0].accuracy)
    lines = [
        f"| | {' | '.join(tasks)} | mean | parameters | made in | answered in |",
        f"|---|{'---:|' * (len(tasks) + 4)}",
        *(_line(each) for each in results),
    ]
    table = "\n".join(lines)
    text = page.read_text(encoding="utf-8")
    filled = re.sub(r"(<!-- begin table -->\n).*?(<!-- end table -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
    page.write_text(filled, encoding="utf-8")
    return table


def _line(each: Result) -> str:
    shares = " | ".join(f"{share:.1f}" for share in each.accuracy.values())
    seconds = f"{each.made_in:.0f} s | {each.answered_in:.0f} s"
    return f"| {each.name} | {shares} | {each.mean:.1f} | {each.parameters / 1e6:.1f} M | {seconds} |"
