"""(Recipe, headers) to Plan: methods resolved first, then sources opened, every problem reported at once."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.gguf_file import gguf_notice
from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.checkpoint.hub.find import ONLINE, Access
from mediator_cli.checkpoint.layout import natural_key, place_of, unit_of
from mediator_cli.checkpoint.source import side_files, weight_files
from mediator_cli.checkpoint.vocabulary import is_tokenizer_file
from mediator_cli.errors import CheckpointError, Problem, RecipeError, did_you_mean
from mediator_cli.plan.adapters import base_notices, merges_adapters, plan_adapters
from mediator_cli.plan.align import plan_align, with_align
from mediator_cli.plan.differences import find_differences
from mediator_cli.plan.factors import check_factors
from mediator_cli.plan.keep import check_kept, find_kept
from mediator_cli.plan.model import Plan, TensorPlan
from mediator_cli.plan.moe.check import check_format, check_moe
from mediator_cli.plan.moe.make import plan_moe
from mediator_cli.plan.moments import check_moments, with_moments
from mediator_cli.plan.overrides import check_methods, check_overrides, resolve_settings, tell_unmatched
from mediator_cli.plan.router import check_router, check_router_base, resolve_router
from mediator_cli.plan.slice_checks import check_stack
from mediator_cli.plan.slice_settings import check_slices, with_slices
from mediator_cli.plan.slices import kept_in, stack_layers, with_stack
from mediator_cli.plan.sources import check_experts_alone, open_base, open_experts
from mediator_cli.plan.tokens.match import VocabularyPlan, plan_vocabulary
from mediator_cli.plan.tokens.settings import find_token_settings
from mediator_cli.plan.tokens.templates import chosen_template
from mediator_cli.plan.tokens.tensors import roles_of, with_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.plan.gradients import GradedMethod
    from mediator_cli.plan.keep import Kept
    from mediator_cli.plan.model import ExpertSource
    from mediator_cli.plan.overrides import TensorSettings
    from mediator_cli.recipe.load import LoadedRecipe

_OUTPUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SCORED_RULES = ("threshold", "top_k", "mean_std", "byte_budget")


def make_plan(loaded: LoadedRecipe, access: Access = ONLINE) -> Plan:
    """Resolve a recipe against its checkpoints; reads headers and configs only, those on the Hub as `access` allows.

    Raises RecipeError or CheckpointError with every problem found, ordered by line.
    """
    given, loaded = loaded, with_slices(loaded)
    methods, problems = check_methods(loaded)
    problems += check_slices(loaded, [each.method for each in methods])
    if loaded.recipe.slices and problems:
        raise RecipeError(loaded.ordered([*problems, *loaded.problems]))
    if merges_adapters(methods):
        return plan_adapters(loaded, methods, [*problems, *loaded.problems], access)
    problems += [*loaded.problems, *_check_experts(loaded, methods), *check_router(loaded)]
    problems += check_moments(loaded, methods)
    is_moe = loaded.recipe.kind == "moe"
    problems += check_moe(loaded) if is_moe else ()
    try:
        base = open_base(loaded, access)
        kept = find_kept(loaded, base)
        experts, faults = open_experts(loaded, base, kept, access)
        stack = stack_layers(loaded, base, experts, [*problems, *faults])
        shape, kept = (stack.shape, kept_in(stack, loaded)) if stack else (base, kept)
        problems += check_overrides(loaded, shape.tensors, kept.names, stack)
        settings, errors = resolve_settings(loaded, shape, kept.names, stack)
        problems += [error for error in errors if error not in problems]
        problems += check_stack(loaded, stack, settings, kept.names) if stack else []
        problems += check_kept(loaded, {*base.tensors, *(name for expert in experts for name in expert.tensors)})
        problems += [*faults, *_check_names(loaded, base), *_check_tokenizer(loaded, base, experts)]
        problems += check_router_base(loaded, base, tokenizer_folder(loaded, base, experts))
        vocabulary = VocabularyPlan() if faults else plan_vocabulary(loaded, base, experts, kept.names)
        problems += vocabulary.problems
        resized = {*vocabulary.rows, *(name for layout in vocabulary.layouts.values() for name in layout)}
        problems += check_factors(loaded, experts, resized)
        template, faults = chosen_template(loaded, _folders(base, experts).values())
        problems += faults
        align, faults = plan_align(loaded, base, experts, kept.names)
        problems += faults
        problems += check_format(loaded, base, experts) if is_moe else ()
    except CheckpointError as error:
        raise CheckpointError(
            loaded.ordered([*problems, *error.problems, *check_experts_alone(loaded, access)])
        ) from None
    if problems:
        raise RecipeError(loaded.ordered(problems))
    plan = _assemble(loaded, shape, tuple(experts), methods, settings, kept, vocabulary)
    said = (*plan.notices, *loaded.notices, *tell_unmatched(loaded, shape.tensors, stack))
    plan = replace(plan, loaded=given, notices=said, chat_template=template, moe=plan_moe(loaded, base))
    return with_moments(with_align(with_stack(plan, base, stack), align), access)


def _check_experts(loaded: LoadedRecipe, methods: Sequence[GradedMethod]) -> Iterator[Problem]:
    experts = loaded.recipe.experts
    for resolved in methods if not loaded.recipe.slices else ():
        fewest, most = resolved.method.n_inputs
        if len(experts) < fewest or (most is not None and len(experts) > most):
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            message = f"{resolved.method.name} merges {wanted} experts, the recipe has {len(experts)}"
            yield Problem(loaded.place("experts"), message, "choose another method or other experts")
    if loaded.recipe.assign.rule in _SCORED_RULES and len(experts) < 2:
        message = f"rule {loaded.recipe.assign.rule} compares experts, the recipe has one"
        yield Problem(loaded.place("assign", "rule"), message, "use rule none, all or listed")


def _check_names(loaded: LoadedRecipe, base: Checkpoint) -> Iterator[Problem]:
    names = list(base.tensors)
    units = list(dict.fromkeys(unit_of(name, loaded.recipe.conflict.unit) for name in names))
    for index, pattern in enumerate(loaded.recipe.assign.units or ()):
        if not any(fnmatchcase(unit, pattern) for unit in units):
            place = loaded.place("assign", "units", index)
            yield Problem(place, f"'{pattern}' matches no unit", did_you_mean(pattern, units[:8]))


def _check_tokenizer(loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource]) -> Iterator[Problem]:
    folder = tokenizer_folder(loaded, base, experts)
    is_missing = folder is not None and not any(map(is_tokenizer_file, side_files(folder)))
    if loaded.recipe.tokenizer_of != "base" and is_missing:
        yield Problem(loaded.place("tokenizer"), f"{folder} holds no tokenizer files", "use `tokenizer: base`")


def tokenizer_folder(loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource]) -> Path | None:
    """Find the folder whose tokenizer, chat template and generation config win; None if that expert did not open."""
    return _folders(base, experts).get(loaded.recipe.tokenizer_of)


def _folders(base: Checkpoint, experts: Sequence[ExpertSource]) -> dict[str, Path]:
    return {"base": base.path, **{expert.name: expert.source.path for expert in experts}}


def _with_rows(tensor: TensorPlan, rows: int | None) -> TensorPlan:
    shape = tensor.shape if rows is None else with_rows(tensor.shape, rows)
    return replace(tensor, shape=shape, size=prod(shape))


def _assemble(
    loaded: LoadedRecipe,
    base: Checkpoint,
    experts: tuple[ExpertSource, ...],
    methods: list[GradedMethod],
    settings: Mapping[str, TensorSettings],
    kept: Kept,
    vocabulary: VocabularyPlan,
) -> Plan:
    planned = (_tensor_plan(loaded, base, name, settings[name]) for name in sorted(base.tensors, key=natural_key))
    resized = (_with_rows(tensor, vocabulary.rows.get(tensor.name)) for tensor in planned)
    roles = roles_of(base.tensors, base.config)
    fitted = (replace(tensor, role=roles.get(tensor.name, "linear")) for tensor in resized)
    tensors = tuple(replace(tensor, average=None) if tensor.name in kept.names else tensor for tensor in fitted)
    folder = tokenizer_folder(loaded, base, experts) or base.path
    tokens = find_token_settings(base, folder, vocabulary)
    units = tuple(dict.fromkeys(tensor.unit for tensor in tensors if tensor.average is not None))
    patterns = loaded.recipe.assign.units or ()
    router, notices = resolve_router(loaded)
    return Plan(
        loaded=loaded,
        base=base,
        experts=experts,
        tensors=tensors,
        candidates=tuple(unit for unit in units if _is_candidate(loaded, unit)),
        listed=tuple(unit for unit in units if any(fnmatchcase(unit, pattern) for pattern in patterns)),
        tokenizer_folder=folder,
        settings=tokens,
        differences=tuple(find_differences(_folders(base, experts), loaded.recipe, tokens)),
        notices=(
            *vocabulary.notices,
            *tokens.notices,
            *kept.notices,
            *_notices(loaded, base, experts, methods),
            *notices,
        ),
        router=router,
        vocabulary=vocabulary.layouts,
        union=vocabulary.union,
    )


def _is_candidate(loaded: LoadedRecipe, unit: str) -> bool:
    # A layer's own name has no part behind its number, so ask as if for a tensor of it.
    spec = loaded.recipe.assign
    chosen = spec.candidates or ("all" if spec.rule == "all" else "layers")
    return chosen == "all" or place_of(f"{unit}.weight").layer is not None


def _tensor_plan(loaded: LoadedRecipe, base: Checkpoint, name: str, settings: TensorSettings) -> TensorPlan:
    info = base.tensors[name]
    is_float = info.dtype in FLOAT_DTYPES
    dtype = _OUTPUT_DTYPES.get(loaded.recipe.output.dtype, _written(info.dtype)) if is_float else info.dtype
    unit = unit_of(name, loaded.recipe.conflict.unit)
    average = settings.average if is_float else None
    return TensorPlan(name, unit, info.shape, info.size, dtype, average, settings.extract, settings.weights)


def _written(dtype: str) -> str:
    # All arithmetic is in float32, so a float64 tensor would only pretend to be more exact.
    return "F32" if dtype == "F64" else dtype


def _notices(
    loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource], methods: Sequence[GradedMethod]
) -> Iterator[str]:
    for folder in dict.fromkeys((base.path, *(expert.source.path for expert in experts))):
        if said := gguf_notice(folder):
            yield said
    for expert in experts:
        yield from expert.notices
        if expert.kind == "full" and weight_files(expert.tensors) == weight_files(base.tensors):
            yield f"expert {expert.name} is the base itself"
    yield from base_notices(loaded, base, experts)
    if loaded.recipe.output.dtype == "base" and any(info.dtype == "F64" for info in base.tensors.values()):
        yield "float64 tensors of the base are merged and written in float32"
    weighted = len({e.weight for e in experts}) > 1 or any(override.weights for override in loaded.recipe.overrides)
    if weighted and any(not resolved.method.uses_weights for resolved in methods):
        yield "expert weights are ignored by " + ", ".join(m.method.name for m in methods if not m.method.uses_weights)
