"""What the gates of an MoE choose: tables in the terminal, a page, and a picture of layers by experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.cli.heat.page import cell, percent, whole_page
from mediator_cli.cli.heat.style import STEPS
from mediator_cli.cli.heat.words import escaped
from mediator_cli.cli.output import print_table, say, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.text import Text

    from mediator_cli.moe.gates.look import GateLook
    from mediator_cli.moe.gates.report import GateReport

# From no weight to all of it, dark to light text kept readable on each.
_SHADES = ((0.0, "#f7fbff"), (0.2, "#d2e3f3"), (0.4, "#9ac8e0"), (0.6, "#fdd49e"), (0.8, "#fc8d59"), (0.9, "#d7301f"))
_MOST_SHOWN = 8
"""Experts that get a column of their own in the terminal."""


def print_fit(report: GateReport) -> None:
    """Print how gates came out, layer by layer."""
    of = f"from {report.n_prompts} prompts ({report.n_tokens} tokens)" if report.n_prompts else "drawn at random"
    say(f"gates by {report.method}, temperature {report.temperature:g}, {of}")
    if report.agreement is None:
        say("nothing was measured: no prompts were read")
        return
    rows = [
        (str(each.layer), _share(each.agreement), _share(each.weight), _number(each.entropy), f"{each.condition:.3g}")
        for each in report.layers
    ]
    print_table(("layer", "own first#", "own weight#", "entropy#", "condition#"), rows)
    say("own: of the expert that a token's prompt belongs to: first choices, and mean weight after top-k, in %")
    say("entropy in nats; condition: large where the gates of two experts are nearly the same")
    where = "on prompts kept for this" if report.held_out else "on the same prompts, for want of others"
    say(f"mean over layers: {percent(report.agreement)} of tokens go first to their prompt's expert, measured {where}")


def print_look(look: GateLook) -> None:
    """Print what each task chooses over all layers, then what each layer chooses."""
    say(f"{look.n_prompts} prompts, {len(look.layers)} layers with {len(look.experts)} experts, {look.top_k} per token")
    shown = look.experts[:_MOST_SHOWN]
    first, weight = look.first.mean(axis=0), look.weight.mean(axis=0)
    rows = [
        (task, *(_pair(first[at, n], weight[at, n]) for n in range(len(shown))), _number(look.entropy[:, at].mean()))
        for at, task in enumerate(look.tasks)
    ]
    load = look.load.mean(axis=0)
    rows.append(("load", *(_share(load[n]) for n in range(len(shown))), ""))
    print_table(("task", *(f"{name}#" for name in shown), "entropy#"), rows)
    say("first choices / mean weight in %, over layers and tokens; load: mean weight over tasks; entropy in nats")
    if len(shown) < len(look.experts):
        say(f"{len(look.experts) - len(shown)} more experts: see --json or --plot")
    print_table(("layer", *look.tasks, *(["own#"] if look.own() is not None else [])), _layer_rows(look))
    say("what each task chooses first in a layer, and the share of its tokens that do, in %")
    own = look.own()
    if own is not None:
        say(f"own: tokens that go first to the expert named like their task; mean over layers {percent(own.mean())}")


def _layer_rows(look: GateLook) -> Iterator[tuple[str | Text, ...]]:
    from rich.text import Text

    own = look.own()
    for at, layer in enumerate(look.layers):
        cells = []
        for first in look.first[at]:
            best = int(np.argmax(first))
            shade = next(colour for limit, colour in reversed(_SHADES) if first[best] >= limit)
            cells.append(Text(f"{look.experts[best]} {100 * first[best]:.0f}", style=f"black on {shade}"))
        yield (str(layer), *cells, *([] if own is None else [_share(own[at])]))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _pair(first: float, weight: float) -> str:
    return f"{100 * first:.0f} / {100 * weight:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def draw_gates(file: Path, look: GateLook) -> None:
    """Draw mean weights, layers by experts for each task, in the form that the file's name asks for."""
    if file.suffix == ".html":
        write_text(file, gates_page(look))
    else:
        _draw(file, look)


def gates_page(look: GateLook) -> str:
    """Draw the page: for each task a table of layers by experts with the mean weight of each."""
    own = look.own()
    told = "" if own is None else f" {percent(float(own.mean()))} of tokens go first to the expert of their task."
    parts = [
        "<header><h1>What the gates choose</h1>",
        f'<p class="names">{escaped(", ".join(look.experts))}; {look.top_k} of {len(look.experts)} for each token.</p>',
        f'<p class="soft">Mean weight of each expert on the prompts of a task, layer by layer.{told}</p></header>',
        *(_section(look, at) for at in range(len(look.tasks))),
        "<footer>Drawn by <code>mediator gates --plot</code>. This page loads nothing.</footer>",
    ]
    return whole_page(f"Gates of {', '.join(look.experts)}", parts)


def _section(look: GateLook, task: int) -> str:
    name = escaped(look.tasks[task])
    shades = "".join(f'<b class="s{n}"></b>' for n in range(STEPS))
    heads = "".join(f'<th scope="col">{escaped(expert)}</th>' for expert in look.experts)
    rows = "".join(_row(look, task, at) for at in range(len(look.layers)))
    return (
        f"<section><h2>{name}</h2>"
        f'<div class="scale" aria-hidden="true">0 %<i>{shades}</i>100 %</div>'
        f'<div class="wide" tabindex="0" role="region" aria-label="Weights on {name}"><table>'
        f'<caption class="unseen">Mean weight in per cent, a row for each layer, a column for each expert</caption>'
        f'<thead><tr><th scope="col">layer</th>{heads}<th scope="col">entropy, nats</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _row(look: GateLook, task: int, at: int) -> str:
    layer = look.layers[at]
    weights = zip(look.experts, look.weight[at, task].tolist(), strict=True)
    cells = "".join(cell(f"layer {layer}, {expert}", weight, (0.0, 1.0)) for expert, weight in weights)
    return f'<tr><th scope="row">{layer}</th>{cells}<td class="score">{look.entropy[at, task]:.2f}</td></tr>'


def _draw(file: Path, look: GateLook) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    n, wide = len(look.tasks), max(1.6, 0.45 * len(look.experts))
    height = max(2.5, 0.2 * len(look.layers) + 1.6)
    size = (wide * n + 1.6, height)
    figure, panels = plt.subplots(1, n, figsize=size, sharey=True, layout="constrained", squeeze=False)
    for at, panel in enumerate(panels[0]):
        picture = panel.imshow(look.weight[:, at], aspect="auto", cmap="YlOrRd", vmin=0, vmax=1)
        panel.set_xticks(range(len(look.experts)), look.experts, rotation=60, ha="right")
        panel.set_title(look.tasks[at], fontsize=10)
    panels[0][0].set_yticks(range(len(look.layers)), look.layers, fontsize=7)
    panels[0][0].set_ylabel("layer")
    figure.colorbar(picture, ax=panels[0].tolist(), label="mean weight", shrink=0.6)
    figure.suptitle("Experts (across) that the gates of each layer choose, by task")
    figure.savefig(file, bbox_inches="tight", dpi=120)
    plt.close(figure)
