"""Names of experts that are made from other words: different from each other, and none that is reserved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.recipe.schema import RESERVED_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

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
