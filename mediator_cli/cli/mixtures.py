"""Mixtures on the command line: read from options, shown beside an answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mediator_cli.runtime.combine import Combine
    from mediator_cli.runtime.mixing import Wanted

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


def wanted(expert: str | None, mixture: str | None) -> str | dict[str, float] | None:
    """Read what --expert or --mixture ask for, None = route; raise BundleError for bad form."""
    from mediator_cli.errors import BundleError, Problem

    if expert is not None and mixture is not None:
        raise BundleError(Problem("--expert", "cannot be used with --mixture", "give one of the two"))
    if mixture is None:
        return expert
    weights: dict[str, float] = {}
    hint = "write for example --mixture maths=0.7,sarcasm=0.3"
    for item in mixture.split(","):
        name, _, number = (part.strip() for part in item.partition("="))
        if not name or not _is_number(number):
            raise BundleError(Problem("--mixture", f"'{item}' is not NAME=WEIGHT", hint))
        if name in weights:
            raise BundleError(Problem("--mixture", f"'{name}' is given twice", hint))
        weights[name] = float(number)
    return weights


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def wanted_of(folder: Path, expert: str | None, mixture: str | None) -> Wanted | None:
    """Read what is asked of a bundle, None = route, before anything is loaded.

    Raises BundleError for bad form, unknown experts, and when nothing is asked of a bundle without router and gates.
    All that a bundle without sparse experts can answer with is its dense expert.
    """
    from mediator_cli.bundle.manifest import read_manifest
    from mediator_cli.errors import BundleError, Problem, did_you_mean

    manifest = read_manifest(folder)
    asked = wanted(expert, mixture)
    names = [] if not manifest.sparse else [source.name for source in manifest.experts]
    place = "--expert" if mixture is None else "--mixture"
    given = [asked] if isinstance(asked, str) else list(asked or ())
    known = [*names, "dense"] if mixture is None else names
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) if names else "it answers with one model, without options"
            raise BundleError(Problem(place, f"no expert '{name}'", hint))
    if asked is None and not names:
        return "dense"
    if asked is None and manifest.router is None and manifest.gates is None:
        hint = f"fit one with `mediator fit-router {folder}`, or name who answers: --expert {names[0]}"
        raise BundleError(Problem(str(folder), "the bundle has no router", hint))
    return asked


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
