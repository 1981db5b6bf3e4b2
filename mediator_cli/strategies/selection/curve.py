"""How good few experts are: every selection at several k, each as an ensemble, a merge and a router."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.runtime.features import FeatureSpec
from mediator_cli.runtime.fit import FitSettings
from mediator_cli.strategies._own_rows import rows_by_expert
from mediator_cli.strategies._prompt_router import fit_on_prompts
from mediator_cli.strategies.library import count_bytes
from mediator_cli.strategies.log_probs import cached_scores
from mediator_cli.strategies.selection.greedy import MOST_ROWS
from mediator_cli.strategies.selection.groups import KINDS, merged_uniformly
from mediator_cli.strategies.selection.select import CLUSTERING, STEPS, select
from mediator_cli.strategies.strategy import Fitted, Fixed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.evaluate.score import RowScore
    from mediator_cli.strategies.bench import Bench, TaskRows
    from mediator_cli.strategies.log_probs import Which
    from mediator_cli.strategies.selection.groups import Kind
    from mediator_cli.strategies.selection.represent import Representative
    from mediator_cli.strategies.selection.select import Selection


@dataclass(frozen=True, eq=False)
class Point:
    """k experts of one selection, used in one way: the scores of each task's rows, and what was chosen.

    `n_bytes` are the experts' factors in float32. `valid_loss` is the mean over seen tasks, in nats of a row.
    """

    selector: str
    kind: Kind
    k: int
    representative: Representative
    experts: tuple[str, ...]
    by_task: Mapping[str, Sequence[RowScore]]
    valid_loss: float
    n_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def curve(
    bench: Bench,
    selectors: Sequence[str],
    ks: Sequence[int],
    kinds: Sequence[Kind] = KINDS,
    *,
    which: Which = "test",
    representative: Representative = "medoid",
    steps: int = STEPS,
    most_rows: int = MOST_ROWS,
) -> Iterator[Point]:
    """Score every selection at every k in every way of using it, one after the other.

    ensemble: probabilities with equal weights. merge: changes with equal weights. route: a router that reads prompts
    chooses one expert for each, so that held-out tasks are answered as seen ones are. Ensembles and routes of experts
    that were kept as they are cost one pass of each expert of the library for all points together; each merge costs
    one. `representative` is for selectors that make clusters.
    """
    for name in selectors:
        how: Representative = representative if name in CLUSTERING else "medoid"
        for k in ks:
            for kind in kinds:
                chosen, own = _chosen(bench, name, k, kind, how, steps, most_rows)
                yield _point(own, chosen, kind, k, how, which)


def _chosen(
    bench: Bench, name: str, k: int, kind: Kind, how: Representative, steps: int, most_rows: int
) -> tuple[Selection, Bench]:
    # What is not chosen for one use is the same for all, and may have been trained.
    key = ("selection", name, k, kind if name == "greedy" else None, how, steps, most_rows)

    def make() -> tuple[Selection, Bench]:
        chosen = select(bench, name, k, kind=kind, representative=how, steps=steps, most_rows=most_rows)
        return chosen, chosen.bench(bench)

    found: tuple[Selection, Bench] = bench.once(key, make)
    return found


def _point(own: Bench, chosen: Selection, kind: Kind, k: int, how: Representative, which: Which) -> Point:
    fitted = fit_kind(own, kind)
    scores = {task.name: _scores(own, fitted, task, which) for task in own.tasks if getattr(task, which)}
    valid = [_scores(own, fitted, task, "valid") for task in own.seen if task.valid]
    losses = [-sum(score.log_prob for score in rows) / len(rows) for rows in valid]
    n_bytes = sum(count_bytes(change) for change in chosen.library.experts.values())
    return Point(
        chosen.selector,
        kind,
        k,
        how,
        chosen.library.names,
        scores,
        sum(losses) / len(losses),
        n_bytes,
        {**chosen.facts, **fitted.facts},
    )


def _scores(bench: Bench, fitted: Fitted, task: TaskRows, which: Which) -> Sequence[RowScore]:
    known = cached_scores(bench, fitted, task, which)
    if known is not None:
        return known
    # Several selections end with the same experts, and with k = 1 and k = all of them nearly every one does.
    members = tuple(sorted(id(change) for change in bench.library.experts.values()))
    found: Sequence[RowScore] = (bench.parent or bench).once(
        ("merged", members, task.name, which), lambda: bench.score(fitted, task, getattr(task, which))
    )
    return found


def fit_kind(bench: Bench, kind: Kind) -> Fitted:
    """Use all experts of a bench in one way; raises BundleError where a router cannot be fitted."""
    experts = bench.library.experts
    if kind == "merge":
        return merged_uniformly(list(experts.values()))
    if kind == "ensemble":
        return Fitted(experts, decision=Fixed(dict.fromkeys(experts, 1 / len(experts))), combine="probabilities")
    return _fit_router(bench)


def _fit_router(bench: Bench) -> Fitted:
    """Fit a router over the experts that are right for some task; where that is one, it answers everything."""
    needed = {task.expert for task in bench.seen}
    kept = {name: change for name, change in bench.library.experts.items() if name in needed}
    if len(kept) == 1:
        return Fitted(kept, decision=Fixed(dict.fromkeys(kept, 1.0)))
    policy = PolicyRecord(rule="argmax", outside="ignore")
    settings = FitSettings(features=FeatureSpec("embedding_mean"), policy=policy)
    own = bench.with_library(bench.library.subset(list(kept)))
    router, facts = fit_on_prompts(own, Fitted(kept), rows_by_expert(own), settings)
    return Fitted(kept, decision=router, facts={"router": facts})
