"""The score of each layer as a small SVG picture: marks that differ in shape as in colour, and the threshold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mediator_cli.cli.heat.words import escaped, row_label

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.pipeline.conflicts import Preview

_LEFT, _RIGHT, _TOP, _FLOOR = 46, 52, 14, 190
_LEVEL, _TURNED = 30, 60
"""Room below the floor for labels that lie level, and for those that have to be turned."""
_WIDTH, _NARROWEST, _WIDEST = 960, 18, 64
_LONGEST_LABEL = 8


def mark(what: str, x: float, y: float) -> str:
    """Draw a mark: a disc where routed, a hollow square where averaged."""
    if what == "route":
        return f'<circle class="mark" cx="{x:g}" cy="{y:g}" r="5"/>'
    return f'<rect class="mark" x="{x - 4:g}" y="{y - 4:g}" width="8" height="8" rx="1"/>'


def score_chart(preview: Preview) -> str:
    """Draw every unit's score above its layer, with the limit of the rule where it has one.

    Embeddings and norms outside the layers are left to the table: their scores would flatten all others.
    """
    inside = [at for at, row in enumerate(preview.table.values) if any(value is not None for value in row)]
    chosen = inside or range(len(preview.table.rows))
    rows = [preview.table.rows[at] for at in chosen]
    units = [preview.units[at] for at in chosen]
    step = min(_WIDEST, max(_NARROWEST, (_WIDTH - _LEFT - _RIGHT) / max(1, len(rows))))
    width = _LEFT + step * len(rows) + _RIGHT
    low, high, ticks = axis([score for row in units for _, score, _ in row], preview.limit)

    def x(at: int) -> float:
        return _LEFT + step * (at + 0.5)

    def y(score: float) -> float:
        return _TOP + (high - score) / (high - low) * (_FLOOR - _TOP)

    right = width - _RIGHT
    parts = [_gridline(tick, y(tick), right) for tick in ticks]
    if all(len(row) == 1 for row in units):
        path = " ".join(f"{x(at):.1f},{y(row[0][1]):.1f}" for at, row in enumerate(units))
        parts.append(f'<polyline class="path" points="{path}"/>')
    if preview.limit is not None:
        line = y(preview.limit)
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{right:.1f}" y1="{line:.1f}" y2="{line:.1f}"/>')
        told = f"{100 * preview.limit:.1f} %"
        parts.append(f'<text class="told" x="{right + 4:.1f}" y="{line + 4:.1f}">{told}</text>')
    for at, row in enumerate(units):
        parts.append(_label(row_label(rows[at], rows), x(at), step))
        parts += [_point(unit, score, what, x(at), y(score)) for unit, score, what in row]
    height = _FLOOR + (_LEVEL if all(_fits(row_label(row, rows), step) for row in rows) else _TURNED)
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    return f'<svg {size} role="img" aria-label="{escaped(_told(units, preview.limit))}">{"".join(parts)}</svg>'


def axis(scores: list[float], limit: float | None) -> tuple[float, float, list[float]]:
    """Choose the ends of the axis and round ticks; marks, unlike bars, may leave zero out.

    >>> axis([0.31, 0.42], 0.35)
    (0.3, 0.45, [0.3, 0.35, 0.4, 0.45])
    """
    shown = [*scores, *([] if limit is None else [limit])] or [0.0]
    span = max(max(shown) - min(shown), 0.02)
    tick = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if span / step <= 5)
    first, last = math.floor(min(shown) / tick + 1e-9), math.ceil(max(shown) / tick - 1e-9)
    last = max(last, first + 1)
    ticks = [round(n * tick, 6) for n in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _gridline(tick: float, y: float, right: float) -> str:
    line = f'<line class="grid" x1="{_LEFT}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:g} %</text>'


def _label(text: str, x: float, step: float) -> str:
    y = _FLOOR + 20
    if _fits(text, step):
        return f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escaped(text)}</text>'
    short = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
    turned = f'transform="rotate(-50 {x:.1f} {y})"'
    return f'<text x="{x + 3:.1f}" y="{y - 2}" text-anchor="end" {turned}>{escaped(short)}</text>'


def _fits(text: str, step: float) -> bool:
    return len(text) * 7 < step


def _point(unit: str, score: float, what: str, x: float, y: float) -> str:
    told = escaped(f"{unit}: {100 * score:.2f} %, {what}")
    hit = f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="11"/>'
    return f'<g class="point {what}"><title>{told}</title>{hit}{mark(what, round(x, 1), round(y, 1))}</g>'


def _told(rows: Sequence[Sequence[tuple[str, float, str]]], limit: float | None) -> str:
    decisions = [decision for row in rows for _, _, decision in row]
    threshold = "" if limit is None else f", threshold {100 * limit:.1f} per cent"
    return f"Scores: {len(decisions)} units, {decisions.count('route')} of them routed{threshold}"
