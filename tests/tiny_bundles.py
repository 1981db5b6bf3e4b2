"""Bundles with a router, and rows in the words of the tiny tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from conftest import ROUTE_ALL, Workshop, with_prompts
from tiny_tokens import FILMS, SUMS, WORDS

from mediator_cli.evaluate.tasks import Row

PLAIN_EXPERTS = [{"name": n, "model": f"./{n}"} for n in ("a", "b")]


def routed(workshop: Workshop, name: str = "out", **policy: Any) -> Path:
    """Merge a bundle with a router."""
    return workshop.merge(name, experts=with_prompts(), router={"policy": policy}, **ROUTE_ALL)


def make_rows(n: int, seed: int = 0) -> list[Row]:
    """Make rows of words of either task, every second one with choices."""
    rng = Random(seed)
    rows = []
    for at in range(n):
        prompt = " ".join(rng.choice(rng.choice((SUMS, FILMS))) for _ in range(rng.randrange(1, 9)))
        choices = rng.sample(WORDS[15:], 3)
        rows.append(Row(prompt=prompt, answer=choices[0], choices=sorted(choices) if at % 2 else None))
    return rows


def write_rows(file: Path, rows: list[Row]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row.model_dump(exclude_none=True)) + "\n" for row in rows))
    return file
