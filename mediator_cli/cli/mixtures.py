"""Mixtures on the command line: read from options, shown beside an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.runtime.combine import Combine

ExpertOption = Annotated[
    str | None,
    typer.Option("--expert", metavar="NAME", help="Answer with this expert, or with `dense`.", show_default=False),
]
MixtureOption = Annotated[
    str | None,
    typer.Option("--mixture", metavar="A=0.7,B=0.3", help="Answer with these weights.", show_default=False),
]


CombineOption = Annotated[
    str | None,
    typer.Option(
        "--combine",
        metavar="HOW",
        help="How several experts answer: parameters (mixed into one model), or run apart, with the mean of their "
        "probabilities, logits or hidden states. Default: as the router's policy says.",
        show_default=False,
    ),
]


def combination(text: str | None) -> Combine | None:
    """Read what --combine asks for, None = as the policy says; raise BundleError for what there is not."""
    from mediator_cli.errors import BundleError, Problem, did_you_mean

    names: tuple[Combine, ...] = ("parameters", "probabilities", "logits", "hidden")
    for name in names:
        if text == name:
            return name
    if text is None:
        return None
    raise BundleError(Problem("--combine", f"no way '{text}'", did_you_mean(text, names)))


def mixture_text(weights: Sequence[float], experts: Sequence[str]) -> str:
    """Write a mixture for people.

    >>> mixture_text([0.75, 0.25, 0.0], ["maths", "tales", "code"]), mixture_text([0.0], ["maths"])
    ('maths 0.75 + tales 0.25', 'dense expert alone')
    """
    parts = [f"{name} {weight:.2f}" for name, weight in zip(experts, weights, strict=True) if weight]
    return " + ".join(parts) or "dense expert alone"


def shown_mixture(weights: Sequence[float], experts: Sequence[str], gates_choose_per: str | None) -> str:
    """Write the mixture of an answer for people; where gates choose, what they choose on average over the prompt.

    >>> shown_mixture([0.5, 0.5], ["maths", "tales"], "token")
    'gates choose for every token; over the prompt on average maths 0.50 + tales 0.50'
    """
    text = mixture_text(weights, experts)
    return f"gates choose for every {gates_choose_per}; over the prompt on average {text}" if gates_choose_per else text
