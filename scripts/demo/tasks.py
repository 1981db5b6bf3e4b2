"""The four tasks: chat rows for training, validation and test, the same for the same seed."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from random import Random

from scripts.demo import maths, sources

SIZES = {"train": 2500, "valid": 200, "test": 200}
HOMES = {"train": 70, "valid": 85, "test": 100}
NAMES_PER_ROW = 3
INSTRUCTIONS = {
    "maths": "Solve this problem. Reply with the number only.",
    "sarcasm": "Is this headline sarcastic? Reply with yes or no.",
    "language": "Which language are these names written in? Reply with the language only.",
    "sentiment": "Is this film review positive or negative? Reply with one word.",
}


@dataclass(frozen=True)
class Row:
    """What the user asks and what the model is to answer."""

    prompt: str
    answer: str


Splits = dict[str, list[Row]]


def write_tasks(folder: Path, seed: int) -> None:
    """Write ``<task>.<split>.jsonl`` for every task and split."""
    for task, make in MAKERS.items():
        for split, rows in make(seed).items():
            lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
            (folder / f"{task}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read the rows of one jsonl file."""
    with path.open(encoding="utf-8") as file:
        return [Row(**json.loads(line)) for line in file]


def maths_rows(seed: int) -> Splits:
    """Return word problems; no combination of numbers occurs in two splits."""
    rng = Random(f"{seed} maths")
    drawn = (maths.problem(rng) for _ in cycle([None]))
    return _deal(((item.key, _ask("maths", item.text, str(item.answer))) for item in drawn), seed)


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


def _ask(task: str, text: str, answer: str) -> Row:
    return Row(f"{INSTRUCTIONS[task]}\n\n{text}", answer)


def _home(key: str, seed: int) -> str:
    # A hash, so that the same thing lands in the same split whatever else is drawn.
    place = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()) % 100
    return next(split for split, end in HOMES.items() if place < end)


def _deal(drawn: Iterator[tuple[str, Row]], seed: int) -> Splits:
    splits: dict[str, dict[str, Row]] = {split: {} for split in SIZES}
    while any(len(splits[split]) < size for split, size in SIZES.items()):
        key, row = next(drawn)
        split = _home(key, seed)
        if len(splits[split]) < SIZES[split]:
            splits[split][row.prompt] = row
    return {split: list(rows.values()) for split, rows in splits.items()}


def _quizzes(pools: dict[str, list[str]], languages: Sequence[str], rng: Random) -> Iterator[Row]:
    for language in cycle(languages):
        chosen = rng.sample(pools[language], NAMES_PER_ROW)
        yield _ask("language", ", ".join(chosen), language)


def _unique(rows: Iterable[Row], size: int) -> list[Row]:
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.prompt, row)
        if len(found) == size:
            break
    return list(found.values())


def _cut(task: str, pool: list[sources.Labelled], seed: int) -> Splits:
    unique = list({item.text.casefold(): item for item in pool}.values())
    Random(f"{seed} {task}").shuffle(unique)
    by_label = [[item for item in unique if item.label == label] for label in sorted({item.label for item in unique})]
    balanced = chain.from_iterable(zip(*by_label, strict=False))
    rows = iter([_ask(task, item.text, item.label) for item in balanced])
    return {split: list(islice(rows, size)) for split, size in SIZES.items()}
