"""Mixtures on the command line: read from options, shown beside an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.runtime.mixing import Wanted

ExpertOption = Annotated[
    str | None,
    typer.Option("--expert", metavar="NAME", help="Answer with this expert, or with `dense`.", show_default=False),
]
MixtureOption = Annotated[
    str | None,
    typer.Option("--mixture", metavar="A=0.7,B=0.3", help="Answer with these weights.", show_default=False),
]


def wanted(expert: str | None, mixture: str | None) -> Wanted | None:
    """Read what --expert or --mixture ask for, None = route; raise BundleError for bad form."""
    from mediator_cli.errors import BundleError, Problem

    if expert is not None and mixture is not None:
        raise BundleError(Problem("--expert", "cannot be used with --mixture", "give one of the two"))
    if mixture is None:
        return expert
    weights: dict[str, float] = {}
    for item in mixture.split(","):
        name, _, number = item.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            hint = "write for example --mixture maths=0.7,sarcasm=0.3"
            raise BundleError(Problem("--mixture", f"'{item}' is not NAME=WEIGHT", hint)) from None
    return weights


def mixture_text(weights: Sequence[float], experts: Sequence[str]) -> str:
    """Write a mixture for people.

    >>> mixture_text([0.75, 0.25, 0.0], ["maths", "tales", "code"]), mixture_text([0.0], ["maths"])
    ('maths 0.75 + tales 0.25', 'dense expert alone')
    """
    parts = [f"{name} {weight:.2f}" for name, weight in zip(experts, weights, strict=True) if weight]
    return " + ".join(parts) or "dense expert alone"
