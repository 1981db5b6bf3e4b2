"""Who is asked to answer: an expert, a mixture written as text, or nobody, so that the router decides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.errors import BundleError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.runtime.mixing import Wanted


def read_mixture(text: str, place: str, known: Sequence[str] | None = None) -> dict[str, float]:
    """Read a mixture such as `maths=0.7,sarcasm=0.3`; raise BundleError for bad form, and names that are not `known`.

    >>> read_mixture("maths=0.7, sarcasm=0.3", "model")
    {'maths': 0.7, 'sarcasm': 0.3}
    """
    weights: dict[str, float] = {}
    hint = f"write for example {place} maths=0.7,sarcasm=0.3"
    for item in text.split(","):
        name, _, number = (part.strip() for part in item.partition("="))
        if not name or not _is_number(number):
            raise BundleError(Problem(place, f"'{item}' is not NAME=WEIGHT", hint))
        if name in weights:
            raise BundleError(Problem(place, f"'{name}' is given twice", hint))
        weights[name] = float(number)
    if known is not None:
        check_experts(weights, known, place)
    return weights


def check_experts(names: Iterable[str], known: Sequence[str], place: str) -> None:
    """Raise BundleError for an expert that a bundle does not have; `known` none = it answers with one model."""
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) if known else "it answers with one model, without options"
            raise BundleError(Problem(place, f"no expert '{name}'", hint))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def answering(manifest: Manifest) -> tuple[str, ...]:
    """List the experts that a bundle can answer with beside the dense one: those that are stored apart from it."""
    return tuple(source.name for source in manifest.experts) if manifest.sparse else ()


def chooses(manifest: Manifest) -> bool:
    """Whether a bundle decides by itself who answers."""
    return manifest.router is not None or manifest.gates is not None


def wanted_of(folder: Path, expert: str | None, mixture: str | None) -> Wanted | None:
    """Read what --expert or --mixture ask of a bundle, None = route, before anything is loaded.

    Raises BundleError for bad form, unknown experts, and when nothing is asked of a bundle without router and gates.
    All that a bundle without sparse experts can answer with is its dense expert.
    """
    manifest = read_manifest(folder)
    if expert is not None and mixture is not None:
        raise BundleError(Problem("--expert", "cannot be used with --mixture", "give one of the two"))
    names = answering(manifest)
    if mixture is not None:
        return read_mixture(mixture, "--mixture", names)
    if expert is not None:
        check_experts([expert], [*names, "dense"] if names or expert == "dense" else [], "--expert")
        return expert
    if not names:
        return "dense"
    if not chooses(manifest):
        hint = f"fit one with `mediator fit-router {folder}`, or name who answers: --expert {names[0]}"
        raise BundleError(Problem(str(folder), "the bundle has no router", hint))
    return None
