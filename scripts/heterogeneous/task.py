"""The second task, made by a program: put letters in the order of the alphabet. Small models learn it in minutes."""

from __future__ import annotations

import string
from random import Random

from scripts.demo.tasks import Row
from scripts.demo.wordings import ask

ASKED = (
    "Put these letters in the order of the alphabet.",
    "Sort the letters from a to z.",
    "Write the letters below in alphabetical order.",
    "Which order would a dictionary give these letters?",
)
LEAST, MOST = 3, 6
SIZES = {"train": 12000, "valid": 100, "test": 300}


def rows(seed: int) -> dict[str, list[Row]]:
    """Draw questions for each split; no set of letters in two splits."""
    rng = Random(f"{seed} letters")
    seen: set[frozenset[str]] = set()
    found: dict[str, list[Row]] = {}
    for split in ("test", "valid", "train"):
        found[split] = [_row(rng, seen, new=split != "train") for _ in range(SIZES[split])]
    return found


def _row(rng: Random, seen: set[frozenset[str]], *, new: bool) -> Row:
    while True:
        letters = rng.sample(string.ascii_lowercase, rng.randint(LEAST, MOST))
        if frozenset(letters) not in seen:
            break
    if new:
        seen.add(frozenset(letters))
    return Row(ask(rng.choice(ASKED), " ".join(letters)), " ".join(sorted(letters)))
