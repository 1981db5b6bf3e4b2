"""The four tasks: chat rows for training, validation and test, the same for the same seed."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from random import Random

from scripts.demo import maths, sources
from scripts.demo.wordings import WORDINGS, ask

SIZES = {"train": 2500, "valid": 200, "test": 300}
HOMES = {"train": 70, "valid": 85, "test": 100}
NAMES_PER_ROW = 3
CHOICES = {"sarcasm": ("yes", "no"), "sentiment": ("positive", "negative")}


@dataclass(frozen=True)
class Item:
    """A text of a task and its answer, however it will be asked."""

    text: str
    answer: str


@dataclass(frozen=True)
class Row:
    """What the user asks, what the model is to answer, and what it has to choose from, if anything."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


Splits = dict[str, list[Item]]


def write_tasks(folder: Path, seed: int) -> None:
    """Write ``<task>.<version>.jsonl`` for every task, split and way of asking."""
    for task, make in MAKERS.items():
        for split, items in make(seed).items():
            for version, instructions in WORDINGS[task].versions(split).items():
                lines = map(_line, asked(task, items, instructions))
                (folder / f"{task}.{version}.jsonl").write_text("".join(lines), encoding="utf-8")


def asked(task: str, items: Sequence[Item], instructions: Sequence[str]) -> list[Row]:
    """Ask about each item with one of the instructions, drawn from the item's own text."""
    choices = CHOICES.get(task, ())
    # In turn would tie wording to label, since the labels alternate.
    drawn = (Random(f"{task} {item.text}").choice(instructions) for item in items)
    return [
        Row(ask(instruction, item.text), item.answer, choices) for item, instruction in zip(items, drawn, strict=True)
    ]


def read_rows(path: Path) -> list[Row]:
    """Read the rows of one jsonl file."""
    with path.open(encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    return [Row(row["prompt"], row["answer"], tuple(row.get("choices", ()))) for row in found]


def maths_rows(seed: int) -> Splits:
    """Return word problems; no combination of numbers occurs in two splits."""
    rng = Random(f"{seed} maths")
    drawn = (maths.problem(rng) for _ in cycle([None]))
    return _deal(((item.key, Item(item.text, str(item.answer))) for item in drawn), seed)


def language_rows(seed: int) -> Splits:
    """Return a few names in one language; no country, month or language occurs in two splits."""
    rng = Random(f"{seed} language")
    pools: dict[tuple[str, str], list[str]] = {}
    for name in sources.names():
        pools.setdefault((name.language, _home(name.key, seed)), []).append(name.text)
    languages = sorted({language for language, _ in pools})
    return {
        split: _unique(_quizzes({key[0]: pools[key] for key in pools if key[1] == split}, languages, rng), size)
        for split, size in SIZES.items()
    }


def sarcasm_rows(seed: int) -> Splits:
    """Return headlines, as many sarcastic as serious."""
    return _cut("sarcasm", sources.headlines(), seed)


def sentiment_rows(seed: int) -> Splits:
    """Return review sentences, as many positive as negative."""
    return _cut("sentiment", sources.reviews(), seed)


MAKERS: dict[str, Callable[[int], Splits]] = {
    "maths": maths_rows,
    "sarcasm": sarcasm_rows,
    "language": language_rows,
    "sentiment": sentiment_rows,
}


def _line(row: Row) -> str:
    fields = {name: value for name, value in asdict(row).items() if value}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _home(key: str, seed: int) -> str:
    # A hash, so that the same thing lands in the same split whatever else is drawn.
    place = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()) % 100
    return next(split for split, end in HOMES.items() if place < end)


def _deal(drawn: Iterator[tuple[str, Item]], seed: int) -> Splits:
    splits: dict[str, dict[str, Item]] = {split: {} for split in SIZES}
    while any(len(splits[split]) < size for split, size in SIZES.items()):
        key, item = next(drawn)
        split = _home(key, seed)
        if len(splits[split]) < SIZES[split]:
            splits[split][item.text] = item
    return {split: list(items.values()) for split, items in splits.items()}


def _quizzes(pools: dict[str, list[str]], languages: Sequence[str], rng: Random) -> Iterator[Item]:
    for language in cycle(languages):
        chosen = rng.sample(pools[language], NAMES_PER_ROW)
        yield Item(", ".join(chosen), language)


def _unique(items: Iterable[Item], size: int) -> list[Item]:
    found: dict[str, Item] = {}
    for item in items:
        found.setdefault(item.text, item)
        if len(found) == size:
            break
    return list(found.values())


def _cut(task: str, pool: list[sources.Labelled], seed: int) -> Splits:
    unique = list({item.text.casefold(): item for item in pool}.values())
    Random(f"{seed} {task}").shuffle(unique)
    by_label = [[item for item in unique if item.label == label] for label in sorted({item.label for item in unique})]
    balanced = chain.from_iterable(zip(*by_label, strict=False))
    items = iter([Item(item.text, item.label) for item in balanced])
    return {split: list(islice(items, size)) for split, size in SIZES.items()}
