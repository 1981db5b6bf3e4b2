"""Which experts the gates of an MoE choose on the prompts of tasks, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.moe.gates.asked import ask, some_of
from mediator_cli.moe.gates.routing import Choices, choices
from mediator_cli.moe.layerwise import model_layout, open_layerwise, router_of, router_states, start, walk
from mediator_cli.runtime.prompts import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.moe.gates.asked import Asked
    from mediator_cli.moe.layerwise import Batch

    Floats = NDArray[np.float64]
    Progress = Callable[[str, int, int], None]

N_PROMPTS = 32
"""Prompts of each task that are looked at."""


@dataclass(frozen=True, eq=False)
class GateLook:
    """What the gates choose: `first` and `weight` [layers, tasks, experts], `entropy` [layers, tasks] in nats.

    `first` is the share of tokens whose first choice an expert is, `weight` the mean weight that it gets after top-k.
    """

    experts: tuple[str, ...]
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    top_k: int
    n_prompts: int
    first: Floats
    weight: Floats
    entropy: Floats

    @property
    def load(self) -> Floats:
        """Mean weight of each expert over tasks [layers, experts], each task counting the same."""
        mean: Floats = self.weight.mean(axis=1)
        return mean

    def own(self) -> Floats | None:
        """Share of first choices [layers] that fall on the expert named like the task; None without such names."""
        pairs = [(at, self.experts.index(task)) for at, task in enumerate(self.tasks) if task in self.experts]
        return np.mean([self.first[:, task, expert] for task, expert in pairs], axis=0) if pairs else None

    def as_json(self) -> dict[str, Any]:
        """Give all numbers for other programs, by task."""
        own = self.own()
        facts = {"experts": self.experts, "experts_per_token": self.top_k, "layers": self.layers}
        tasks = {
            name: {
                "first": self.first[:, at].tolist(),
                "weight": self.weight[:, at].tolist(),
                "entropy": self.entropy[:, at].tolist(),
            }
            for at, name in enumerate(self.tasks)
        }
        whole = {"load": self.load.tolist(), "own": None if own is None else own.tolist()}
        return {**facts, "prompts": self.n_prompts, "tasks": tasks, **whole}


def look_at_gates(
    folder: Path,
    tasks: Mapping[str, Sequence[str]],
    experts: Sequence[str],
    *,
    chat: bool = True,
    most: int = N_PROMPTS,
    progress: Progress = lambda stage, done, total: None,
) -> GateLook:
    """Run the prompts of tasks through an MoE, one layer in memory at a time, and note what its gates choose.

    Of each task at most `most` prompts are read; tokens that all prompts begin with, such as a system message, are
    not counted. Experts without names are called by their numbers. Raises CheckpointError where the model is damaged
    or its gates or states are not finite.
    """
    model = open_layerwise(folder)
    layout = model_layout(model)
    asked = ask(
        model,
        load_tokenizer(folder),
        {name: some_of(texts, most) for name, texts in tasks.items()},
        chat=chat,
    )
    batches = start(model, asked.ids)
    found: list[Choices] = []
    total = model.bytes_before(model.n_layers)
    for number, layer in walk(model, batches):
        progress("gates", model.bytes_before(number), total)
        if number in layout.layers:
            logits, groups = _logits(layer, number, batches, asked)
            found.append(choices(logits, groups, len(tasks), min(layout.top_k, layout.n_experts)))
    progress("gates", total, total)
    names = tuple(experts) or tuple(map(str, range(layout.n_experts)))
    return GateLook(
        names, tuple(tasks), layout.layers, layout.top_k, len(asked.ids),
        *(np.stack([getattr(one, part) for one in found]) for part in ("first", "weight", "entropy")),
    )  # fmt: skip


def _logits(
    layer: torch.nn.Module, number: int, batches: Sequence[Batch], asked: Asked
) -> tuple[Floats, NDArray[np.int64]]:
    """Compute the logits of all tokens that count [tokens, experts], and the task of each token [tokens]."""
    router = router_of(layer)
    if router is None:
        raise ValueError("the layer is dense")
    logits, rows = [], []
    for batch in batches:
        counted = asked.counted(batch)
        states = router_states(layer, number, batch)[counted]
        logits.append(torch.nn.functional.linear(states, router.get_parameter("weight")))
        rows.append(batch.row_of_token[counted])
    found: Floats = torch.cat(logits).double().numpy()
    if not np.isfinite(found).all():
        hint = "fit them anew: mediator gates DIR --fit METHOD"
        raise CheckpointError(Problem(f"layer {number}", "its gates choose nothing: logits are not finite", hint))
    return found, np.array(asked.groups)[torch.cat(rows).numpy()]
