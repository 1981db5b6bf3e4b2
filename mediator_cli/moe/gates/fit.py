"""Make the gates of a Mixture of Experts without training, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from mediator_cli.bundle.tensors import as_tensor
from mediator_cli.checkpoint.read import narrow
from mediator_cli.errors import CheckpointError, Problem, RecipeError
from mediator_cli.moe.gates import formulas
from mediator_cli.moe.gates.asked import Asked, ask, some_of
from mediator_cli.moe.gates.prototypes import prototypes
from mediator_cli.moe.gates.report import GateFit, GateReport, LayerReport
from mediator_cli.moe.gates.routing import choices
from mediator_cli.moe.gates.settings import GateSettings, check_prompts, check_settings
from mediator_cli.moe.layerwise import model_layout, open_layerwise, router_of, router_states, start, walk
from mediator_cli.plan.moe_plan import BASE
from mediator_cli.recipe.moe import NO_PROMPTS, OF_BASE
from mediator_cli.runtime.calibrate import fit_temperature
from mediator_cli.runtime.prompts import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.moe.layerwise import Batch, LayerwiseModel
    from mediator_cli.plan.moe_plan import ExpertPrompts
    from mediator_cli.recipe.moe import GateMethod

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Progress = Callable[[str, int, int], None]

STRENGTHS = {"ridge": 0.1, "logistic": 1e-3}
"""Defaults of the penalty, as measured: see README.md."""
_HELD_OUT = 5
"""One prompt of so many is kept for measuring and calibration, where an expert has as many."""
_NEARLY_SAME = 5.0
"""The condition number above which mergekit-moe warns."""


@dataclass(frozen=True, eq=False)
class _Job:
    """What the gates of every layer are made from; `asked` is None for methods that read no prompts."""

    model: LayerwiseModel
    settings: GateSettings
    n_experts: int
    top_k: int
    asked: Asked | None = None
    held: NDArray[np.bool_] | None = None
    drawn_from: Mapping[int, Floats] | None = None

    @property
    def temperature(self) -> float:
        return self.settings.temperature or 1.0


@dataclass(frozen=True, eq=False)
class _Seen:
    """States of the tokens that count [tokens, hidden], each one's expert [tokens], and which are held out [tokens]."""

    states: NDArray[np.float32]
    labels: Ints
    held: NDArray[np.bool_]


def fit_gates(
    folder: Path,
    base: Path | None,
    prompts: Mapping[str, ExpertPrompts],
    experts: Sequence[str],
    settings: GateSettings | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> GateFit:
    """Make gates for the MoE in a folder, whose own gates are not read; `experts` are in the order of its tensors.

    `base` is needed by methods that read the base model. Layer by layer: the states of a layer come through the layers
    before it with the gates just made, rounded as they will be stored, and memory holds one layer and the prompts'
    states. An expert named `base` may go without prompts: its gates are zero. Deterministic for one torch version.

    Raises RecipeError for settings and prompts that do not fit, CheckpointError where a model is damaged, or states or
    gates of a layer are not finite.
    """
    settings = settings or GateSettings()
    check_settings(settings)
    model = open_layerwise(folder)
    layout = model_layout(model)
    _check_names(folder, experts, layout.n_experts)
    check_prompts(settings.method, prompts, experts)
    job = _Job(model, settings, len(experts), min(layout.top_k, len(experts)))
    if settings.method in NO_PROMPTS:
        made = [(layer, *_drawn(job, layer)) for layer in layout.layers]
    else:
        job = _with_prompts(job, base, prompts, experts)
        made = list(_layer_by_layer(job, progress))
    gates = {layout.format.router_of(layer): rows.astype(np.float32) for layer, rows, _ in made}
    return GateFit(gates, _report(job, experts, prompts, [report for _, _, report in made]))


def _check_names(folder: Path, experts: Sequence[str], n_experts: int) -> None:
    if len(experts) != n_experts or len(set(experts)) != n_experts:
        message = f"has {n_experts} experts, {len(set(experts))} names are given"
        raise RecipeError(Problem(str(folder), message, "name each expert once, in the order of their numbers"))


def _drawn(job: _Job, layer: int) -> tuple[Floats, LayerReport]:
    draw = formulas.random_gates if job.settings.method == "random" else formulas.uniform_gates
    gates = draw(job.n_experts, job.model.hidden_size, job.settings.seed, layer) / job.temperature
    return gates, LayerReport(layer, formulas.condition(gates, job.n_experts))


def _with_prompts(job: _Job, base: Path | None, prompts: Mapping[str, ExpertPrompts], experts: Sequence[str]) -> _Job:
    settings, most = job.settings, job.settings.most_prompts
    texts = {name: some_of(prompts[name].positive, most) if name in prompts else () for name in experts}
    asked = ask(job.model, load_tokenizer(job.model.folder), texts, chat=settings.mixture_chats)
    held = _held_out([len(own) for own in texts.values()])
    found = None
    if settings.method in OF_BASE:
        negative = {name: some_of(prompts[name].negative, most) for name in experts}
        found = prototypes(_base_for(job, base), settings.method, texts, negative, chat=settings.base_chats)
    return _Job(job.model, settings, job.n_experts, job.top_k, asked, held, found)


def _base_for(job: _Job, base: Path | None) -> LayerwiseModel:
    """Open the base; raise RecipeError where it is not given, CheckpointError where its states are of another shape."""
    if base is None:
        hint = "name it, or use centred, ridge or logistic, which read the MoE itself"
        raise RecipeError(Problem("base", f"gates '{job.settings.method}' read the base model", hint))
    opened = open_layerwise(base)
    sizes = [(model.n_layers, model.hidden_size) for model in (opened, job.model)]
    if sizes[0] != sizes[1]:
        message = f"has {sizes[0][0]} layers of width {sizes[0][1]}, the MoE {sizes[1][0]} of {sizes[1][1]}"
        raise CheckpointError(Problem(str(base), message, "give the base that the experts were tuned from"))
    return opened


def _held_out(counts: Sequence[int]) -> NDArray[np.bool_]:
    """Choose the prompts [prompts] that are kept for measuring: none where an expert has too few."""
    splits = all(count >= _HELD_OUT for count in counts if count)
    return np.concatenate([(np.arange(count) % _HELD_OUT == _HELD_OUT - 1) & splits for count in counts])


def _layer_by_layer(job: _Job, progress: Progress) -> Iterator[tuple[int, Floats, LayerReport]]:
    """Make the gates of each layer from states that came through the gates made before."""
    if job.asked is None:
        raise ValueError("no prompts")
    batches = start(job.model, job.asked.ids)
    total = job.model.bytes_before(job.model.n_layers)
    for number, layer in walk(job.model, batches):
        progress("gates", job.model.bytes_before(number), total)
        if (router := router_of(layer)) is not None:
            seen = _look(job, layer, number, batches)
            gates = _stored(job, number, _gates(job, number, seen))
            yield number, gates, _measure(job, number, gates, seen)
            cast("torch.nn.Parameter", router.weight).data.copy_(torch.from_numpy(gates))
    progress("gates", total, total)


def _look(job: _Job, layer: torch.nn.Module, number: int, batches: Sequence[Batch]) -> _Seen:
    """Gather the states that the gates of a layer read, of all tokens that count."""
    if job.asked is None or job.held is None:
        raise ValueError("no prompts")
    states, rows = [], []
    for batch in batches:
        counted = job.asked.counted(batch)
        states.append(router_states(layer, number, batch)[counted])
        rows.append(batch.row_of_token[counted])
    found, row = torch.cat(states).float().numpy(), torch.cat(rows).numpy()
    if not np.isfinite(found).all():
        raise CheckpointError(Problem(f"layer {number}", "its states are not finite", "is the checkpoint damaged?"))
    return _Seen(found, np.array(job.asked.groups)[row], job.held[row])


def _gates(job: _Job, number: int, seen: _Seen) -> Floats:
    if job.drawn_from is not None:
        gates = job.drawn_from[number]
    else:
        used = ~seen.held
        gates = _fitted(job.settings, seen.states[used], seen.labels[used], job.n_experts)
        shown = seen.held if seen.held.any() else used
        gates = gates / _own_temperature(seen.states[shown] @ gates.T, seen.labels[shown])
    gates = gates / job.temperature
    if not np.isfinite(gates).all():
        raise CheckpointError(Problem(f"layer {number}", "its gates are not finite", "use a higher temperature"))
    return gates


def _fitted(settings: GateSettings, states: NDArray[np.float32], labels: Ints, n_experts: int) -> Floats:
    if settings.method == "centred":
        return formulas.centred_gates(states, labels, n_experts)
    strength = settings.strength or STRENGTHS[settings.method]
    fit = formulas.ridge_gates if settings.method == "ridge" else formulas.logistic_gates
    return fit(states, labels, n_experts, strength)


def _own_temperature(logits: Floats, labels: Ints) -> float:
    """Find the temperature that makes the softmax over the experts that have prompts most likely."""
    present, places = np.unique(labels, return_inverse=True)
    return fit_temperature(logits[:, present], places)


def _stored(job: _Job, number: int, gates: Floats) -> Floats:
    """Round gates as their tensor will be stored."""
    info = job.model.tensors[model_layout(job.model).format.router_of(number)]
    rounded, fits = narrow(gates.astype(np.float32).ravel(), info.dtype)
    if not fits:
        message = f"its gates do not fit in {info.dtype}"
        raise CheckpointError(Problem(f"layer {number}", message, "use a higher temperature"))
    return as_tensor(rounded, info.dtype).double().numpy().reshape(gates.shape)


def _measure(job: _Job, number: int, gates: Floats, seen: _Seen) -> LayerReport:
    shown = seen.held if seen.held.any() else ~seen.held
    labels = seen.labels[shown]
    found = choices(seen.states[shown] @ gates.T, labels, job.n_experts, job.top_k)
    present = np.unique(labels)
    is_own = job.drawn_from is None
    return LayerReport(
        number,
        formulas.condition(gates - gates.mean(axis=0) if is_own else gates, len(present) - is_own),
        float(found.first[present, present].mean()),
        float(found.weight[present, present].mean()),
        float(found.entropy[present].mean()),
        tuple(found.weight[present].mean(axis=0).tolist()),
    )


def _report(
    job: _Job, experts: Sequence[str], prompts: Mapping[str, ExpertPrompts], layers: Sequence[LayerReport]
) -> GateReport:
    asked = job.asked
    n_tokens = sum(len(prompt) - asked.opening for prompt in asked.ids) if asked else 0
    held = job.held is not None and bool(job.held.any())
    notices = tuple(_notices(job, experts, prompts, layers))
    method = job.settings.method
    n_prompts = len(asked.ids) if asked else 0
    return GateReport(method, tuple(experts), job.temperature, n_prompts, n_tokens, held, tuple(layers), notices)


def _notices(
    job: _Job, experts: Sequence[str], prompts: Mapping[str, ExpertPrompts], layers: Sequence[LayerReport]
) -> Iterator[str]:
    method: GateMethod = job.settings.method
    if method in OF_BASE and (high := [layer for layer in layers if layer.condition > _NEARLY_SAME]):
        worst = max(layer.condition for layer in high)
        told = "infinite" if math.isinf(worst) else f"{worst:.0f}"
        yield (
            f"gates of {len(high)} of {len(layers)} layers are nearly the same for several experts (condition number "
            f"up to {told}, above {_NEARLY_SAME:.0f}): prompts that differ more, or method ridge, tell them apart"
        )
    if method not in OF_BASE and any(prompts[name].negative for name in experts if name in prompts):
        yield f"negative prompts are not read by gates '{method}': the other experts' prompts are what to tell apart"
    if method not in NO_PROMPTS and BASE in experts and not (BASE in prompts and prompts[BASE].positive):
        yield "the base has no prompts: its gates are zero, so it is second where only one expert fits a token"
