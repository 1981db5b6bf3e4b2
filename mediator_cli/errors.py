"""The exceptions that a user can mend, each with what is wrong and what to do next.

MediatorError
├── RecipeError       the recipe cannot be read, or asks for something impossible
├── CheckpointError   a source folder, header, tensor or adapter is not usable
├── BundleError       a bundle on disk is damaged or not what it says
└── OutputError       the result cannot be written

Anything else that escapes is a defect of this program.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Problem:
    """One thing to mend: `place` is file:line, field or tensor, `hint` the next step."""

    place: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        head = f"{self.place}: {self.message}" if self.place else self.message
        return f"{head}\n  hint: {self.hint}" if self.hint else head


class MediatorError(Exception):
    """Base of all errors that the user can mend; carries one or more problems."""

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(MediatorError):
    """The recipe cannot be read, or asks for something impossible."""


class CheckpointError(MediatorError):
    """A source cannot be used."""


class BundleError(MediatorError):
    """A bundle is damaged or not what it says."""


class OutputError(MediatorError):
    """The result cannot be written."""


def first_line(error: Exception) -> str:
    r"""Give what an error of another library says, without the essay below; its name where it says nothing.

    >>> first_line(ValueError("no such layer\n\nPlease read ...")), first_line(KeyError())
    ('no such layer', 'KeyError')
    """
    return str(error).strip().split("\n")[0] or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the closest known word, or list what is known.

    >>> did_you_mean("desnity", ["density", "weight"])
    "did you mean 'density'?"
    >>> did_you_mean("zzz", ["density", "weight"])
    'known: density, weight'
    >>> did_you_mean("DENSITY", ["density", "weight"])
    "did you mean 'density'?"
    """
    names = list(known)
    plain = {name.lower(): name for name in names}
    close = get_close_matches(word.lower(), plain, n=1)
    return f"did you mean '{plain[close[0]]}'?" if close else f"known: {', '.join(names)}"


def some_names(names: Iterable[str], shown: int = 3) -> str:
    """Name the first few of many.

    >>> some_names(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    known = list(names)
    rest = f" and {len(known) - shown} more" if len(known) > shown else ""
    return ", ".join(known[:shown]) + rest
