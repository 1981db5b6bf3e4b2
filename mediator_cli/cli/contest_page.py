"""A contest as one HTML page: charts drawn as SVG, the table, the conclusions; no script, nothing from the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.cli.contest_charts import COLOURS, SHAPES, Y_NAME, curves, scatters
from mediator_cli.cli.heat.page import whole_page
from mediator_cli.cli.heat.words import escaped
from mediator_cli.cli.scatter import linear_axis, place_labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.cli.contest_charts import Chart, Curve
    from mediator_cli.cli.scatter import Axis, Spot
    from mediator_cli.compare.contest_report import ContestReport

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 1000, 520, 46, 44, 12
_SMALL, _LOW = 320, 260
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")


def contest_page(report: ContestReport, recipe: str = "") -> str:
    """Draw the page; `recipe` is the recipe's text."""
    from mediator_cli.compare.contest_table import cells, notes

    own = report.conditions
    parts = [
        f"<style>{_style()}</style>",
        "<header><h1>Ensemble, merge or route?</h1>",
        f'<p class="names">{len(own.experts)} experts of {escaped(own.base)}: {escaped(", ".join(own.experts))}.</p>',
        "".join(f"<p><b>{escaped(each.question)}</b> {escaped(each.answer)}.</p>" for each in report.conclusions),
        "</header>",
        *(_section(chart) for chart in scatters(report)),
        *_curve_section(report),
        _table(*cells(report)),
        '<section><h2>What the numbers are</h2>' + "".join(f"<p>{escaped(line)}</p>" for line in notes(report)),
        "</section>",
        f"<details><summary>Recipe</summary><pre>{escaped(recipe)}</pre></details>" if recipe else "",
        "<footer>Drawn by <code>mediator compare --plot</code>. This page loads nothing.</footer>",
    ]
    return whole_page("Ensemble, merge or route?", [part for part in parts if part])


def _style() -> str:
    light = "".join(f"--{group}:{pair[0]};" for group, pair in COLOURS.items())
    dark = "".join(f"--{group}:{pair[1]};" for group, pair in COLOURS.items())
    groups = "".join(
        f".{group} .mark,.{group}.curve{{stroke:var(--{group})}}.{group} .mark{{fill:var(--{group})}}" for group in COLOURS
    )
    return (
        f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{groups}"
        ".bar{stroke:currentColor;stroke-opacity:.35}.lead{stroke:var(--soft);stroke-opacity:.5;stroke-width:.7}"
        ".front{fill:none;stroke:var(--ink);stroke-opacity:.55;stroke-width:1.2;stroke-dasharray:5 4}"
        "svg text.name{fill:var(--ink);font-size:11px}.curve{fill:none;stroke-width:2}"
        "svg{max-width:100%;height:auto}.small{display:flex;flex-wrap:wrap;gap:16px}"
    )


def _section(chart: Chart) -> str:
    groups = dict.fromkeys(spot.kind for spot in chart.spots)
    key = "".join(
        f'<li><svg width="14" height="14" class="{g}" aria-hidden="true">{_mark(SHAPES[g], 7, 7)}</svg>{escaped(g)}</li>'
        for g in groups
    )
    key += "<li>dashed: no other is both cheaper and better; bars: ± standard error</li>"
    return f'<section><h2>{escaped(chart.title)}</h2><div class="wide">{chart_svg(chart)}</div><ul class="key">{key}</ul></section>'


def chart_svg(chart: Chart) -> str:
    """Draw a scatter with its names, error bars and front."""
    right, floor = _WIDTH - 10, _HEIGHT - _BOTTOM

    def x(value: float) -> float:
        return _LEFT + chart.x.share(value) * (right - _LEFT)

    def y(value: float) -> float:
        return floor - chart.y.share(min(max(value, chart.y.low), chart.y.high)) * (floor - _TOP)

    parts = [*_grid(chart.x, chart.y, x, y, right, floor), _names(chart.x_name, right, floor)]
    front = sorted((spot.x, spot.y) for spot in chart.spots if spot.is_front)
    parts.append(f'<polyline class="front" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in front)}"/>')
    points = [(x(spot.x), y(spot.y)) for spot in chart.spots]
    labels = place_labels([spot.name for spot in chart.spots], points, _WIDTH, floor)
    for spot, (px, py), label in zip(chart.spots, points, labels, strict=True):
        told = f"{spot.name}: {spot.y:.1f} %, {spot.x:.3g} {chart.x_name}"
        bar = ""
        if spot.error:
            bar = f'<line class="bar" x1="{px:.1f}" x2="{px:.1f}" y1="{y(spot.y - spot.error):.1f}" y2="{y(spot.y + spot.error):.1f}"/>'
        parts.append(
            f'<g class="point {spot.kind}"><title>{escaped(told)}</title>{bar}{_mark(SHAPES[spot.kind], px, py)}'
            f'<line class="lead" x1="{px:.1f}" y1="{py:.1f}" x2="{label.x:.1f}" y2="{label.y:.1f}" '
            f'visibility="{"visible" if _is_far(px, py, label.x, label.y, spot) else "hidden"}"/>'
            f'<text class="name" x="{label.x:.1f}" y="{label.y + 4:.1f}" text-anchor="middle">{escaped(spot.name)}</text></g>'
        )
    said = f"{chart.title}: {len(chart.spots)} strategies"
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{escaped(said)}">{"".join(parts)}</svg>'


def _is_far(px: float, py: float, lx: float, ly: float, spot: Spot) -> bool:
    return abs(ly - py) > 18 or abs(lx - px) > len(spot.name) * 3.2 + 18


def _grid(x_axis: Axis, y_axis: Axis, x: object, y: object, right: float, floor: float) -> Iterator[str]:
    for tick in y_axis.ticks:
        at = y(tick)  # type: ignore[operator]
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for tick in x_axis.ticks:
        at = x(tick)  # type: ignore[operator]
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{floor}"/>'
        yield f'<text x="{at:.1f}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>'


def _names(x_name: str, right: float, floor: float) -> str:
    return (
        f'<text x="{(right + _LEFT) / 2:.0f}" y="{floor + 34}" text-anchor="middle">{escaped(x_name)}</text>'
        f'<text x="{_LEFT + 4}" y="{_TOP + 10}">{escaped(Y_NAME)}</text>'
    )


def _mark(shape: str, x: float, y: float) -> str:
    if shape == "disc":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if shape == "square":
        return f'<rect class="mark" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    ring = [(0, -5), (5, 4), (-5, 4)] if shape == "triangle" else [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)]
    return f'<polygon class="mark" points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in ring)}"/>'


def _curve_section(report: ContestReport) -> Iterator[str]:
    kinds = list(dict.fromkeys(each.kind for each in report.selection))
    if not kinds:
        return
    drawn = "".join(f"<figure><figcaption>{kind}</figcaption>{_curves(curves(report.selection, kind), kind)}</figure>" for kind in kinds)
    yield f'<section><h2>How many experts are enough?</h2><p class="soft">{escaped(Y_NAME)}, by the number of experts kept.</p><div class="small">{drawn}</div></section>'


def _curves(lines: Sequence[Curve], kind: str) -> str:
    ys = [y for line in lines for _, y in line.points]
    ks = sorted({k for line in lines for k, _ in line.points})
    axis, floor, right = linear_axis(ys, least=2), _LOW - 40, _SMALL - 70

    def x(k: int) -> float:
        return 40 + (ks.index(k) + 0.5) / len(ks) * (right - 40)

    def y(value: float) -> float:
        return floor - axis.share(value) * (floor - 10)

    parts = []
    for tick in axis.ticks:
        parts.append(f'<line class="grid" x1="40" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="34" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts += [f'<text x="{x(k):.1f}" y="{floor + 16}" text-anchor="middle">{k}</text>' for k in ks]
    ends = place_labels([line.name for line in lines], [(x(line.points[-1][0]), y(line.points[-1][1])) for line in lines], _SMALL, floor)
    for at, (line, end) in enumerate(zip(lines, ends, strict=True)):
        path = " ".join(f"{x(k):.1f},{y(value):.1f}" for k, value in line.points)
        parts.append(f'<polyline class="curve {kind}" stroke-dasharray="{_DASHES[at % len(_DASHES)]}" points="{path}"/>')
        parts.append(f'<text class="name" x="{end.x:.1f}" y="{end.y + 4:.1f}" text-anchor="middle">{escaped(line.name)}</text>')
    parts.append(f'<text x="{(40 + right) / 2:.0f}" y="{floor + 34}" text-anchor="middle">experts kept</text>')
    return f'<svg width="{_SMALL}" height="{_LOW}" viewBox="0 0 {_SMALL} {_LOW}" role="img" aria-label="{escaped(kind)}">{"".join(parts)}</svg>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col">{escaped(column.rstrip("#"))}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>' + "".join(
            f'<td class="{"number" if column.endswith("#") else "what"}">{escaped(cell)}</td>'
            for column, cell in zip(columns[1:], row[1:], strict=True)
        ) + "</tr>"
        for row in rows
    )  # fmt: skip
    return f'<section><h2>All strategies</h2><div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></section>'
