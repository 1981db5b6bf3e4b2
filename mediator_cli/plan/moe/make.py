"""From a plan of the dense model to that of the MoE: feed-forward blocks become experts, the rest is shared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.moe_layout import FORMATS, PROJECTIONS
from mediator_cli.checkpoint.spans import Part, Span
from mediator_cli.checkpoint.write import NewTensor
from mediator_cli.methods.method import ResolvedMethod
from mediator_cli.methods.registry import resolve_method
from mediator_cli.plan.moe.check import (
    block_tensor,
    certain_layers,
    expert_names,
    format_name,
    read_texts,
)
from mediator_cli.plan.moe.formats import SHARED_WIDTH, TAKEN, moe_config
from mediator_cli.plan.moe_plan import BASE, MoePlan
from mediator_cli.recipe.moe import AVERAGE, MoeExpertSpec
from mediator_cli.recipe.schema import AssignSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.spans import Layout
    from mediator_cli.plan.model import Plan, TensorPlan
    from mediator_cli.recipe.load import LoadedRecipe

_ROW = 8
"""Widths of experts are multiples of this: rows of 16 bytes, as fast products of all experts at once want them."""
DEFAULT_NEURONS = 0.25


def plan_moe(loaded: LoadedRecipe, base: Checkpoint) -> MoePlan | None:
    """Say what MoE a recipe of kind moe makes, before its layers are known; None for other kinds."""
    name = format_name(loaded.recipe, base)
    if loaded.recipe.kind != "moe" or name is None:
        return None
    spec = loaded.recipe.moe_spec
    inner = base.tensors[block_tensor(0, "up_proj")].shape[0]
    if name == "granitemoeshared":
        inner = neuron_width(inner, spec.neurons or DEFAULT_NEURONS)
    names = expert_names(loaded.recipe)
    texts = read_texts(loaded)
    layers = certain_layers(loaded.recipe, base)
    return MoePlan(FORMATS[name], names, spec.experts_per_token, inner, spec, texts, layers)


def neuron_width(inner: int, share: float) -> int:
    """Give the width of an expert of a share of neurons: each takes two, the expert's and the shared one negated.

    >>> neuron_width(1536, 0.25)
    768
    """
    return -(-2 * round(share * inner) // _ROW) * _ROW


@dataclass(frozen=True)
class _Made:
    """A tensor of the MoE: which tensors, one behind the other, of which sources; zeros where there are none."""

    tensor: TensorPlan
    names: tuple[str, ...]
    sources: tuple[str, ...]


def as_moe(plan: Plan, layers: Sequence[int]) -> Plan:
    """Give the plan that writes the MoE: experts in these layers, copied; all else as the dense plan has it.

    The new plan routes nothing: what is left to decide by conflict was decided.
    """
    if plan.moe is None:
        raise RuntimeError("the plan makes no MoE")
    moe = replace(plan.moe, layers=tuple(layers))
    made = tuple(_all_tensors(plan, moe))
    recipe = plan.loaded.recipe.model_copy(update={"assign": AssignSpec(rule="none")})
    return replace(
        plan,
        loaded=replace(plan.loaded, recipe=recipe),
        tensors=tuple(each.tensor for each in made),
        candidates=(),
        listed=(),
        settings=replace(plan.settings, config=_config(plan, moe)),
        inputs=_inputs({tensor.name: tensor.size for tensor in plan.tensors}, made),
        moe=replace(moe, made=tuple(_extra_tensors(plan, moe))),
    )


def _inputs(sizes: Mapping[str, int], made: Sequence[_Made]) -> dict[str, Layout]:
    """Make the virtual checkpoints: the base, then as many inputs as any tensor has; `sizes` are the dense model's."""

    def spans(each: _Made, source: str) -> tuple[Span, ...]:
        whole = (Span(each.tensor.size, ()),)
        return tuple(Span(sizes[name], (Part(source, name, 0),)) for name in each.names) or whole

    inputs: dict[str, Layout] = {BASE: {each.tensor.name: spans(each, BASE) for each in made}}
    for at in range(max(len(each.sources) for each in made)):
        found = {each.tensor.name: spans(each, each.sources[at]) for each in made if at < len(each.sources)}
        inputs[f"input {at + 1}"] = found
    return inputs


def _config(plan: Plan, moe: MoePlan) -> dict[str, Any]:
    dense = [number for number in range(len(plan.layers)) if number not in (moe.layers or ())]
    form = moe.format
    return moe_config(plan.settings.config, form, len(moe.experts), moe.top_k, moe.inner, dense)


def _all_tensors(plan: Plan, moe: MoePlan) -> Iterator[_Made]:
    """Go through the dense model: its tensors as they are, or in the place of a block's first matrix its experts."""
    blocks = {block_tensor(layer, p): (layer, p) for layer in moe.layers or () for p in PROJECTIONS}
    for tensor in plan.tensors:
        if tensor.name not in blocks:
            yield _shared(plan, tensor, (tensor.name,))
            continue
        layer, projection = blocks[tensor.name]
        if moe.format.expert:
            for number, name in enumerate(moe.experts):
                renamed = replace(tensor, name=moe.format.expert_of(layer, number, projection))
                yield _copy(renamed, tensor.name, name, moe.spec.experts.get(name), projection)
        elif projection != "gate_proj":
            yield _shared_block(plan, tensor, layer, projection)
    yield from _zeros(plan, moe)


def _shared(plan: Plan, tensor: TensorPlan, names: tuple[str, ...]) -> _Made:
    """Merge a tensor as the dense plan says, or copy it from the source that all that is shared comes from."""
    source = plan.loaded.recipe.moe_spec.shared_from
    if source == AVERAGE and tensor.average is not None:
        return _Made(tensor, names, tuple(expert.name for expert in plan.experts))
    if source in (AVERAGE, BASE):
        return _Made(replace(tensor, average=None), names, ())
    return _Made(replace(tensor, average=_copying(), weights=(1.0,)), names, (source,))


def _shared_block(plan: Plan, tensor: TensorPlan, layer: int, projection: str) -> _Made:
    """Merge the feed-forward block that all experts of Granite share, whose gate and up are one matrix."""
    stem = f"model.layers.{layer}.shared_mlp"
    if projection == "down_proj":
        return _shared(plan, replace(tensor, name=f"{stem}.output_linear.weight"), (tensor.name,))
    both = (block_tensor(layer, "gate_proj"), tensor.name)
    inner, hidden = tensor.shape
    fused = replace(tensor, name=f"{stem}.input_linear.weight", shape=(2 * inner, hidden), size=2 * tensor.size)
    return _shared(plan, fused, both)


def _copying(scale: float = 1.0) -> ResolvedMethod:
    """Copy the only input, times a factor."""
    found = resolve_method("passthrough", None, {"scale": scale}, str)
    if not isinstance(found, ResolvedMethod):
        raise RuntimeError("passthrough is a method")
    return found


def _copy(tensor: TensorPlan, name: str, source: str, spec: MoeExpertSpec | None, projection: str) -> _Made:
    own = spec or MoeExpertSpec()
    scale = own.residual_scale if projection == "down_proj" else 1.0
    method = _copying(scale)
    if own.noise_scale:
        noisy = resolve_method("noisy_copy", None, {"scale": scale, "noise": own.noise_scale}, str)
        method = noisy if isinstance(noisy, ResolvedMethod) else method
    return _Made(replace(tensor, average=method, weights=(1.0,), mixable=False), (name,), (source,))


def _zeros(plan: Plan, moe: MoePlan) -> Iterator[_Made]:
    """Add what the format has and the base may lack: biases of attention, a shared expert that adds nothing."""
    present = {tensor.name for tensor in plan.tensors}
    for layer in range(len(plan.layers)):
        like = _tensor_at(plan, block_tensor(layer, "down_proj"))
        for name in TAKEN[moe.format.name].zeros:
            full, weight = f"model.layers.{layer}.{name}", f"model.layers.{layer}.{name.removesuffix('bias')}weight"
            if full not in present:
                yield _zero(like, full, (_tensor_at(plan, weight).shape[0],))
        if moe.format.name == "qwen2_moe" and layer in (moe.layers or ()):
            hidden = like.shape[0]
            for projection in PROJECTIONS:
                shape = (hidden, SHARED_WIDTH) if projection == "down_proj" else (SHARED_WIDTH, hidden)
                yield _zero(like, f"model.layers.{layer}.mlp.shared_expert.{projection}.weight", shape)


def _zero(like: TensorPlan, name: str, shape: tuple[int, ...]) -> _Made:
    tensor = replace(like, name=name, shape=shape, size=prod(shape), average=_copying(), weights=(1.0,), mixable=False)
    return _Made(tensor, (), (BASE,))


def _tensor_at(plan: Plan, name: str) -> TensorPlan:
    return next(tensor for tensor in plan.tensors if tensor.name == name)


def _extra_tensors(plan: Plan, moe: MoePlan) -> Iterator[NewTensor]:
    """Say what is made when all else is written: gates, and beside them what no source has."""
    form, n_experts = moe.format, len(moe.experts)
    for layer in moe.layers or ():
        like = _tensor_at(plan, block_tensor(layer, "down_proj"))
        hidden, inner = like.shape[0], moe.inner
        yield NewTensor(form.router_of(layer), like.dtype, (n_experts, hidden))
        stem = f"model.layers.{layer}"
        if form.name == "qwen2_moe":
            yield NewTensor(f"{stem}.mlp.shared_expert_gate.weight", like.dtype, (1, hidden))
        if form.name == "granitemoeshared":
            block = f"{stem}.block_sparse_moe"
            yield NewTensor(f"{block}.input_linear.weight", like.dtype, (n_experts, 2 * inner, hidden))
            yield NewTensor(f"{block}.output_linear.weight", like.dtype, (n_experts, hidden, inner))
