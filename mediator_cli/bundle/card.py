"""Marked blocks of a bundle's model card, which later commands write anew."""

from __future__ import annotations

import re

CARD = "README.md"


def with_block(card: str, name: str, text: str) -> str:
    r"""Put a text between the markers of a block, at the end of the card where it has no such block yet.

    >>> with_block("a\n", "x", "1")
    'a\n\n<!-- begin x -->\n1\n<!-- end x -->\n'
    >>> with_block(with_block("a\n", "x", "1"), "x", "2") == with_block("a\n", "x", "2")
    True
    """
    block = f"<!-- begin {name} -->\n{text.strip()}\n<!-- end {name} -->"
    pattern = re.compile(rf"<!-- begin {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.DOTALL)
    if pattern.search(card):
        return pattern.sub(lambda _: block, card, count=1)
    return f"{card.rstrip()}\n\n{block}\n"
