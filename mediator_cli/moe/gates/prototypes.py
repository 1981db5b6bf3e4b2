"""Gates from the base model's states or embeddings, by the formulas of mergekit-moe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.moe.gates.asked import ask
from mediator_cli.moe.gates.formulas import prototype_gates
from mediator_cli.moe.layerwise import advance, embedded, read_layer, start
from mediator_cli.runtime.classify import unit_rows
from mediator_cli.runtime.prompts import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mediator_cli.moe.gates.asked import Asked
    from mediator_cli.moe.layerwise import Batch, LayerwiseModel
    from mediator_cli.recipe.moe import GateMethod

    Floats = NDArray[np.float64]
    Texts = Mapping[str, Sequence[str]]


def prototypes(
    base: LayerwiseModel, method: GateMethod, positive: Texts, negative: Texts, *, chat: bool
) -> dict[int, Floats]:
    """Make gates [experts, hidden] for each layer of the base from texts by expert.

    `hidden` and `hidden_last`: what enters a layer (before any norm) at a prompt's last token, mean over prompts;
    `hidden_avg`: mean over a prompt's tokens first (mergekit-moe counts padding too); `cheap_embed`: sum of the
    prompts' token embeddings, the same for all layers. Those of negative prompts are subtracted, and rows scaled to
    length 1. Raises CheckpointError where a layer's states are not finite.
    """
    names = list(positive)
    groups = {**positive, **{f"{name}, negative": negative.get(name, ()) for name in names}}
    asked = ask(base, load_tokenizer(base.folder), groups, chat=chat, whole=True)
    n = len(names)
    if method == "cheap_embed":
        sums = unit_rows(_embedding_sums(base, asked, 2 * n))
        same = prototype_gates(sums[:n], sums[n:])
        return dict.fromkeys(range(base.n_layers), same)
    return {
        number: prototype_gates(means[:n], means[n:])
        for number, means in enumerate(_hidden_means(base, asked, 2 * n, over_tokens=method == "hidden_avg"))
    }


def _embedding_sums(base: LayerwiseModel, asked: Asked, n_groups: int) -> Floats:
    sums = np.zeros((n_groups, base.hidden_size))
    for ids, group in zip(asked.ids, asked.groups, strict=True):
        sums[group] += embedded(base, ids).double().sum(dim=0).numpy()
    return sums


def _hidden_means(base: LayerwiseModel, asked: Asked, n_groups: int, *, over_tokens: bool) -> list[Floats]:
    """Mean over each group's prompts [groups, hidden] of what enters each layer; zero for a group without prompts."""
    batches = start(base, asked.ids)
    groups = np.array(asked.groups)
    counts = np.maximum(np.bincount(groups, minlength=n_groups), 1)[:, None]
    found = []
    for number in range(base.n_layers):
        sums = np.zeros((n_groups, base.hidden_size))
        for batch in batches:
            np.add.at(sums, groups[list(batch.rows)], _of_prompts(batch, over_tokens=over_tokens))
        if not np.isfinite(sums).all():
            message = "its states are not finite"
            raise CheckpointError(Problem(f"{base.folder}: layer {number}", message, "is the checkpoint damaged?"))
        found.append(sums / counts)
        if number + 1 < base.n_layers:
            layer = read_layer(base, number)
            for batch in batches:
                advance(layer, number, batch)
    return found


def _of_prompts(batch: Batch, *, over_tokens: bool) -> Floats:
    """Take each prompt's mean or last state [rows, hidden]."""
    hidden = batch.hidden.double()
    if over_tokens:
        return ((hidden * batch.real[..., None]).sum(dim=1) / batch.lengths[:, None]).numpy()
    return hidden[torch.arange(len(hidden)), batch.lengths - 1].numpy()
