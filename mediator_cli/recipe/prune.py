"""What is left of a recipe when its faulty fields are set aside, so that the rest can still be checked."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_HARMLESS: dict[str, Any] = {"version": 1, "assign": {"rule": "none"}}
"""What stands in for a faulty field where the default could raise problems that the user does not have."""


def prune(data: dict[str, Any], faults: Iterable[tuple[str | int, ...]]) -> dict[str, Any] | None:
    """Return a copy of a recipe's data without the fields at `faults`; None if sources or slices are unclear.

    Experts keep their places in the list, so that line numbers stay right; a faulty name gets a stand-in.
    """
    kept = deepcopy(data)
    for fault in faults:
        if not fault or fault[0] in ("base", "slices"):
            return None
        if fault[0] == "experts":
            if not _prune_expert(kept.get("experts"), fault[1:]):
                return None
        elif str(fault[0]) in _HARMLESS:
            kept[str(fault[0])] = deepcopy(_HARMLESS[str(fault[0])])
        else:
            _prune_leaf(kept, fault)
    return kept


def _prune_expert(experts: Any, rest: tuple[str | int, ...]) -> bool:  # noqa: ANN401 - YAML data
    if not isinstance(experts, list) or not all(isinstance(expert, dict) for expert in experts):
        return False
    named = range(len(experts)) if not rest else [int(rest[0])]
    field = rest[1] if len(rest) > 1 else "name"
    if field == "model":
        return False
    for index in named:
        experts[index].pop(field, None)
        if field == "name":
            experts[index]["name"] = f"expert-{index}"
    return True


def _prune_leaf(data: dict[str, Any], fault: tuple[str | int, ...]) -> None:
    """Remove the field; a fault of a whole section, or inside a list, removes the section."""
    section = data.get(str(fault[0]))
    leaf = fault[-1]
    if fault == ("extract", "mode"):
        # What the others may be depends on it.
        data.pop("extract", None)
        return
    if len(fault) == 2 and isinstance(section, dict) and leaf in section:
        del section[leaf]
    else:
        data.pop(str(fault[0]), None)
