"""Low-rank experts that are held in memory: a loaded model that mixes them, and exchanges them for others at any time.

A bundle's experts lie on disk. Comparing strategies needs many sets of experts on one base, one after the other.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.deltas import mix_deltas
from mediator_cli.errors import BundleError, Problem
from mediator_cli.runtime.forms import form_of
from mediator_cli.runtime.gating import set_gates
from mediator_cli.runtime.held_deltas import HeldDeltas
from mediator_cli.runtime.mixing import MixtureCache
from mediator_cli.runtime.model import Opened, make_routed
from mediator_cli.runtime.modules import Matrix, Mixer, take_over
from mediator_cli.runtime.parameters import match_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from mediator_cli.bundle.factors import FactorDelta
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.runtime.parameters import Owner
    from mediator_cli.runtime.prompts import PromptReader
    from mediator_cli.runtime.router import Router

_NO_SWITCH = 1 << 62


def hold_experts(
    model: PreTrainedModel, tensors: Iterable[str], path: Path, reader: PromptReader | None
) -> RoutedModel:
    """Make a loaded base mix low-rank experts of these matrices, which `give_experts` then gives it.

    `tensors` are names of the checkpoint; `path` names it in errors. Raises BundleError for what cannot be mixed.
    """
    names = list(tensors)
    # Gradients are asked of weights and gates; those of the base would cost as much again.
    model.requires_grad_(False)
    owners = match_parameters(model, names).owners
    mixers: list[Mixer] = []
    modules = []
    for name in names:
        if name not in owners:
            raise BundleError(Problem(f"{path}: {name}", "transformers loads it under another name or reshaped"))
        matrix = Matrix(_held(path, name, owners[name][0]))
        for owner in owners[name]:
            mixers.append(Mixer(matrix))
            modules.append(owner.module)
            take_over(owner.module, mixers[-1])
    # Low-rank products cost so little that no mixed matrix is ever worth building.
    cache = MixtureCache(0, 0, lambda mixture: {})
    opened = Opened(path, (), None, reader, None, tuple(mixers), tuple(modules), cache, _NO_SWITCH)
    return make_routed(model, opened, "parameters")


def _held(path: Path, name: str, owner: Owner) -> HeldDeltas:
    form, shape = form_of(owner.module), owner.parameter.shape
    if form is None or len(shape) != 2:
        message = f"{type(owner.module).__name__} cannot be mixed for each input"
        raise BundleError(Problem(f"{path}: {name}", message, "leave it out of the adapters"))
    return HeldDeltas(name, (shape[0], shape[1]), transposed=form == "transposed")


def give_experts(model: RoutedModel, experts: Mapping[str, Mapping[str, FactorDelta]]) -> None:
    """Give a model other experts, by name, each with what it adds to tensors; gates and router go.

    Raises BundleError for a tensor that the model does not mix.
    """
    set_gates(model, None)
    held = {mixer.name: mixer.matrix for mixer in model.opened.mixers if mixer.matrix is not None}
    for name, change in experts.items():
        if unknown := [tensor for tensor in change if tensor not in held]:
            raise BundleError(
                Problem(f"{model.opened.path}: {unknown[0]}", f"{name} changes it, the model does not mix it")
            )
    for tensor, matrix in held.items():
        if not isinstance(matrix.deltas, HeldDeltas):
            raise TypeError(type(matrix.deltas).__name__)
        matrix.deltas = replace(matrix.deltas, experts=[change.get(tensor) for change in experts.values()])
        matrix.stack = None
    model.opened = replace(model.opened, experts=tuple(experts), router=None)


def give_router(model: RoutedModel, router: Router | None) -> None:
    """Let a router decide the mixture of each prompt, None = no router."""
    model.opened = replace(model.opened, router=router)


def mixed_matrices(model: RoutedModel) -> dict[str, torch.nn.Parameter]:
    """Give the parameters of the matrices that mix, by tensor name."""
    modules = zip(model.opened.modules, model.opened.mixers, strict=True)
    return {mixer.name: module.get_parameter("weight") for module, mixer in modules}


@contextmanager
def folded(model: RoutedModel, changes: Iterable[Mapping[str, FactorDelta]]) -> Iterator[None]:
    """Add changes to the dense model inside the block, each tensor rounded once, as a bundle written of it would be."""
    every = list(changes)
    parameters = mixed_matrices(model)
    before: dict[str, torch.Tensor] = {}
    try:
        for name in dict.fromkeys(name for change in every for name in change):
            before[name] = parameters[name].data
            own = [(change[name], 1.0) for change in every if name in change]
            parameters[name].data = mix_deltas(before[name], own)
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value
