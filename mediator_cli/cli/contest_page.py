"""A contest as one HTML page: conclusions, charts and the table; no script, nothing from the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.cli.contest_charts import COLOURS, SHAPES, Y_NAME, curves, scatters
from mediator_cli.cli.contest_svg import chart_svg, curves_svg, mark_svg
from mediator_cli.cli.heat.page import whole_page
from mediator_cli.cli.heat.words import escaped
from mediator_cli.compare.contest_table import cells, notes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.cli.contest_charts import Chart
    from mediator_cli.compare.contest_report import ContestReport

_TITLE = "Ensemble, merge or route?"
_LAYOUT = (
    ".bar{stroke:currentColor;stroke-opacity:.35}.lead{stroke:var(--soft);stroke-opacity:.5;stroke-width:.7}"
    ".front{fill:none;stroke:var(--ink);stroke-opacity:.55;stroke-width:1.2;stroke-dasharray:5 4}"
    "svg text.name{fill:var(--ink);font-size:11px}.curve{fill:none;stroke-width:2}svg{max-width:100%;height:auto}"
    ".small{display:flex;flex-wrap:wrap;gap:16px}figure{margin:0}"
)


def contest_page(report: ContestReport, recipe: str = "") -> str:
    """Draw the page; `recipe` is the recipe's text."""
    own = report.conditions
    parts = [
        f"<style>{_style()}</style>",
        f"<header><h1>{_TITLE}</h1>",
        f'<p class="names">{len(own.experts)} experts of {escaped(own.base)}: {escaped(", ".join(own.experts))}.</p>',
        *(f"<p><b>{escaped(each.question)}</b> {escaped(each.answer)}.</p>" for each in report.conclusions),
        "</header>",
        *(
            _section(chart.title, f'<div class="wide">{chart_svg(chart)}</div>{_key(chart)}')
            for chart in scatters(report)
        ),
        *_curve_section(report),
        _section("All strategies", _table(*cells(report))),
        _section("What the numbers are", "".join(f"<p>{escaped(line)}</p>" for line in notes(report))),
        *([f"<details><summary>Recipe</summary><pre>{escaped(recipe)}</pre></details>"] if recipe else []),
        "<footer>Drawn by <code>mediator compare --plot</code>. This page loads nothing.</footer>",
    ]
    return whole_page(_TITLE, parts)


def _style() -> str:
    light, dark = ("".join(f"--{group}:{pair[at]};" for group, pair in COLOURS.items()) for at in (0, 1))
    groups = "".join(
        f".{group} .mark,.{group}.curve{{stroke:var(--{group})}}.{group} .mark{{fill:var(--{group})}}"
        for group in COLOURS
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{groups}{_LAYOUT}"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>{body}</section>"


def _key(chart: Chart) -> str:
    """Say what marks and lines mean."""
    marks = {group: mark_svg(SHAPES[group], 7, 7) for group in dict.fromkeys(spot.kind for spot in chart.spots)}
    items = [
        f'<li><svg width="14" height="14" class="{group}" aria-hidden="true">{mark}</svg>{escaped(group)}</li>'
        for group, mark in marks.items()
    ]
    items.append("<li>dashed: no other is both cheaper and better; bars: ± standard error</li>")
    return f'<ul class="key">{"".join(items)}</ul>'


def _curve_section(report: ContestReport) -> Iterator[str]:
    kinds = list(dict.fromkeys(each.kind for each in report.selection))
    known = {kind: curves(report.selection, kind) for kind in kinds}
    drawn = [
        f"<figure><figcaption>{kind}</figcaption>{curves_svg(lines, kind)}</figure>"
        for kind, lines in known.items()
        if lines
    ]
    if drawn:
        told = f'<p class="soft">{escaped(Y_NAME)}, by the number of experts kept.</p>'
        yield _section("How many experts are enough?", f'{told}<div class="small">{"".join(drawn)}</div>')


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col">{escaped(column.rstrip("#"))}</th>' for column in columns)
    kinds = ["number" if column.endswith("#") else "what" for column in columns[1:]]
    body = ""
    for name, *values in rows:
        own = zip(kinds, values, strict=True)
        row = "".join(f'<td class="{kind}">{escaped(value)}</td>' for kind, value in own)
        body += f'<tr><th scope="row">{escaped(name)}</th>{row}</tr>'
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
