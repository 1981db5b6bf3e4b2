"""A registered method, and one with its parameters resolved: what the engine and the documentation know of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mediator_cli.errors import Problem
from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods.statistics import (
    Params,
    PerRow,
    Role,
    Scope,
    Space,
    Statistic,
    Statistics,
    Uniforms,
    View,
    some_copies,
)


@dataclass(frozen=True)
class Method:
    """A registered method and what the engine and the documentation need to know of it.

    `space` may depend on the parameters.
    `check` tells what is wrong with parameters that are valid one by one; the place of its problem is a field's name.
    `view` says how matrices are given to a method of matrix scope; `working_bytes` what it takes to merge n of them.
    Numbers in `per_expert` may differ between experts: only statistics of each input by itself depend on them.
    """

    name: str
    function: Callable[..., Floats]
    space: Space | Callable[[Params], Space]
    reference: str
    schema: type[BaseModel]
    view: Callable[[Role, Params], View] | None = None
    working_bytes: Callable[[int, int, int], int] = some_copies
    statistics: tuple[Statistic, ...] = ()
    rows: tuple[PerRow, ...] = ()
    presets: Mapping[str, Params] = field(default_factory=dict)
    n_inputs: tuple[int, int | None] = (1, None)
    random: bool = False
    symmetric: bool = True
    identity_at_one: bool = False
    uses_weights: bool = True
    positive_weights: bool = False
    needs_base: bool = False
    needs_moments: bool = False
    per_expert: tuple[str, ...] = ()
    normalizes: Callable[[Params], bool] | None = None
    check: Callable[[Params], Problem | None] | None = None

    @property
    def works_on(self) -> str:
        """What the method combines, in words."""
        return "weights or deltas" if callable(self.space) else f"{self.space}s"

    @property
    def scope(self) -> Scope:
        """What the method has to see at a time."""
        return "matrix" if self.view or self.space == "adapter" else "element"

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


@dataclass(frozen=True)
class ResolvedMethod:
    """A method with all parameters after presets and defaults; `key` is equal for equal work.

    `gradients` has the anchors of parameters that change over the layers; `params` what they come to here. `own` has
    the numbers of each input in which these differ, of which `params` has the smallest; `own_written` what was asked.
    """

    method: Method
    params: Params
    gradients: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    own_written: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A text that is the same for the same method and parameters."""
        params = {**self.params, **self.own}
        return f"{self.method.name}({', '.join(f'{k}={v!r}' for k, v in sorted(params.items()))})"

    def params_of(self, number: int) -> Params:
        """Give the parameters as they are for one input."""
        return {**self.params, **{name: values[number] for name, values in self.own.items()}}

    @property
    def written(self) -> dict[str, Any]:
        """All parameters, with the anchors where they change over the layers."""
        gradients = {name: list(anchors) for name, anchors in self.gradients.items()}
        return {**self.params, **gradients, **self.own_written}

    @property
    def space(self) -> Space:
        """What these parameters combine: the experts' weights, or their deltas."""
        space = self.method.space
        return space(self.params) if callable(space) else space

    def view_of(self, shape: tuple[int, ...], role: Role) -> View:
        """Say how a tensor is given to the method: 2-D and 3-D ones, whose matrices are no vectors, as `view` says."""
        if self.method.view is None or len(shape) not in (2, 3) or min(shape[-2:]) < 2 or not all(shape):
            return "elements"
        return self.method.view(role, self.params)

    def needed_statistics(self) -> tuple[Statistic, ...]:
        """The statistics that these parameters call for, in the order in which they must be found."""
        return tuple(statistic for statistic in self.method.statistics if statistic.needed(self.params))

    @property
    def needs_rows(self) -> bool:
        """Whether these parameters call for statistics of whole rows."""
        return any(self._needs(statistic) for statistic in self.method.rows)

    def _needs(self, statistic: PerRow) -> bool:
        return statistic.needed(self.params) or statistic.where_own in self.own

    def row_length(self, length: int) -> int:
        """Say how long the rows are from which entries get something; `length` is that of the last axis."""
        own = [each.length(self.params) for each in self.method.rows if each.length and self._needs(each)]
        return own[0] if own else length

    def find_in_rows(self, inputs: Floats, length: int, base: Floats | None = None) -> dict[str, NDArray[Any]]:
        """Find what entries get from their rows: for inputs [n, m] of whole rows, arrays [n, m] by name.

        A method that needs the base sees its rows too, from `base` [m].
        """
        length = self.row_length(length)
        if parts := self._without_rest(inputs, length, base):
            return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
        rows = inputs.reshape(len(inputs), -1, length) if inputs.shape[1] >= length > 0 else inputs[:, None]
        beside = () if base is None or not self.method.needs_base else (base.reshape(rows.shape[1:]),)
        needed = [statistic for statistic in self.method.rows if self._needs(statistic)]
        return {each.name: self._find(each, rows, beside).reshape(inputs.shape) for each in needed}

    def _find(self, statistic: PerRow, rows: Floats, beside: tuple[Floats, ...]) -> NDArray[Any]:
        """Look at all inputs together, or at each with its own parameters where these differ."""
        if not self.own:
            return statistic.find(rows, self.params, *beside)
        each = [statistic.find(rows[at : at + 1], self.params_of(at), *beside) for at in range(len(rows))]
        return np.concatenate(each)

    def _without_rest(self, inputs: Floats, length: int, base: Floats | None) -> list[dict[str, NDArray[Any]]]:
        """Look at the rows, and at the rest that is shorter than a row, by themselves; nothing where none is left."""
        end = inputs.shape[1] // length * length if length else 0
        cuts = [slice(end), slice(end, None)] if 0 < end < inputs.shape[1] else []
        flat = None if base is None else base.reshape(-1)
        return [self.find_in_rows(inputs[:, at], length, None if flat is None else flat[at]) for at in cuts]

    def __call__(
        self,
        inputs: Floats,
        weights: Doubles,
        statistics: Statistics | None = None,
        uniforms: Floats | None = None,
        base: Floats | None = None,
    ) -> Floats:
        """Combine inputs [n, m] to [m], or matrices [n, rows, columns]; a delta method's answer is without the base."""
        extra: dict[str, Any] = dict(statistics or {})
        if self.method.random:
            extra["uniforms"] = uniforms
        if self.method.needs_base:
            extra["base"] = base
        return self.method.function(inputs, weights, **{_argument(k): v for k, v in self.params.items()}, **extra)

    def merge_factors(self, adapters: Sequence[Factors], weights: Doubles, uniforms: Uniforms | None = None) -> Factors:
        """Combine what adapters, in recipe order, add to one matrix; for a method of space `adapter`."""
        extra: dict[str, Any] = {"uniforms": uniforms} if self.method.random else {}
        named = {_argument(name): value for name, value in self.params.items()}
        return cast("Factors", self.method.function(adapters, weights, **named, **extra))


def _argument(field_name: str) -> str:
    return f"{field_name}_" if field_name == "lambda" else field_name
