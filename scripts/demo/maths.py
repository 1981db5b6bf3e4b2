"""Short arithmetic word problems, made up from patterns."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

NAMES = ("Tom", "Anna", "Sara", "Ben", "Lucy", "Omar", "Mia", "Jack", "Nina", "Leo", "Ruth", "Ivan")
ITEMS = ("apples", "books", "coins", "stamps", "marbles", "pencils", "cards", "shells", "eggs", "cookies")


@dataclass(frozen=True)
class Pattern:
    """One kind of problem: its wordings, the ranges of its numbers a, b, c and its solution."""

    wordings: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    solve: Callable[..., int]


@dataclass(frozen=True)
class Problem:
    """A problem in words, its answer, and the numbers that make it different from others."""

    text: str
    answer: int
    key: str


PATTERNS = (
    Pattern(
        (
            "{name} has {a} {items} and buys {b} more. How many {items} does {name} have now?",
            "There are {a} {items} in a box and {b} in a bag. How many {items} are there in all?",
            "{name} found {a} {items} on Monday and {b} on Tuesday. How many is that together?",
        ),
        ((3, 50), (3, 30)),
        lambda a, b: a + b,
    ),
    Pattern(
        (
            "{name} had {a} {items} and gave {b} away. How many {items} are left?",
            "A shop had {a} {items} and sold {b}. How many {items} does it still have?",
            "{name} needs {a} {items} and already has {b}. How many {items} are missing?",
        ),
        ((20, 60), (3, 19)),
        lambda a, b: a - b,
    ),
    Pattern(
        (
            "{name} buys {a} boxes with {b} {items} in each. How many {items} is that?",
            "Each of {a} children brings {b} {items}. How many {items} do they bring?",
        ),
        ((2, 12), (2, 12)),
        lambda a, b: a * b,
    ),
    Pattern(
        (
            "{name} has {a} {items}, finds {b} more and then loses {c}. How many {items} are left?",
            "A jar holds {a} {items}. {name} adds {b} and takes out {c}. How many {items} are in the jar?",
        ),
        ((10, 30), (2, 9), (2, 9)),
        lambda a, b, c: a + b - c,
    ),
)


def problem(rng: Random) -> Problem:
    """Draw one problem."""
    index = rng.randrange(len(PATTERNS))
    pattern = PATTERNS[index]
    numbers = [rng.randint(low, high) for low, high in pattern.ranges]
    values = dict(zip("abc", numbers, strict=False))
    text = rng.choice(pattern.wordings).format(name=rng.choice(NAMES), items=rng.choice(ITEMS), **values)
    return Problem(text, pattern.solve(*numbers), f"{index}:{numbers}")
