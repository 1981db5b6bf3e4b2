"""Weights of experts learned by gradients: one set for the model, or one for each decoder layer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.runtime.gating import gate_places
from mediator_cli.strategies.batches import answer_loss, make_batch, read_examples
from mediator_cli.strategies.strategy import Fitted, Fixed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.strategies.batches import Example
    from mediator_cli.strategies.bench import Bench

Per = Annotated[Literal["model", "layer"], Field(description="What has weights of its own.")]
Kind = Annotated[Literal["softmax", "free"], Field(description="Weights above 0 whose sum is 1, or any numbers.")]
Steps = Annotated[int, Field(ge=1, description="Steps of Adam.")]
Rate = Annotated[
    float | None,
    Field(
        gt=0,
        allow_inf_nan=False,
        description="Learning rate at first, which falls to zero; null: 0.3 for softmax's scores, 0.05 for weights.",
    ),
]
Item = TypeVar("Item")
_RATES = {"softmax": 0.3, "free": 0.05}
WHOLE = ""
"""The one group of `per: model`."""


@dataclass(frozen=True, eq=False)
class Learned:
    """Weights [experts] of each group of matrices, the matrices of each group, and the loss of each step."""

    weights: Mapping[str, torch.Tensor]
    groups: Mapping[str, tuple[str, ...]]
    losses: tuple[float, ...]


def learn_weights(
    bench: Bench, rows: Mapping[str, Sequence[Row]], *, per: Per, kind: Kind, steps: int, rate: float | None, batch: int
) -> Learned:
    """Learn weights from 1 / T on; those of layers for half of the steps, from the model's on, which took the others.

    So layers start where the model's weights have come to. Raises CheckpointError for a matrix outside of them.
    """
    groups = {WHOLE: _tensors(bench)} if per == "model" else _by_layer(bench)
    n = len(bench.library.experts)
    start = torch.full((n,), 0.0 if kind == "softmax" else 1 / n)
    examples = {task: read_examples(bench.model, bench.tokenizer, own) for task, own in rows.items()}
    batches = _draws(examples, batch, steps, bench.seed)
    together = _Learning({WHOLE: start.requires_grad_()}, kind, rate or _RATES[kind])
    losses = _steps(bench, together, list(islice(batches, steps if per == "model" else steps // 2)), steps, 0)
    if per == "model":
        return Learned(together.weights(), groups, tuple(losses))
    apart = replace(together, raw={group: start.detach().clone().requires_grad_() for group in groups})
    losses += _steps(bench, apart, list(batches), steps, len(losses))
    return Learned(apart.weights(), groups, tuple(losses))


@dataclass(frozen=True, eq=False)
class _Learning:
    """What is learned, by group: weights, or the scores that softmax makes weights of; and how."""

    raw: Mapping[str, torch.Tensor]
    kind: Kind
    rate: float

    def weights(self) -> dict[str, torch.Tensor]:
        return {group: _made(values, self.kind).detach() for group, values in self.raw.items()}


def _steps(bench: Bench, learning: _Learning, drawn: Sequence[Sequence[Example]], total: int, done: int) -> list[float]:
    """Take a step of Adam for each batch, the last ones smaller, so that none counts more; give the losses."""
    optimizer = torch.optim.Adam(learning.raw.values(), lr=learning.rate)
    slower = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(len(drawn), 1))
    whole = learning.raw.get(WHOLE)
    decision = Fixed() if whole is not None else _gates(bench, learning.raw, learning.kind)
    losses = []
    with bench.answering(Fitted(experts=bench.library.experts, decision=decision)) as model:
        for at, examples in enumerate(drawn, done + 1):
            loss = _loss(model, examples, whole, learning.kind)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            slower.step()
            losses.append(loss.item())
            bench.progress("learn weights", at, total)
    return losses


def _tensors(bench: Bench) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tensor for change in bench.library.experts.values() for tensor in change))


def _by_layer(bench: Bench) -> dict[str, tuple[str, ...]]:
    """Give the matrices of each decoder layer, by its path; raise CheckpointError for one that lies in none."""
    paths = {id(module): path for path, module in bench.model.named_modules()}
    found: dict[str, list[str]] = {place: [] for place in gate_places(bench.model)}
    outside: list[str] = []
    for module, mixer in zip(bench.model.opened.modules, bench.model.opened.mixers, strict=True):
        place = next((place for place in found if paths[id(module)].startswith(f"{place}.")), None)
        (outside if place is None else found[place]).append(mixer.name)
    if lost := [name for name in outside if name in _tensors(bench)]:
        raise CheckpointError(Problem(lost[0], "lies in no decoder layer", "learn weights per model"))
    return {place: tuple(dict.fromkeys(names)) for place, names in found.items()}


def _gates(bench: Bench, raw: Mapping[str, torch.Tensor], kind: Kind) -> Gates:
    """Make gates that choose what is learned, whatever they read."""
    none = {place: torch.zeros(len(bench.library.names), 1, width) for place, width in gate_places(bench.model).items()}
    rule = GateRule(at="layer", weights=kind)
    return Gates("learned", rule, bench.library.names, {place: Gate(none[place], raw[place]) for place in none})


def _loss(model: RoutedModel, examples: Sequence[Example], whole: torch.Tensor | None, kind: Kind) -> torch.Tensor:
    with nullcontext() if whole is None else model.mixing(_made(whole, kind)[None]):
        return answer_loss(model, make_batch(examples))


def _made(raw: torch.Tensor, kind: Kind) -> torch.Tensor:
    return raw.softmax(0) if kind == "softmax" else raw


def _draws(examples: Mapping[str, Sequence[Example]], size: int, steps: int, seed: int) -> Iterator[list[Example]]:
    """Draw batches of examples: tasks in turn, and of each task all examples before any again."""
    generator = np.random.default_rng(seed)
    tasks = _turns(list(examples), generator)
    own = {task: _turns(each, generator) for task, each in examples.items()}
    for _ in range(steps):
        yield [next(own[next(tasks)]) for _ in range(size)]


def _turns(items: Sequence[Item], generator: np.random.Generator) -> Iterator[Item]:
    """Give all items in an order drawn anew each time, without end."""
    while True:
        for at in generator.permutation(len(items)):
            yield items[at]
