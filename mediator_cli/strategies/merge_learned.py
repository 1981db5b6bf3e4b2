"""One model: the experts' changes with weights learned by gradients."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from mediator_cli.strategies._fitting import largest_rank, names_of, rows_to_fit
from mediator_cli.strategies._weights import Kind, Learned, Per, Rate, Steps, learn_weights
from mediator_cli.strategies.library import summed
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

BatchSize = Annotated[int, Field(ge=1, description="Rows in a step, of all tasks in turn.")]


@strategy(group="merge", reference="https://arxiv.org/abs/2603.03535", needs=("rows",))
def merge_learned(
    bench: Bench,
    *,
    per: Per = "model",
    weights: Kind = "softmax",
    steps: Steps = 30,
    learning_rate: Rate = None,
    batch: BatchSize = 12,
) -> Fitted:
    """Learn how much of each expert to add: W + Σ wₜ bₜaₜ, wₜ by gradients of the loss of validation rows.

    Adam minimises the mean -ln p of an answer; base and experts stay as they are. w = softmax(φ), whose sum is 1, or
    any numbers; both start at 1 / T. `per: layer` has weights of its own for each decoder layer, learned in the second
    half of the steps from those that the first half finds for the model. Batches take rows of all tasks in turn, drawn
    with the bench's seed.
    """
    started, names = perf_counter(), names_of(bench)
    rows = rows_to_fit(bench)
    learned = learn_weights(bench, rows, per=per, kind=weights, steps=steps, rate=learning_rate, batch=batch)
    by_name = {name: _of_tensors(learned, at) for at, name in enumerate(names)}
    change = summed([(bench.library.experts[name], by_name[name]) for name in names])
    by_group = {group: dict(zip(names, each.tolist(), strict=True)) for group, each in learned.weights.items()}
    means = torch.stack(list(learned.weights.values())).mean(0).tolist()
    facts = {
        "weights": dict(zip(names, means, strict=True)),
        "weights_by_layer": {} if per == "model" else by_group,
        "steps": steps,
        "losses": list(learned.losses),
        "rank": largest_rank(change),
        "seconds": perf_counter() - started,
    }
    return Fitted(folded=(change,), facts=facts)


def _of_tensors(learned: Learned, expert: int) -> dict[str, float]:
    return {name: float(learned.weights[group][expert]) for group, own in learned.groups.items() for name in own}
