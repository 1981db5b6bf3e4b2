"""Experts that are kept as their factors: which can be, and which of what they change the bundle has a place for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.adapter.factors import not_factors
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.errors import Problem, RecipeError, some_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from mediator_cli.plan.model import ExpertSource, Plan, TensorPlan
    from mediator_cli.recipe.load import LoadedRecipe


def keeps_factors(loaded: LoadedRecipe) -> bool:
    """Whether a recipe keeps experts as their factors: where nothing is routed, no expert is kept at all."""
    return loaded.recipe.extract.mode == "factors" and loaded.recipe.assign.rule != "none"


def check_factors(loaded: LoadedRecipe, experts: Sequence[ExpertSource], resized: Collection[str]) -> Iterator[Problem]:
    """Say which experts are no plain LoRA adapters, and what of the recipe changes the rows or columns of factors.

    `resized` are the tensors whose rows of tokens the recipe changes.
    """
    if not keeps_factors(loaded):
        return
    if loaded.recipe.align is not None:
        message = "puts hidden units in another order, and mode factors keeps adapters as they are"
        yield Problem(loaded.place("align"), message, "leave `align` out: adapters of one base are in its order")
    for index, spec in enumerate(loaded.recipe.experts):
        place = loaded.place("experts", index, "model")
        source = next((expert.source for expert in experts if expert.name == spec.name), None)
        if isinstance(source, Adapter):
            yield from _misfits(place, source, resized)
        elif source is not None:
            message = f"{spec.name} is a full checkpoint, and mode factors keeps LoRA adapters as they are"
            command = f"mediator extract-lora {loaded.recipe.base} {spec.model} -o {spec.name}-lora"
            yield Problem(place, message, f"extract an adapter first: {command}")


def _misfits(place: str, adapter: Adapter, resized: Collection[str]) -> Iterator[Problem]:
    for problem in not_factors(adapter):
        yield replace(problem, place=f"{place}: {problem.place}")
    if changed := [name for name in adapter.changes if name in resized]:
        message = f"changes {some_names(changed)}, whose rows of tokens the recipe changes as well"
        hint = "leave out tokenizer, tokens and pad_tokens_to, or use `extract: {mode: sparse}`"
        yield Problem(f"{place}: {adapter.path}", message, hint)


def check_changes(plan: Plan) -> Plan:
    """Check that what adapters change can be kept as factors, in a plan that knows what the run time can mix.

    What lies outside the units that may be routed is told. Raises RecipeError for what cannot be mixed for each input,
    and for an expert of which nothing would be kept. Other plans are given back as they are.
    """
    if not keeps_factors(plan.loaded):
        return plan
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    adapters = {expert.name: expert.source for expert in plan.experts if isinstance(expert.source, Adapter)}
    changed = {name: [tensors[tensor] for tensor in adapter.changes] for name, adapter in adapters.items()}
    if problems := [*_unmixable(plan, changed), *_nothing_kept(plan, changed)]:
        raise RecipeError(plan.loaded.ordered(problems))
    return replace(plan, notices=(*plan.notices, *_notices(plan, changed)))


def _unmixable(plan: Plan, changed: Mapping[str, Sequence[TensorPlan]]) -> Iterator[Problem]:
    units = _open_units(plan)
    for expert, tensors in changed.items():
        if names := [t.name for t in tensors if t.unit in units and t.average is not None and not t.mixable]:
            message = f"changes {some_names(names)}, which the run time cannot mix for each input"
            hint = "`keep_base: [GLOB]` leaves such tensors to the base; `extract: {mode: sparse}` averages them"
            yield Problem(_place(plan, expert), message, hint)


def _nothing_kept(plan: Plan, changed: Mapping[str, Sequence[TensorPlan]]) -> Iterator[Problem]:
    units = _open_units(plan)
    for expert, tensors in changed.items():
        if not any(tensor.unit in units and tensor.can_be_routed for tensor in tensors):
            message = f"{expert} changes nothing in the units that may be routed, so none of it would be kept"
            yield Problem(_place(plan, expert), message, "write `assign: {rule: all}`, or leave the expert out")


def _notices(plan: Plan, changed: Mapping[str, Sequence[TensorPlan]]) -> Iterator[str]:
    units = _open_units(plan)
    every = {tensor.name: tensor for tensors in changed.values() for tensor in tensors}.values()
    if names := [tensor.name for tensor in every if tensor.average is None]:
        yield f"left to the base, though adapters change them: {some_names(names)} (keep_base)"
    if names := [tensor.name for tensor in every if tensor.average is not None and tensor.unit not in units]:
        yield f"merged for all inputs, as their units are not routed: {some_names(names)}; `assign: {{rule: all}}` does"
    if len({expert.weight for expert in plan.experts}) > 1:
        yield "expert weights have no say where experts are kept as factors, only where units are averaged"


def _open_units(plan: Plan) -> set[str]:
    return {*(plan.listed if plan.loaded.recipe.assign.rule == "listed" else plan.candidates)}


def _place(plan: Plan, expert: str) -> str:
    names = [spec.name for spec in plan.loaded.recipe.experts]
    return plan.loaded.place("experts", names.index(expert), "model")
