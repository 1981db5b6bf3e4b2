"""Names of experts: what they may be, and how they are made from other words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

if TYPE_CHECKING:
    from collections.abc import Sequence

LEGAL_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
NAME_RULE = "letters, digits, - and _, at most 64"

ExpertName = Annotated[
    str,
    Field(
        pattern=LEGAL_NAME,
        description="Unique name; letters, digits, - and _. It becomes a file name in the bundle.",
    ),
]

RESERVED_NAMES = ("base", "dense", "auto", "router")
"""Names that mean something else where an expert is named at run time."""


def check_expert_names(names: Sequence[str]) -> None:
    """Raise ValueError for names that become the same file, or mean something else at run time."""
    lower = [name.lower() for name in names]
    if twice := sorted({name for name in lower if lower.count(name) > 1}):
        raise ValueError(f"expert names must differ, also on disks that ignore case: {', '.join(twice)}")
    if reserved := sorted(set(lower) & set(RESERVED_NAMES)):
        raise ValueError(f"reserved expert names: {', '.join(reserved)}")


LONGEST = 64
"""Most letters of a name."""


def unique_names(names: Sequence[str]) -> list[str]:
    """Add a number to what is reserved, or taken by an earlier one, also on disks that ignore case.

    >>> unique_names(["a", "A", "base"])
    ['a', 'A-2', 'base-2']
    """
    taken = {*RESERVED_NAMES}
    unique = []
    for name in names:
        tries = (name, *(f"{name[: LONGEST - 4]}-{n}" for n in range(2, len(names) + 3)))
        chosen = next(one for one in tries if one.lower() not in taken)
        taken.add(chosen.lower())
        unique.append(chosen)
    return unique
