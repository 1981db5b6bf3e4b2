"""The same tensors under other names: prefixes that libraries and versions add, drop or change.

`h.0.ln_1.weight` of one file is `transformer.h.0.ln_1.weight` of another, and the language part of a vision-language
model stands below a prefix of its own. Names that end alike vote for a change of prefix; those with most votes win.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.layout import place_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    Shapes = Mapping[str, tuple[int, ...]]


def match_names(ours: Shapes, theirs: Shapes) -> dict[str, str]:
    """Find the tensor of `theirs` that stands for each of `ours`; those that none stands for are left out.

    Equal names match first; the others only where a change of prefix brings them together and dimensions agree.

    >>> match_names({"transformer.h.0.ln.weight": (4,)}, {"h.0.ln.weight": (4,)})
    {'transformer.h.0.ln.weight': 'h.0.ln.weight'}
    """
    found = {name: name for name in ours if name in theirs}
    left = {name: shape for name, shape in theirs.items() if name not in ours}
    missing = {name: shape for name, shape in ours.items() if name not in found}
    for old, new in _changes(missing, left):
        for name in list(left):
            target = _with_prefix(name, old, new)
            if target in missing and len(missing[target]) == len(left[name]):
                found[target] = name
                del missing[target], left[name]
    return {name: found[name] for name in ours if name in found}


def _changes(ours: Shapes, theirs: Shapes) -> list[tuple[str, str]]:
    """List changes of prefix, theirs to ours, by the number of tensors of one shape that they bring together."""
    by_ending: dict[tuple[str, ...], list[str]] = {}
    for name in ours:
        by_ending.setdefault(_ending(name), []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name, shape in theirs.items():
        for other in by_ending.get(_ending(name), ()):
            if ours[other] == shape:
                votes[_heads(name, other)] += 1
    return [change for change, _ in votes.most_common()]


def _ending(name: str) -> tuple[str, ...]:
    """Give the part of a name that does not depend on prefixes: from the layer on, or the last two parts."""
    layer = place_of(name).layer
    parts = name.split(".")
    return tuple(parts[len(layer.split(".")) - 2 :] if layer else parts[-2:])


def _heads(theirs: str, ours: str) -> tuple[str, str]:
    """Cut what two names have in common at their ends; the rest, with its dot, are the two prefixes."""
    old, new = theirs.split("."), ours.split(".")
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    return "".join(f"{part}." for part in old), "".join(f"{part}." for part in new)


def _with_prefix(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else ""
