"""Keep k experts of a library, chosen by one of several ways, each with the tasks that it is then right for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.errors import CheckpointError, Problem, did_you_mean
from mediator_cli.recipe.names import LONGEST, unique_names
from mediator_cli.strategies._clusters import check_count
from mediator_cli.strategies._fitting import names_of
from mediator_cli.strategies._valid import valid_tokens
from mediator_cli.strategies.selection.greedy import MOST_ROWS, greedy, soup
from mediator_cli.strategies.selection.groups import Grouped, Picked
from mediator_cli.strategies.selection.mbc import mbc
from mediator_cli.strategies.selection.outputs import outputs
from mediator_cli.strategies.selection.represent import average, medoid, retrain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.library import Change, Library
    from mediator_cli.strategies.selection.groups import Kind
    from mediator_cli.strategies.selection.represent import Representative

SELECTORS = ("mbc", "outputs", "greedy", "soup", "random")
CLUSTERING = ("mbc", "outputs")
STEPS = 100


@dataclass(frozen=True, eq=False)
class Selection:
    """A library of k experts, and what each stands for.

    `clusters` name the experts of the first library that each of these takes the place of, `right` the expert for each
    seen task. `facts` are the losses of greedy choices, and of training.
    """

    selector: str
    library: Library
    clusters: Mapping[str, tuple[str, ...]]
    right: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def bench(self, bench: Bench) -> Bench:
        """Give a bench of these experts; what is known of experts that were kept as they are is not computed again."""
        return bench.with_library(self.library, self.right)


def select(
    bench: Bench,
    name: str,
    k: int,
    *,
    kind: Kind = "ensemble",
    representative: Representative = "medoid",
    steps: int = STEPS,
    most_rows: int = MOST_ROWS,
) -> Selection:
    """Choose k experts by a selector of `SELECTORS`; deterministic with the bench's seed.

    `kind` is what greedy chooses them for; `representative` what stands for a cluster, `steps` how long it is trained
    where it is `retrained`; `most_rows` of each task are looked at by tries of merges. Raises CheckpointError for an
    unknown selector, for k that the library does not have, and for a representative of what is no cluster.
    """
    names_of(bench)
    if name not in SELECTORS:
        raise CheckpointError(Problem("selection", f"no selector '{name}'", did_you_mean(name, SELECTORS)))
    check_count(k, len(bench.library.experts), name)
    if name in CLUSTERING:
        return _of_clusters(bench, name, (mbc if name == "mbc" else outputs)(bench, k), representative, steps)
    if representative != "medoid":
        message = f"{name} keeps experts as they are, nothing is {representative}"
        raise CheckpointError(Problem("representative", message, "take medoid, or a selector that makes clusters"))
    if name == "greedy":
        return _of_picked(bench, name, greedy(bench, k, kind, most_rows))
    return _of_picked(bench, name, soup(bench, k, most_rows) if name == "soup" else _draw(bench, k))


def _draw(bench: Bench, k: int) -> Picked:
    """Draw k experts; fewer are always among more, and they keep their order."""
    drawn = np.random.default_rng(bench.seed).permutation(len(bench.library.names))[:k]
    return Picked(tuple(bench.library.names[at] for at in sorted(drawn.tolist())))


def _of_clusters(bench: Bench, name: str, found: Grouped, how: Representative, steps: int) -> Selection:
    facts: dict[str, Any] = {}
    names = unique_names([_name(members) for members in found.clusters])
    clusters: dict[str, tuple[str, ...]] = {}
    experts: dict[str, Change] = {}
    for members, joined in zip(found.clusters, names, strict=True):
        # A medoid is an expert of the first library, and keeps its name.
        own = medoid(bench.library.names, members, found.alike) if how == "medoid" or len(members) == 1 else joined
        clusters[own] = members
        experts[own] = bench.library.experts[own] if own in members else _made(bench, own, members, how, steps, facts)
    of_expert = {member: own for own, members in clusters.items() for member in members}
    right = {task.name: of_expert[task.expert] for task in bench.seen if task.expert is not None}
    told = {"clusters": {own: list(members) for own, members in clusters.items()}, "representative": how, **facts}
    return Selection(name, replace(bench.library, experts=experts), clusters, right, told)


def _made(
    bench: Bench, own: str, members: tuple[str, ...], how: Representative, steps: int, facts: dict[str, Any]
) -> Change:
    if how == "average":
        return average(bench, members)
    change, facts.setdefault("training", {})[own] = retrain(bench, members, steps)
    return change


def _of_picked(bench: Bench, name: str, picked: Picked) -> Selection:
    """Give each task its own expert where it was kept, else the kept one that does best on its validation rows."""
    names = unique_names(picked.names)
    experts = {own: bench.library.experts[old] for own, old in zip(names, picked.names, strict=True)}
    first = {old: names[picked.names.index(old)] for old in picked.names}
    right = {task: first[expert] for task, expert in _nearest(bench, list(first)).items()}
    clusters: dict[str, tuple[str, ...]] = {own: (old,) for own, old in zip(names, picked.names, strict=True)}
    for task in bench.seen:
        if task.expert is not None and task.expert not in first:
            own = right[task.name]
            clusters[own] = tuple(dict.fromkeys((*clusters[own], task.expert)))
    told = {"clusters": {own: list(members) for own, members in clusters.items()}, "chosen": list(picked.names)}
    return Selection(name, replace(bench.library, experts=experts), clusters, right, {**told, **picked.facts})


def _nearest(bench: Bench, kept: Sequence[str]) -> dict[str, str]:
    found = {task.name: task.expert for task in bench.seen if task.expert in kept and task.expert is not None}
    if all(task.name in found for task in bench.seen):
        return found
    tokens = valid_tokens(bench)
    columns = [tokens.models.index(name) for name in kept]
    means = tokens.losses.mean(axis=0)
    for task in bench.seen:
        if task.name not in found:
            # Of a task without validation rows nothing is known but which expert is good on the whole.
            losses = tokens.losses[tokens.tasks.index(task.name)] if task.name in tokens.tasks else means
            found[task.name] = kept[int(losses[columns].argmin())]
    return found


def _name(members: Sequence[str]) -> str:
    """Join names of members, as many as fit into a name.

    >>> _name(["dates", "times"])
    'dates_times'
    """
    whole = "_".join(members)
    if len(whole) <= LONGEST:
        return whole
    kept = len(members) - 1
    while kept > 1 and len(_shortened(members, kept)) > LONGEST:
        kept -= 1
    return _shortened(members, kept)[:LONGEST] if kept > 1 else f"{members[0][:48]}_and-{len(members) - 1}-more"


def _shortened(members: Sequence[str], kept: int) -> str:
    return "_".join([*members[:kept], f"and-{len(members) - kept}-more"])
