"""What a tensor is made of where it is not stored as one: runs of elements of other tensors.

Splitting and joining of experts, renamed tensors, and embedding rows in another order are all the same thing here:
a tensor, flattened, is a list of spans, and each span is a run of elements of a stored tensor, or the mean of several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Layout = Mapping[str, tuple["Span", ...]]
    """What tensors are made of, by name; tensors that are not in it are stored as they are."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of elements of `tensor` of the source `source`, from flat index `start`."""

    source: str
    tensor: str
    start: int


@dataclass(frozen=True, slots=True)
class Span:
    """`size` elements: those of one part, the mean of several, or zeros where there is none."""

    size: int
    parts: tuple[Part, ...]


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Join spans that follow each other in what they read, and drop empty ones.

    >>> joined([Span(2, (Part("a", "w", 0),)), Span(3, (Part("a", "w", 2),))])
    (Span(size=5, parts=(Part(source='a', tensor='w', start=0),)),)
    """
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if last is not None and span.parts == tuple(_shifted(part, last.size) for part in last.parts):
            found[-1] = Span(last.size + span.size, last.parts)
        elif span.size:
            found.append(span)
    return tuple(found)


def _shifted(part: Part, by: int) -> Part:
    return Part(part.source, part.tensor, part.start + by)
