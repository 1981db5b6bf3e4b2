"""Numbers that change over the layers: where a tensor stands between the first and the last, and what holds there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.layout import layers_of, place_of
from mediator_cli.errors import Problem
from mediator_cli.methods.registry import Method, Params, ResolvedMethod, methods, resolve_method
from mediator_cli.plan.tokens.tensors import token_embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.header import TensorInfo


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


def positions(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, float]:
    """Place each tensor between 0, the first layer of its stack, and 1, the last; one layer alone stands at 1.

    Token embeddings come before the layers and stand at 0; all others outside the layers stand at 1.
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
    return {name: at.get(place_of(name).layer or "", 0.0 if name in embeddings else 1.0) for name in tensors}


@dataclass(frozen=True)
class GradedMethod:
    """A method with all parameters; `gradients` has the anchors of those that change over the layers."""

    method: Method
    params: Params
    gradients: Mapping[str, tuple[float, ...]]

    def at(self, position: float) -> ResolvedMethod:
        """Give the method as it is at one position between the first layer and the last."""
        here = {name: value_at(anchors, position) for name, anchors in self.gradients.items()}
        return ResolvedMethod(self.method, {**self.params, **here}, self.gradients)


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
