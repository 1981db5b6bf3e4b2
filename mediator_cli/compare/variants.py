"""The controls of a recipe: what each of its choices is worth is seen by changing one at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Literal

from mediator_cli.bundle.router_record import PolicyRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.runtime.combine import Combine

Model = Literal["base", "experts", "bundle"]
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Variant:
    """One line of a comparison: which model, made by which changes of the recipe, and who decides its mixture.

    `answer` is `oracle` (the expert named like the task), `router`, `dense`, or the name of an expert; `policy` takes
    the place of the router's own, `combine` that of its way to let several experts answer.
    """

    group: str
    name: str
    model: Model = "bundle"
    changes: tuple[str, ...] = ()
    answer: str = "oracle"
    policy: PolicyRecord | None = None
    combine: Combine | None = None


def references(experts: Sequence[str], *, crossed: bool = False) -> Iterator[Variant]:
    """Give base, the experts on their own tasks and, if `crossed`, each expert on all tasks."""
    yield Variant("reference", "base", "base", answer="dense")
    yield Variant("reference", "oracle experts", "experts")
    if crossed:
        yield from (Variant("expert", f"expert {name}", "experts", answer=name) for name in experts)


def static_merges(methods: Mapping[str, tuple[str, ...]]) -> Iterator[Variant]:
    """Give a static merge for each method, with the changes that set it up; no changes = the recipe's own."""
    for name, changes in methods.items():
        yield Variant("static", f"static {name}", changes=("assign.rule=none", *changes), answer="dense")


def routed(name: str = "Mediator") -> Iterator[Variant]:
    """Give the recipe as it stands, its mixtures decided by router, oracle, and nobody."""
    yield Variant("mediator", f"{name}, router", answer="router")
    yield Variant("mediator", f"{name}, oracle routing")
    yield Variant("mediator", f"{name}, dense expert alone", answer="dense")


def assignments(
    scores: Mapping[str, float], n_routed: int, draws: int, seed: int, kind: str = "layers"
) -> Iterator[Variant]:
    """Give all layers routed, and `n_routed` of those with scores: the least and most conflicting, and random ones.

    Nothing is chosen where none or all of them are routed. `kind` is what the units are called.
    """
    layers = sorted(scores, key=lambda unit: scores[unit])
    yield Variant("assignment", "all layers routed", changes=("assign.rule=all", "assign.candidates=layers"))
    if not 0 < n_routed < len(layers):
        return
    yield Variant("assignment", f"{n_routed} {kind} of lowest conflict", changes=_listed(layers[:n_routed]))
    yield Variant("assignment", f"{n_routed} {kind} of highest conflict", changes=_listed(layers[-n_routed:]))
    for draw in range(draws):
        chosen = Random(f"{seed} {draw}").sample(sorted(scores), n_routed)
        yield Variant("assignment", f"{n_routed} random {kind}, draw {draw + 1}", changes=_listed(chosen))


def _listed(units: Sequence[str]) -> tuple[str, ...]:
    return ("assign.rule=listed", f"assign.units=[{', '.join(sorted(units))}]")


def extractions() -> Iterator[Variant]:
    """Give the recipe with other densities, stored values and dense experts."""
    for density in DENSITIES:
        yield Variant("density", f"density {density:g}", changes=(f"extract.density={density}",))
    for values in ("bf16", "int8", "sign"):
        yield Variant("values", f"values {values}", changes=(f"extract.values={values}",))
    for dense in ("average", "base"):
        yield Variant("dense expert", f"dense {dense}", changes=(f"extract.dense={dense}",))


def policies(n_experts: int) -> Iterator[Variant]:
    """Give the recipe with every policy."""
    every = {
        "uncertainty": PolicyRecord(),
        "argmax": PolicyRecord(rule="argmax", outside="ignore"),
        "top 2": PolicyRecord(rule="top_k", k=min(2, n_experts), outside="ignore"),
        "posterior": PolicyRecord(rule="posterior", outside="ignore"),
        "uniform": PolicyRecord(rule="uniform"),
    }
    for name, policy in every.items():
        yield Variant("policy", f"policy {name}", answer="router", policy=policy)


def combinations(n_experts: int) -> Iterator[Variant]:
    """Give the two most probable experts of each input, combined in every way."""
    policy = PolicyRecord(rule="top_k", k=min(2, n_experts), outside="ignore")
    ways: tuple[Combine, ...] = ("parameters", "probabilities", "logits", "hidden")
    for way in ways:
        yield Variant("combination", f"top 2, {way} combined", answer="router", policy=policy, combine=way)


def with_changes(variants: Sequence[Variant], changes: tuple[str, ...]) -> list[Variant]:
    """Put changes in front of those of every bundle."""
    return [replace(v, changes=(*changes, *v.changes)) if v.model == "bundle" else v for v in variants]
