"""Numbers that change over the layers: where a tensor stands between the first and the last, and what holds there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from dataclasses import field as default_field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.checkpoint.layout import layers_of, place_of
from mediator_cli.errors import Problem, did_you_mean
from mediator_cli.methods.method import Method, ResolvedMethod
from mediator_cli.methods.registry import methods, resolve_method
from mediator_cli.methods.statistics import Params
from mediator_cli.plan.tokens.tensors import token_embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.header import TensorInfo


OTHERS = "*"
"""Where a parameter has values by expert: that of all experts that are not named."""


def value_at(value: float | Sequence[float], position: float) -> float:
    """Read a number, or anchors spread evenly over positions 0 to 1 with straight lines between them.

    >>> value_at(0.5, 0.3), value_at([0.0, 1.0, 0.0], 0.25), value_at([2.0], 0.7)
    (0.5, 0.5, 2.0)
    """
    if not isinstance(value, list | tuple):
        return float(value)  # type: ignore[arg-type]
    scaled = position * (len(value) - 1)
    first = int(scaled)
    rest = scaled - first
    last = value[min(first + 1, len(value) - 1)]
    return float((1 - rest) * value[first] + rest * last)


def positions(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], outside: Literal["near", "first"] = "near"
) -> dict[str, float]:
    """Place each tensor between 0, the first layer of its stack, and 1, the last; one layer alone stands at 1.

    Token embeddings come before the layers and stand at 0; all others outside the layers stand at 1, or with `first`
    at 0 too.
    """
    stacks: dict[str, list[str]] = {}
    for layer in layers_of(tensors):
        stacks.setdefault(layer.rpartition(".")[0], []).append(layer)
    at = {
        layer: index / (len(stack) - 1) if len(stack) > 1 else 1.0
        for stack in stacks.values()
        for index, layer in enumerate(stack)
    }
    embeddings = set(token_embeddings(tensors, config))
    last = 1.0 if outside == "near" else 0.0
    return {name: at.get(place_of(name).layer or "", 0.0 if name in embeddings else last) for name in tensors}


@dataclass(frozen=True)
class GradedMethod:
    """A method with all parameters; `gradients` has the anchors of those that change over the layers.

    `own` has what experts have for themselves, by parameter and expert.
    """

    method: Method
    params: Params
    gradients: Mapping[str, tuple[float, ...]]
    own: Mapping[str, Mapping[str, float | tuple[float, ...]]] = default_field(default_factory=dict)

    def at(self, position: float, inputs: Sequence[str] = ()) -> ResolvedMethod:
        """Give the method as it is at one position between the first layer and the last, for inputs by their names."""
        here = {name: value_at(anchors, position) for name, anchors in self.gradients.items()}
        params = {**self.params, **here}
        found = {
            name: tuple(value_at(values.get(each, params[name]), position) for each in inputs)
            for name, values in self.own.items()
        }
        params |= {name: min(values) for name, values in found.items() if values}
        differing = {name: values for name, values in found.items() if len(set(values)) > 1}
        written = {name: _written(values) for name, values in self.own.items()}
        return ResolvedMethod(self.method, params, self.gradients, differing, written)


def _written(values: Mapping[str, float | tuple[float, ...]]) -> dict[str, float | list[float]]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def resolve_own(
    name: str, preset: str | None, given: Params, place: Callable[..., str], experts: Sequence[str]
) -> GradedMethod | list[Problem]:
    """Resolve a method whose parameters may have a value for each expert, `*` for all others; see resolve_graded."""
    mappings = {field: value for field, value in given.items() if isinstance(value, dict)}
    plain = {field: value for field, value in given.items() if field not in mappings}
    plain |= {field: values[OTHERS] for field, values in mappings.items() if OTHERS in values}
    answer = resolve_graded(name, preset, plain, place)
    problems = answer if isinstance(answer, list) else []
    own: dict[str, dict[str, float | tuple[float, ...]]] = {}
    for field, values in mappings.items():
        problems = [*problems, *_check_own(name, field, values, place, experts)]
        for expert, value in values.items():
            at = partial(_place_of, place, field, expert)
            found = resolve_graded(name, preset, {**plain, field: value}, at) if not problems else []
            if isinstance(found, GradedMethod):
                own.setdefault(field, {})[expert] = found.gradients.get(field, found.params[field])
            else:
                problems = [*problems, *(problem for problem in found if problem not in problems)]
    if problems or isinstance(answer, list):
        return problems
    named = {field: {name: v for name, v in values.items() if name != OTHERS} for field, values in own.items()}
    return replace(answer, own=named)


def _place_of(place: Callable[..., str], field: str, expert: str, name: str, *rest: int) -> str:
    return place(name, expert, *rest) if name == field else place(name, *rest)


def _check_own(
    name: str, field: str, values: Mapping[str, Any], place: Callable[..., str], experts: Sequence[str]
) -> Iterator[Problem]:
    known = methods()
    if name in known and field not in known[name].per_expert:
        allowed = ", ".join(known[name].per_expert) or "none"
        yield Problem(place(field), f"'{field}' of {name} is one for all experts", f"those that may differ: {allowed}")
    for expert in values:
        if expert not in (*experts, OTHERS):
            yield Problem(place(field, expert), f"no expert '{expert}'", did_you_mean(str(expert), experts))


def resolve_graded(
    name: str, preset: str | None, given: Params, place: Callable[..., str]
) -> GradedMethod | list[Problem]:
    """Check method, preset and parameters, every anchor by itself; give the method or all that is wrong.

    `place` turns the name of a field, and the index of an anchor, into where the user wrote it.
    """
    lists = {field: value for field, value in given.items() if isinstance(value, list)}
    if problems := list(_check_lists(name, lists, place)):
        return problems
    found: dict[str, list[float]] = {field: [] for field in lists}
    params: Params = {}
    # A method knows numbers only, so it is resolved once for each anchor.
    for index in range(max([1, *map(len, lists.values())])):
        here = {field: min(index, len(anchors) - 1) for field, anchors in lists.items()}
        answer = resolve_method(name, preset, {**given, **{f: lists[f][n] for f, n in here.items()}}, _at(place, here))
        if not isinstance(answer, ResolvedMethod):
            problems += [problem for problem in answer if problem not in problems]
            continue
        params = params or answer.params
        for field, anchors in lists.items():
            found[field] += [float(answer.params[field])] if index < len(anchors) else []
    if problems:
        return problems
    return GradedMethod(methods()[name], params, {field: tuple(anchors) for field, anchors in found.items()})


def _at(place: Callable[..., str], indices: Mapping[str, int]) -> Callable[[str], str]:
    return lambda field: place(field, indices[field]) if field in indices else place(field)


def _check_lists(name: str, lists: Mapping[str, list[Any]], place: Callable[..., str]) -> Iterator[Problem]:
    """Refuse lists that are no anchors of a number."""
    known = methods()
    fields = known[name].schema.model_fields if name in known else {}
    for field, anchors in lists.items():
        if field in fields and fields[field].annotation is not float:
            message = f"a list of anchors is for numbers; '{field}' of {name} is none"
            yield Problem(place(field), message, f"see `mediator methods {name}`")
        elif not anchors:
            yield Problem(place(field), "a list of anchors is empty", "write a number, or one for each anchor")
