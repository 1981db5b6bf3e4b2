"""The charts of a contest as SVG: scatters with names, error bars and the front, and curves by experts kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.cli.contest_charts import SHAPES, Y_NAME
from mediator_cli.cli.heat.words import escaped
from mediator_cli.cli.scatter import Axis, linear_axis, place_labels, spread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.cli.contest_charts import Chart, Curve
    from mediator_cli.cli.scatter import Label, Spot

_LETTER = 3.2
"""Half the width of a letter of a name, in pixels."""
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")


@dataclass(frozen=True)
class _Frame:
    """A canvas of a size, and the field inside of it that values are drawn in."""

    width: float
    height: float
    left: float
    right: float
    top: float
    floor: float

    def x(self, share: float) -> float:
        """Turn a share of the axis into pixels from the left."""
        return self.left + share * (self.right - self.left)

    def y(self, axis: Axis, value: float) -> float:
        """Turn a value into pixels from the top; what is beyond the axis stops at its end."""
        return self.floor - axis.share(min(max(value, axis.low), axis.high)) * (self.floor - self.top)


_WIDE = _Frame(1000, 520, 46, 990, 12, 476)
_SMALL = _Frame(320, 260, 40, 220, 10, 220)


def chart_svg(chart: Chart) -> str:
    """Draw a scatter."""
    points = [(_WIDE.x(chart.x.share(spot.x)), _WIDE.y(chart.y, spot.y)) for spot in chart.spots]
    labels = place_labels([spot.name for spot in chart.spots], points, _WIDE.width, _WIDE.floor)
    parts = [*_rows(chart.y, _WIDE), *_columns(chart.x), _axis_names(chart.x_name), _front(chart, points)]
    parts += [_point(chart, *each) for each in zip(chart.spots, points, labels, strict=True)]
    return _svg(_WIDE, f"{chart.title}: {len(chart.spots)} strategies", parts)


def curves_svg(lines: Sequence[Curve], kind: str) -> str:
    """Draw accuracy by the number of experts kept, a line for each selector, named at its end."""
    axis = linear_axis([value for line in lines for _, value in line.points], least=2, most=100)
    sizes = sorted({k for line in lines for k, _ in line.points})
    xs = {k: _SMALL.x((at + 0.5) / len(sizes)) for at, k in enumerate(sizes)}
    parts = [*_rows(axis, _SMALL), _text(_SMALL.x(0.5), _SMALL.floor + 34, "experts kept")]
    parts += [_text(x, _SMALL.floor + 16, str(k)) for k, x in xs.items()]
    ends = spread([_SMALL.y(axis, line.points[-1][1]) for line in lines], _SMALL.floor)
    for at, (line, end) in enumerate(zip(lines, ends, strict=True)):
        path = " ".join(f"{xs[k]:.1f},{_SMALL.y(axis, value):.1f}" for k, value in line.points)
        dash = _DASHES[at % len(_DASHES)]
        parts.append(f'<polyline class="curve {kind}" stroke-dasharray="{dash}" points="{path}"/>')
        parts.append(f'<text class="name" x="{_SMALL.right + 4}" y="{end + 4:.1f}">{escaped(line.name)}</text>')
    return _svg(_SMALL, kind, parts)


def mark_svg(shape: str, x: float, y: float) -> str:
    """Draw the mark of a group."""
    if shape == "disc":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if shape == "square":
        return f'<rect class="mark" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    ring = [(0, -5), (5, 4), (-5, 4)] if shape == "triangle" else [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)]
    return f'<polygon class="mark" points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in ring)}"/>'


def _svg(frame: _Frame, label: str, parts: Sequence[str]) -> str:
    size = f'width="{frame.width:g}" height="{frame.height:g}" viewBox="0 0 {frame.width:g} {frame.height:g}"'
    return f'<svg {size} role="img" aria-label="{escaped(label)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rows(axis: Axis, frame: _Frame) -> Iterator[str]:
    for tick in axis.ticks:
        y = frame.y(axis, tick)
        yield _line("grid", frame.left, y, frame.right, y)
        yield _text(frame.left - 6, y + 4, f"{tick:g}", "end")


def _columns(axis: Axis) -> Iterator[str]:
    for tick in axis.ticks:
        x = _WIDE.x(axis.share(tick))
        yield _line("grid", x, _WIDE.top, x, _WIDE.floor)
        yield _text(x, _WIDE.floor + 16, f"{tick:g}")


def _axis_names(x_name: str) -> str:
    return _text(_WIDE.x(0.5), _WIDE.floor + 34, x_name) + _text(_WIDE.left + 4, _WIDE.top + 10, Y_NAME, "start")


def _front(chart: Chart, points: Sequence[tuple[float, float]]) -> str:
    own = sorted(point for spot, point in zip(chart.spots, points, strict=True) if spot.is_front)
    return f'<polyline class="front" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in own)}"/>'


def _point(chart: Chart, spot: Spot, at: tuple[float, float], label: Label) -> str:
    """Draw a point with its error, its name, and a line between them where they lie apart."""
    (x, y), parts = at, [f"<title>{escaped(f'{spot.name}: {spot.y:.1f} %, {spot.x:.3g} {chart.x_name}')}</title>"]
    if spot.error:
        parts.append(_line("bar", x, _WIDE.y(chart.y, spot.y - spot.error), x, _WIDE.y(chart.y, spot.y + spot.error)))
    if abs(label.y - y) > 18 or abs(label.x - x) > len(spot.name) * _LETTER + 18:
        parts.append(_line("lead", x, y, label.x, label.y))
    name = (
        f'<text class="name" x="{label.x:.1f}" y="{label.y + 4:.1f}" text-anchor="middle">{escaped(spot.name)}</text>'
    )
    return f'<g class="point {spot.kind}">{"".join(parts)}{mark_svg(SHAPES[spot.kind], x, y)}{name}</g>'
