"""The conflict heat map as one HTML page: no script, nothing from the network, every name escaped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mediator_cli.cli.heat.chart import mark, score_chart
from mediator_cli.cli.heat.style import STEPS, style_sheet
from mediator_cli.cli.heat.words import denoise_words, escaped, row_label, rule_words, short_kind
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.bundle.conflict_report import ConflictReport
    from mediator_cli.pipeline.conflicts import Preview
    from mediator_cli.plan.model import Plan

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_NARROWEST = 0.1
_ROUNDING = 1e-9
_MEANING = {
    "sign": "The share of parameters that two experts moved in opposite directions, mean over pairs of experts.",
    "any_sign": "The share of parameters that any two experts moved in opposite directions.",
    "cosine": "How far the experts' deltas point apart: half of one less their cosine, mean over pairs of experts.",
}


def heat_page(plan: Plan, report: ConflictReport, preview: Preview) -> str:
    """Draw the page: score of each layer, heat map as a table of numbers, sources and recipe."""
    title = f"Conflict of {', '.join(report.experts)}"
    parts = [
        "<header>",
        f"<h1>Where the experts disagree{'' if report.sample is None else ': an estimate'}</h1>",
        f'<p class="names">{escaped(", ".join(report.experts))}, tuned from {escaped(plan.loaded.recipe.base)}.</p>',
        f'<p class="soft">{escaped(_MEANING.get(preview.measure, ""))} 0 % = all signs agree, 50 % = as in independent '
        f"random changes. {escaped(denoise_words(report.denoise))}{_estimate(report)}</p>",
        _facts(plan, preview),
        "</header>",
        _chart(preview),
        _heat_map(preview),
        _sources(plan, report),
        _recipe(plan),
        "<footer>Drawn by <code>mediator analyze-conflicts --plot</code>. This page loads nothing.</footer>",
    ]
    return whole_page(title, parts)


def whole_page(title: str, parts: Sequence[str]) -> str:
    """Put the parts of a page in a document that loads nothing; `title` is any text."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escaped(title)}</title><style>{style_sheet()}</style>"
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _estimate(report: ConflictReport) -> str:
    """Say, of an estimate, what it rests on and how far the least sure score may be off."""
    if report.sample is None:
        return ""
    widest = max((bound.sign for bound in report.sample.bounds.values()), default=0.0)
    return (
        f" Estimated from {percent(report.sample.share)} of each tensor: by sign, the score of each unit is right "
        f"within ±{percent(widest)} or less, in 95 of 100 samples."
    )


def percent(value: float) -> str:
    """Write a share in per cent with one digit."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _facts(plan: Plan, preview: Preview) -> str:
    units = [unit for row in preview.units for unit in row]
    routed = sum(decision == "route" for _, _, decision in units)
    scored = [(name, score) for name, score, _ in units if name in plan.candidates] or [("", 0.0)]
    highest = max(scored, key=lambda pair: pair[1])
    mean = sum(score for _, score in scored) / len(scored)
    limit = "none" if preview.limit is None else percent(preview.limit)
    facts = (
        ("routed", f"{routed} of {len(units)}", f"units, one for each {plan.loaded.recipe.conflict.unit}"),
        ("mean score", percent(mean), "of what may be routed"),
        ("highest score", percent(highest[1]), highest[0]),
        ("threshold", limit, rule_words(plan.loaded.recipe.assign)),
    )
    cells = (f"<div><dt>{n}</dt><dd>{escaped(v)}<small>{escaped(more)}</small></dd></div>" for n, v, more in facts)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _chart(preview: Preview) -> str:
    keys = [("route", "routed: kept for each expert"), ("average", "averaged: one for all experts")]
    marks = "".join(
        f'<li><svg width="16" height="16" class="{what}" aria-hidden="true">{mark(what, 8, 8)}</svg>{told}</li>'
        for what, told in keys
    )
    if preview.limit is not None:
        line = '<line class="limit" x1="0" x2="24" y1="8" y2="8"/>'
        marks += f'<li><svg width="24" height="16" aria-hidden="true">{line}</svg>threshold of the rule</li>'
    return (
        "<section><h2>Score of each layer</h2>"
        '<p class="soft">Point at a mark for its number; the table below has them all.</p>'
        f'<div class="wide" tabindex="0" role="region" aria-label="Chart of scores">{score_chart(preview)}</div>'
        f'<ul class="key">{marks}</ul></section>'
    )


def _heat_map(preview: Preview) -> str:
    table = preview.table
    low, high = scale = scale_of(preview)
    start = f"{100 * low:.0f} % and less" if low else "0 %"
    shades = "".join(f'<b class="s{n}"></b>' for n in range(STEPS))
    heads = "".join(
        f'<th scope="col" title="{escaped(kind)}">{escaped(short_kind(kind))}</th>' for kind in table.columns
    )
    return (
        "<section><h2>Conflict by layer and kind of module</h2>"
        f'<div class="scale" aria-hidden="true">{start}<i>{shades}</i>{100 * high:.0f} %</div>'
        '<div class="wide" tabindex="0" role="region" aria-label="Table of conflict"><table>'
        '<caption class="unseen">Conflict in per cent, a row for each layer, a column for each kind of module</caption>'
        f'<thead><tr><th scope="col">layer</th>{heads}<th scope="col">score, %</th><th scope="col">assignment</th></tr>'
        f"</thead><tbody>{''.join(_rows(preview, scale))}</tbody></table></div></section>"
    )


def scale_of(preview: Preview) -> tuple[float, float]:
    """Return where the colours begin and end, in steps of 5 %: most modules differ by less than they do from norms.

    The lowest quarter of all cells may lie below, and has the first shade then.
    """
    values = sorted(value for row in preview.table.values for value in row if value is not None) or [0.0]
    low = math.floor(values[len(values) // 4] * 20 + _ROUNDING) / 20
    high = math.ceil(values[-1] * 20 - _ROUNDING) / 20
    return low, max(high, low + _NARROWEST)


def _rows(preview: Preview, scale: tuple[float, float]) -> Iterator[str]:
    table = preview.table
    for at, row in enumerate(table.rows):
        label = row_label(row, table.rows)
        pairs = zip(table.columns, table.values[at], strict=True)
        cells = "".join(cell(f"{label} {kind}", value, scale) for kind, value in pairs)
        score, decision = preview.scores[at], preview.decisions[at]
        what = decision.split()[0]
        shown = "" if score is None else f"{100 * score:.1f}"
        symbol = "●" if what == "route" else "○"
        yield (
            f'<tr><th scope="row" title="{escaped(row)}">{escaped(label)}</th>{cells}<td class="score">{shown}</td>'
            f'<td class="what {what}"><span aria-hidden="true">{symbol} </span>{escaped(decision)}</td></tr>'
        )


def cell(label: str, value: float | None, scale: tuple[float, float]) -> str:
    """Write a share as a table cell in per cent, shaded by where it lies on the scale; None is a dot."""
    if value is None:
        return '<td class="none"><span aria-hidden="true">·</span><span class="unseen">none</span></td>'
    low, high = scale
    shade = min(STEPS - 1, max(0, int((value - low) / (high - low) * STEPS)))
    return f'<td class="cell s{shade}" data-tip="{escaped(label)}: {100 * value:.2f} %">{100 * value:.0f}</td>'


def _sources(plan: Plan, report: ConflictReport) -> str:
    written = {"base": plan.loaded.recipe.base, **{e.name: e.model for e in plan.loaded.recipe.experts}}
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(written.get(name, ""))}</td>'
        f'<td class="number">{human_bytes(sum(file.bytes for file in files))}</td>'
        f"<td><code>{escaped(', '.join(file.digest[:12] for file in files[:3]))}"
        f"{' …' if len(files) > 3 else ''}</code></td></tr>"
        for name, files in report.sources.items()
    )
    heads = '<th scope="col">source</th><th scope="col">from</th><th scope="col" class="number">weights</th>'
    heads += '<th scope="col">digest begins</th>'
    table = f'<table class="list"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<section><h2>Measured on</h2><div class="wide">{table}</div></section>'


def _recipe(plan: Plan) -> str:
    changes = "".join(f"\n--set {change}" for change in plan.loaded.changes)
    text = escaped(plan.loaded.text.rstrip() + changes)
    return f"<details><summary>Recipe {escaped(str(plan.loaded.path))}</summary><pre>{text}</pre></details>"
