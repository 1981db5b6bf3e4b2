"""Second moments of experts: opened by their headers, and checked against the tensors that are merged by them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.formats import refuse_pointers
from mediator_cli.checkpoint.header import FLOAT_DTYPES, read_header
from mediator_cli.checkpoint.source import Checkpoint, find_location, look_at
from mediator_cli.errors import CheckpointError, Problem, RecipeError, some_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.plan.gradients import GradedMethod
    from mediator_cli.plan.model import ExpertSource, Plan, TensorPlan
    from mediator_cli.recipe.load import LoadedRecipe

_FIELD = "second_moments"
_SUFFIX = ".exp_avg_sq"
_OTHER_METHOD = "merge such tensors by another method in `overrides`"


def check_moments(loaded: LoadedRecipe, methods: Sequence[GradedMethod]) -> Iterator[Problem]:
    """Name the experts without second moments where a method needs those of all; needs no checkpoint."""
    names = sorted({each.method.name for each in methods if each.method.needs_moments})
    for index, spec in enumerate(loaded.recipe.experts):
        if names and spec.second_moments is None:
            yield _without(loaded, index, names[0])


def _without(loaded: LoadedRecipe, index: int, method: str) -> Problem:
    message = f"{method} needs the second moments of every expert, {loaded.recipe.experts[index].name} has none"
    hint = f"name the safetensors with its exp_avg_sq as `{_FIELD}`, or choose another method"
    return Problem(loaded.place("experts", index, _FIELD), message, hint)


def with_moments(plan: Plan, access: Access) -> Plan:
    """Open the second moments that the plan's methods need; raise RecipeError with all that is wrong with them."""
    merged = [(tensor, tensor.average.method) for tensor in plan.tensors if tensor.average is not None and tensor.size]
    needed = {tensor.name: method.name for tensor, method in merged if method.needs_moments}
    given = [spec.name for spec in plan.loaded.recipe.experts if spec.second_moments is not None]
    if not needed:
        ignored = f"second moments of {', '.join(given)} are ignored: no method uses them"
        return replace(plan, notices=(*plan.notices, ignored)) if given else plan
    problems = list(_stacked(plan))
    experts: list[ExpertSource] = []
    for index, expert in enumerate(plan.experts):
        try:
            opened, faults = _opened(plan, index, needed, access)
        except CheckpointError as error:
            place = plan.loaded.place("experts", index, _FIELD)
            problems += [replace(problem, place=f"{place}: {problem.place}") for problem in error.problems]
            continue
        problems += faults
        experts.append(replace(expert, moments=opened))
    if problems:
        raise RecipeError(plan.loaded.ordered(problems))
    return replace(plan, experts=tuple(experts))


def _opened(
    plan: Plan, index: int, needed: Mapping[str, str], access: Access
) -> tuple[Checkpoint | None, list[Problem]]:
    """Open the second moments of one expert for tensors with their methods; what is wrong with them."""
    written = plan.loaded.recipe.experts[index].second_moments
    if written is None:
        return None, [_without(plan.loaded, index, next(iter(needed.values())))]
    opened = _open(plan.loaded, written, access)
    found = {name: info for name in needed if (info := _find(opened, name)) is not None}
    where = f"{plan.loaded.place('experts', index, _FIELD)}: {opened.path}"
    tensors = [tensor for tensor in plan.tensors if tensor.name in needed]
    return replace(opened, tensors=found), list(_misfits(where, plan, plan.experts[index].name, tensors, found))


def _open(loaded: LoadedRecipe, source: str, access: Access) -> Checkpoint:
    """Read the headers of a file of safetensors, or of a folder of them, which may be one on the Hub or at a URL."""
    path = loaded.resolve(source)
    if path.suffix == ".safetensors" and path.is_file():
        refuse_pointers([path])
        return Checkpoint(path, {}, {info.name: info for info in read_header(path).tensors})
    location = find_location(source, path, access)
    return look_at(location.folder, location.repo)


def _find(moments: Checkpoint, name: str) -> TensorInfo | None:
    return moments.tensors.get(name) or moments.tensors.get(f"{name}{_SUFFIX}")


def _stacked(plan: Plan) -> Iterator[Problem]:
    if plan.inputs:
        message = "layers from ranges of layers have no second moments"
        yield Problem(plan.loaded.place("slices"), message, "choose another method")


def _misfits(
    where: str, plan: Plan, expert: str, needed: Sequence[TensorPlan], found: Mapping[str, TensorInfo]
) -> Iterator[Problem]:
    if missing := [tensor.name for tensor in needed if tensor.name not in found]:
        hint = f"they go by the base's names, or those with {_SUFFIX} behind them; {_OTHER_METHOD}"
        yield Problem(where, f"lacks the second moments of {some_names(missing)}", hint)
    moved = plan.vocabulary.get(expert, {})
    for tensor in needed:
        info = found.get(tensor.name)
        if info is not None and tensor.name in moved:
            message = f"the rows of expert {expert} are arranged by the output's tokens, its second moments are not"
            yield Problem(f"{where} {info.name}", message, _OTHER_METHOD)
        elif info is not None and info.shape != tensor.shape:
            message = f"shape {list(info.shape)}, the merged tensor has {list(tensor.shape)}"
            yield Problem(f"{where} {info.name}", message, "are these the second moments of this expert?")
        elif info is not None and info.dtype not in FLOAT_DTYPES:
            yield Problem(f"{where} {info.name}", f"dtype {info.dtype}, floats are needed", "save them as float32")
