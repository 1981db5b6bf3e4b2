"""Twelve small tasks with an expert each and four held-out ones: chat rows, the same for the same seed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from scripts.demo.tasks import Row, read_rows
from scripts.demo.wordings import ask
from scripts.quality.data import foreign_tasks
from scripts.tradeoffs import generators
from scripts.tradeoffs.generators import Draw, Drawn

SIZES = {"train": 900, "valid": 60, "test": 100}
HOMES = {"train": 65, "valid": 80, "test": 100}
DRAWS = 100_000
FROM_DEMO = ("maths", "language", "sarcasm", "sentiment")


@dataclass(frozen=True)
class Procedural:
    """How items are drawn, and the instructions that all splits share."""

    draw: Draw
    instructions: tuple[str, ...]


PROCEDURAL: Mapping[str, Procedural] = {
    "dates": Procedural(
        generators.written_date,
        (
            "Write this date as MM-DD.",
            "Give month and day in digits, like 07-31.",
            "Turn the date into the form month-day with two digits each.",
        ),
    ),
    "times": Procedural(
        generators.time_of_day,
        (
            "Write this time on the 12-hour clock.",
            "Convert to am or pm.",
            "What does an American clock say? Use am or pm.",
        ),
    ),
    "numbers": Procedural(
        generators.number_in_words,
        (
            "Write this number in digits.",
            "Which number is spelled out here? Digits only.",
            "Convert words to a number.",
        ),
    ),
    "initials": Procedural(
        generators.full_name,
        (
            "Give the initials of this person.",
            "Abridge the name to initials.",
            "Write only the first letters, with dots.",
        ),
    ),
    "sort": Procedural(
        generators.numbers_to_sort,
        ("Sort these numbers.", "Write the numbers from smallest to largest.", "Put these in rising order."),
    ),
    "compare": Procedural(
        generators.numbers_to_compare,
        ("Which number is the largest?", "Reply with the greatest of these numbers.", "Find the maximum."),
    ),
    "records": Procedural(
        generators.person,
        (
            "Write this as name;age;city.",
            "Extract name, age and city, with semicolons between.",
            "Make a CSV line of name, age and city.",
        ),
    ),
    "identifiers": Procedural(
        generators.snake_name,
        (
            "Write this identifier in camelCase.",
            "Rename the variable from snake case to camel case.",
            "Convert the name to camel case.",
        ),
    ),
}

HELD_OUT: Mapping[str, Procedural] = {
    "sums": Procedural(
        generators.bare_sum, ("Calculate. Write one number.", "What is the result?", "Work this out. Only the number.")
    ),
    "usdates": Procedural(
        generators.slashed_date,
        (
            "Write this American date as MM-DD.",
            "The month comes first. Give month and day as MM-DD.",
            "Rewrite the US date in the form month-day with two digits each.",
        ),
    ),
    "kebab": Procedural(
        generators.kebab_name,
        (
            "Write this CSS name in camelCase.",
            "Change kebab case to camel case.",
            "Remove the hyphens and use camel case.",
        ),
    ),
}
QUARTZ = "quartz"
SEEN = (*FROM_DEMO, *PROCEDURAL)
UNSEEN = (*HELD_OUT, QUARTZ)


def write_tasks(folder: Path, demo: Path, seed: int) -> None:
    """Write ``<task>.<split>.jsonl`` of all tasks; `demo` holds the rows of the demo's four."""
    for task in (*SEEN, *UNSEEN):
        for split, rows in splits(task, demo, seed).items():
            if split != "train" or task in SEEN:
                (folder / f"{task}.{split}.jsonl").write_text("".join(map(_line, rows)), encoding="utf-8")


def splits(task: str, demo: Path, seed: int) -> dict[str, list[Row]]:
    """Return the rows of one task by split."""
    if task in FROM_DEMO:
        return {split: read_rows(demo / f"{task}.{split}.jsonl")[:size] for split, size in SIZES.items()}
    if task == QUARTZ:
        return quartz_rows(seed)
    return procedural_rows(task, {**PROCEDURAL, **HELD_OUT}[task], seed)


def procedural_rows(task: str, made: Procedural, seed: int) -> dict[str, list[Row]]:
    """Draw items until every split is full; a key always lands in the same split, whatever the task.

    Raises ValueError for a task with too few different items.
    """
    rng = Random(f"{seed} {task}")
    found: dict[str, dict[str, Drawn]] = {split: {} for split in SIZES}
    for _ in range(DRAWS):
        drawn = made.draw(rng)
        items = found[_home(drawn.key, seed)]
        items.setdefault(drawn.text, drawn)
        if all(len(found[split]) >= size for split, size in SIZES.items()):
            break
    else:
        raise ValueError(f"{task}: {DRAWS:,} draws do not fill the splits, there are too few different items")
    return {
        split: [_asked(task, made.instructions, item) for item in list(items.values())[: SIZES[split]]]
        for split, items in found.items()
    }


def quartz_rows(seed: int) -> dict[str, list[Row]]:
    """Return the shortest questions of two choices about physical quantities, read from the package `evals`."""
    rows = next(task.rows for task in foreign_tasks(seed) if task.name == QUARTZ)
    shortest = sorted(rows, key=lambda row: len(row.prompt))[: SIZES["valid"] + SIZES["test"]]
    asked = [Row(row.prompt, row.answer, tuple(row.choices or ())) for row in shortest]
    Random(f"{seed} {QUARTZ}").shuffle(asked)
    return {"valid": asked[: SIZES["valid"]], "test": asked[SIZES["valid"] :]}


def _asked(task: str, instructions: Sequence[str], item: Drawn) -> Row:
    instruction = Random(f"{task} {item.text}").choice(instructions)
    return Row(ask(instruction, item.text), item.answer)


def _home(key: str, seed: int) -> str:
    # A hash, so that what two tasks share is never training of one and test of the other.
    place = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()) % 100
    return next(split for split, end in HOMES.items() if place < end)


def _line(row: Row) -> str:
    fields = {name: value for name, value in asdict(row).items() if value}
    return json.dumps(fields, ensure_ascii=False) + "\n"
