"""All experts answer, each on its own: the weights of their probabilities depend on the cluster of the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.runtime.classify import fit_shares
from mediator_cli.runtime.features import FeatureSpec, prompt_features
from mediator_cli.runtime.fit import FitSettings
from mediator_cli.runtime.prompts import prompt_reader
from mediator_cli.strategies._clusters import cluster
from mediator_cli.strategies._ensembles import learn_shares
from mediator_cli.strategies._own_rows import SourceParameter, rows_by_expert
from mediator_cli.strategies._prompt_router import fit_on_prompts
from mediator_cli.strategies._valid import valid_tokens
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.runtime.router import Router
    from mediator_cli.strategies._valid import Floats, ValidTokens
    from mediator_cli.strategies.bench import Bench

Clusters = Annotated[
    int | None, Field(ge=1, description="Clusters of tasks; null: the root of the number of tasks, rounded up.")
]
_SETTINGS = FitSettings(
    features=FeatureSpec("embedding_mean"),
    policy=PolicyRecord(rule="posterior", outside="ignore", combine="probabilities"),
)


@strategy(group="ensemble", reference="https://arxiv.org/abs/2603.03535", needs=("rows", "tasks"))
def ensemble_clustered(bench: Bench, *, clusters: Clusters = None, source: SourceParameter = "valid") -> Fitted:
    """Mix probabilities of the next token: p = Σ wₜ(x)pₜ, where w(x) are the weights of the clusters that x may be of.

    Tasks are clustered by how much each expert gains or loses on them; of each cluster the weights of
    `ensemble_learned` are found. Softmax regression on the prompt's features, fitted to its cluster's weights, then
    gives their mean over the clusters, each by its probability. Needs 8 different prompts of each expert, as routers
    do; raises BundleError where there are fewer.
    """
    tokens, names = valid_tokens(bench), bench.library.names
    n_clusters = int(np.ceil(len(tokens.tasks) ** 0.5)) if clusters is None else clusters
    groups = cluster(_gains(tokens), tokens.tasks, n_clusters, bench.seed)
    found = [learn_shares(tokens, names, np.array([tokens.tasks.index(task) for task in group])) for group in groups]
    rows = rows_by_expert(bench, source)
    shares = _by_expert(bench, groups, [each.weights for each in found])
    router, facts = _fit(bench, rows, shares)
    told = [_told(group, names, each.weights, each.loss) for group, each in zip(groups, found, strict=True)]
    facts = {"clusters": told, **facts}
    return Fitted(bench.library.experts, decision=router, combine="probabilities", facts=facts)


def _gains(tokens: ValidTokens) -> Floats:
    """Describe tasks by what each expert gains on them over the mean expert, scaled to length 1 [tasks, experts]."""
    losses = tokens.losses[:, 1:]
    gains = losses.mean(axis=1, keepdims=True) - losses
    lengths = np.linalg.norm(gains, axis=1, keepdims=True)
    scaled: Floats = gains / np.where(lengths > 0, lengths, 1.0)
    return scaled


def _by_expert(bench: Bench, groups: Sequence[tuple[str, ...]], weights: Sequence[Floats]) -> dict[str, Floats]:
    """Give each expert's prompts the weights of the cluster of its task; of several tasks their mean."""
    of_task = {task: own for group, own in zip(groups, weights, strict=True) for task in group}
    found: dict[str, list[Floats]] = {}
    for task in bench.seen:
        if task.name in of_task and task.expert is not None:
            found.setdefault(task.expert, []).append(of_task[task.name])
    if lost := [name for name in bench.library.names if name not in found]:
        hint = "give some, or take ensemble_learned"
        raise CheckpointError(Problem(lost[0], "has no validation rows to learn weights on", hint))
    return {name: np.mean(own, axis=0) for name, own in found.items()}


def _fit(bench: Bench, rows: Mapping[str, list[Row]], shares: Mapping[str, Floats]) -> tuple[Router, dict[str, Any]]:
    names = bench.library.names
    router, facts = fit_on_prompts(bench, Fitted(experts=bench.library.experts), rows, _SETTINGS)
    turns = prompt_reader(bench.tokenizer)
    texts = [(name, text) for name, own in rows.items() for text in dict.fromkeys(row.prompt for row in own)]
    with bench.answering(Fitted()) as model:
        features = prompt_features(
            model, bench.tokenizer, _SETTINGS.features, [turns.encode(text) for _, text in texts]
        )
    # Of an expert without any weight, a trace: the router knows all experts.
    wanted = np.maximum(np.stack([shares[name] for name, _ in texts]), 2e-4)
    classifier = fit_shares(features, wanted / wanted.sum(axis=1, keepdims=True))
    # How often its most probable expert is that of the task says nothing of a mixture.
    record = router.record.model_copy(update={"temperature": 1.0, "report": None})
    facts = {name: facts[name] for name in ("notices",)} | {"experts": list(names), "prompts": len(texts)}
    return replace(router, record=record, classifier=classifier), facts


def _told(group: tuple[str, ...], names: Sequence[str], weights: Floats, loss: float) -> dict[str, Any]:
    shown = {name: round(float(weight), 4) for name, weight in zip(names, weights, strict=True) if weight >= 1e-4}
    return {"tasks": list(group), "weights": shown, "loss": loss}
