"""(Recipe, headers) to Plan: methods resolved first, then sources opened, every problem reported at once."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.adapter import Adapter
from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.checkpoint.layout import natural_key, place_of, unit_of
from mediator_cli.checkpoint.source import side_files, weight_files
from mediator_cli.errors import CheckpointError, Problem, RecipeError, did_you_mean
from mediator_cli.methods.registry import ResolvedMethod, resolve_method
from mediator_cli.plan.differences import find_differences
from mediator_cli.plan.model import Plan, ResolvedExtract, TensorPlan
from mediator_cli.plan.router import check_router, check_router_base, resolve_router
from mediator_cli.plan.sources import check_experts_alone, open_base, open_experts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.plan.model import ExpertSource
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.schema import AverageSpec, ExtractSpec

_OUTPUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SCORED_RULES = ("threshold", "top_k", "mean_std")

BY_MAGNITUDE = 0.4
"""Kept values are multiplied by density ** -this; the best of those tried on validation rows, see the README."""


def make_plan(loaded: LoadedRecipe) -> Plan:
    """Resolve a recipe against its checkpoints; reads headers and configs only.

    Raises RecipeError or CheckpointError with every problem found, ordered by line.
    """
    methods, problems = _resolve_methods(loaded)
    problems += [*loaded.problems, *_check_experts(loaded, methods), *check_router(loaded)]
    try:
        base = open_base(loaded)
        experts, faults = open_experts(loaded, base)
        problems += [*faults, *_check_names(loaded, base), *_check_tokenizer(loaded, base, experts)]
        problems += check_router_base(loaded, base, tokenizer_folder(loaded, base, experts))
    except CheckpointError as error:
        raise CheckpointError(loaded.ordered([*problems, *error.problems, *check_experts_alone(loaded)])) from None
    if problems:
        raise RecipeError(loaded.ordered(problems))
    return _assemble(loaded, base, tuple(experts), methods)


def _resolve_methods(loaded: LoadedRecipe) -> tuple[list[ResolvedMethod], list[Problem]]:
    """Resolve the recipe's method (first) and those of the overrides, in order."""
    specs: list[tuple[AverageSpec, tuple[str | int, ...]]] = [(loaded.recipe.average, ("average",))]
    for index, override in enumerate(loaded.recipe.overrides):
        if override.average is not None:
            specs.append((override.average, ("overrides", index, "average")))
    resolved: list[ResolvedMethod] = []
    problems: list[Problem] = []
    for spec, field in specs:
        answer = resolve_method(spec.method, spec.preset, spec.params, partial(loaded.place, *field))
        if isinstance(answer, ResolvedMethod):
            resolved.append(answer)
        else:
            problems += answer
    return resolved, problems


def _check_experts(loaded: LoadedRecipe, methods: Sequence[ResolvedMethod]) -> Iterator[Problem]:
    experts = loaded.recipe.experts
    for resolved in methods:
        fewest, most = resolved.method.n_inputs
        if len(experts) < fewest or (most is not None and len(experts) > most):
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            message = f"{resolved.method.name} merges {wanted} experts, the recipe has {len(experts)}"
            yield Problem(loaded.place("experts"), message, "choose another method or other experts")
        normalizes = resolved.method.normalizes
        if normalizes is not None and normalizes(resolved.params) and abs(sum(e.weight for e in experts)) < 1e-12:
            message = f"the weights sum to zero, and {resolved.method.name} divides by their sum"
            yield Problem(loaded.place("experts"), message, "change a weight or set normalize: false")
    if loaded.recipe.assign.rule in _SCORED_RULES and len(experts) < 2:
        message = f"rule {loaded.recipe.assign.rule} compares experts, the recipe has one"
        yield Problem(loaded.place("assign", "rule"), message, "use rule none, all or listed")


def _check_names(loaded: LoadedRecipe, base: Checkpoint) -> Iterator[Problem]:
    names = list(base.tensors)
    for index, override in enumerate(loaded.recipe.overrides):
        if not any(fnmatchcase(name, override.match) for name in names):
            hint = f"tensor names look like {names[-1]}"
            yield Problem(loaded.place("overrides", index, "match"), f"'{override.match}' matches no tensor", hint)
    units = list(dict.fromkeys(unit_of(name, loaded.recipe.conflict.unit) for name in names))
    for index, pattern in enumerate(loaded.recipe.assign.units or ()):
        if not any(fnmatchcase(unit, pattern) for unit in units):
            place = loaded.place("assign", "units", index)
            yield Problem(place, f"'{pattern}' matches no unit", did_you_mean(pattern, units[:8]))


def _check_tokenizer(loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource]) -> Iterator[Problem]:
    folder = tokenizer_folder(loaded, base, experts)
    if loaded.recipe.tokenizer != "base" and folder is not None and not side_files(folder):
        yield Problem(loaded.place("tokenizer"), f"{folder} holds no tokenizer files", "use `tokenizer: base`")


def tokenizer_folder(loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource]) -> Path | None:
    """Find the folder whose tokenizer, chat template and generation config win; None if that expert did not open."""
    name = loaded.recipe.tokenizer.removeprefix("expert:")
    return {"base": base.path, **{expert.name: expert.source.path for expert in experts}}.get(name)


def _assemble(
    loaded: LoadedRecipe, base: Checkpoint, experts: tuple[ExpertSource, ...], methods: list[ResolvedMethod]
) -> Plan:
    tensors = tuple(_tensor_plan(loaded, base, name, methods) for name in sorted(base.tensors, key=natural_key))
    folder = tokenizer_folder(loaded, base, experts) or base.path
    folders = {"base": base.path, **{expert.name: expert.source.path for expert in experts}}
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
        differences=tuple(find_differences(folders, loaded.recipe.tokenizer.removeprefix("expert:"))),
        notices=(*_notices(loaded, base, experts, methods), *notices),
        router=router,
    )


def _is_candidate(loaded: LoadedRecipe, unit: str) -> bool:
    # A layer's own name has no part behind its number, so ask as if for a tensor of it.
    spec = loaded.recipe.assign
    chosen = spec.candidates or ("all" if spec.rule == "all" else "layers")
    return chosen == "all" or place_of(f"{unit}.weight").layer is not None


def _tensor_plan(loaded: LoadedRecipe, base: Checkpoint, name: str, methods: list[ResolvedMethod]) -> TensorPlan:
    info = base.tensors[name]
    average, extract, used = methods[0], loaded.recipe.extract, 0
    for override in loaded.recipe.overrides:
        used += override.average is not None
        if not fnmatchcase(name, override.match):
            continue
        average = methods[used] if override.average is not None else average
        if override.extract is not None:
            extract = extract.model_copy(update=override.extract.model_dump(exclude_none=True))
    is_float = info.dtype in FLOAT_DTYPES
    dtype = _OUTPUT_DTYPES.get(loaded.recipe.output.dtype, _written(info.dtype)) if is_float else info.dtype
    unit = unit_of(name, loaded.recipe.conflict.unit)
    return TensorPlan(name, unit, info.shape, info.size, dtype, average if is_float else None, resolve_extract(extract))


def _written(dtype: str) -> str:
    # All arithmetic is in float32, so a float64 tensor would only pretend to be more exact.
    return "F32" if dtype == "F64" else dtype


def resolve_extract(extract: ExtractSpec) -> ResolvedExtract:
    """Fill the defaults in that depend on other fields."""
    return ResolvedExtract(extract.density, extract.select, _rescale(extract), extract.values)


def _rescale(extract: ExtractSpec) -> float:
    if isinstance(extract.rescale, bool):
        return 1 / extract.density if extract.rescale else 1.0
    if extract.rescale is not None:
        return extract.rescale
    # At random, the expectation is kept. The largest entries are more than their share of the delta; how much is lost
    # with the others was measured on the demo's experts.
    exponent = 1.0 if extract.select == "random" else BY_MAGNITUDE
    return float(extract.density**-exponent)


def _notices(
    loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource], methods: Sequence[ResolvedMethod]
) -> Iterator[str]:
    for expert in experts:
        source = expert.source
        if isinstance(source, Adapter) and not _same_base(source.base_name, loaded.recipe.base, base.path):
            yield f"adapter {expert.name} names base '{source.base_name}', the recipe's base is '{loaded.recipe.base}'"
        if expert.kind == "full" and weight_files(expert.tensors) == weight_files(base.tensors):
            yield f"expert {expert.name} is the base itself"
    if loaded.recipe.output.dtype == "base" and any(info.dtype == "F64" for info in base.tensors.values()):
        yield "float64 tensors of the base are merged and written in float32"
    if any(not resolved.method.uses_weights for resolved in methods) and len({e.weight for e in experts}) > 1:
        yield "expert weights are ignored by " + ", ".join(m.method.name for m in methods if not m.method.uses_weights)


def _same_base(named: str, written: str, folder: Path) -> bool:
    plain = written.rstrip("/").split("@")[0]
    return named in ("", written, plain, str(folder)) or named.rstrip("/").split("/")[-1] == folder.name
