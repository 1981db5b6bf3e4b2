"""A scatter of named points: where everything lies on a canvas, so that no label covers another or a point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CHARACTER, _LINE, _GAP = 6.3, 13.0, 8.0
"""Width of a letter, height of a line, and the least distance of a label from its point, in pixels."""
_TURNS, _RINGS = 12, 9
_FEW_TIMES = 4


@dataclass(frozen=True)
class Spot:
    """A named point of a kind; `error` is its standard error in y, `is_front` whether no other beats it in both."""

    name: str
    kind: str
    x: float
    y: float
    error: float | None = None
    is_front: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis: its ends, round ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Say where a value lies between the ends, 0 to 1."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Label:
    """Where a label is put: its middle, in pixels from the left and from the top."""

    x: float
    y: float


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell which points (cost, gain) no other beats: none is as cheap and better, or as good and cheaper.

    >>> on_front([(1, 1), (2, 3), (3, 2), (2, 2)])
    [True, True, False, False]
    """
    return [
        not any((x <= a and y >= b) and (x < a or y > b) for x, y in points)
        for a, b in points
    ]  # fmt: skip


def linear_axis(values: Sequence[float], least: float = 0.02, most: float = math.inf) -> Axis:
    """Choose an axis around values with about five round ticks; nothing can be above `most`."""
    span = max(max(values) - min(values), least)
    raw = span / 4
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * n for n in (1, 2, 5, 10) if size * n >= raw)
    first, last = math.floor(min(values) / step - 0.2), math.ceil(max(values) / step + 0.2)
    ticks = tuple(round(n * step, 9) for n in range(first, last + 1) if n * step <= most)
    return Axis(ticks[0], ticks[-1], ticks)


def cost_axis(values: Sequence[float]) -> Axis:
    """Choose an axis for positive values: logarithmic where they are of different sizes."""
    return log_axis(values) if max(values) > _FEW_TIMES * min(values) else linear_axis(values, least=0.1 * max(values))


def log_axis(values: Sequence[float]) -> Axis:
    """Choose a logarithmic axis around positive values, with ticks at 1, 2 and 5 of each power of ten."""
    low, high = min(values) / 1.25, max(values) * 1.35
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [n * 10.0**power for power in powers for n in (1, 2, 5)]
    return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high), is_log=True)


def place_labels(
    names: Sequence[str], points: Sequence[tuple[float, float]], width: float, height: float
) -> list[Label]:
    """Put a label near each point of a canvas, in pixels, the first where it covers no point and no other label.

    Where all places are taken it stands at the nearest one.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    found = []
    for name, (x, y) in zip(names, points, strict=True):
        half = len(name) * _CHARACTER / 2
        options = [_fitting(label, half, width, height) for label in _around(x, y, half)]
        chosen = next((each for each in options if not _covers(_box(each, half), taken)), options[0])
        taken.append(_box(chosen, half))
        found.append(chosen)
    return found


def spread(ys: Sequence[float], height: float) -> list[float]:
    """Move lines of text apart, each as little as it takes from the top down; none below `height`.

    >>> spread([50, 10, 52], 100)
    [50, 10, 63.0]
    """
    found = list(ys)
    order = sorted(range(len(ys)), key=lambda at: ys[at])
    for before, at in pairwise(order):
        found[at] = max(found[at], found[before] + _LINE)
    low = max(found, default=0) - height
    return [y - low for y in found] if low > 0 else found


def _around(x: float, y: float, half: float) -> Iterator[Label]:
    """Give places around a point, near ones first, those beside it before those above and below."""
    for ring in range(_RINGS):
        for turn in range(_TURNS):
            angle = (turn // 2 + 1) * (1 if turn % 2 else -1) * 2 * math.pi / _TURNS if turn else 0.0
            far = _GAP + ring * 9
            yield Label(x + (far + half) * math.cos(angle), y + (far + _LINE / 2) * math.sin(angle))


def _fitting(label: Label, half: float, width: float, height: float) -> Label:
    x = min(max(label.x, half + 2), width - half - 2)
    return Label(x, min(max(label.y, _LINE / 2), height - _LINE / 2))


def _box(label: Label, half: float) -> tuple[float, float, float, float]:
    return label.x - half, label.y - _LINE / 2, label.x + half, label.y + _LINE / 2


def _covers(box: tuple[float, float, float, float], taken: Sequence[tuple[float, float, float, float]]) -> bool:
    left, top, right, bottom = box
    return any(left < r and right > ll and top < b and bottom > t for ll, t, r, b in taken)
