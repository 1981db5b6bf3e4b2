"""The contract of a merge method: its signature is its schema, its decorator says how to stream it.

A method is a pure function of slabs as numpy arrays. Two positional arguments: `deltas [n, m]` (space `delta`)
or `tensors [n, m]` (space `weight`) in float32, and `weights [n]` in float64. Its keyword-only arguments are, by name:
statistics that it declares, `uniforms [n, m]` if it is random, and everything else is a parameter of the recipe.
It gives float32 [m] and never changes what it is given.

A method that declares a `view` has the scope of matrices: it is given each matrix whole, `[n, rows, columns]`, one at
a time, and gives `[rows, columns]`; of a 3-D tensor each slice is a matrix. All other tensors, and matrices that the
view leaves to elements, come as slabs `[n, m]`, and the method merges them entry by entry.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

import mediator_cli.methods as package
from mediator_cli.errors import Problem, did_you_mean
from mediator_cli.kernels.arrays import Doubles, Floats

Params = Mapping[str, Any]
Space = Literal["delta", "weight"]
Scope = Literal["element", "matrix"]
Role = Literal["linear", "embedding", "head"]
"""What a tensor is: rows of `embedding` and `head` are tokens; all other tensors, matrices or not, are `linear`."""
View = Literal["elements", "matrix", "transposed"]
"""How a matrix is given to a method: in slabs, whole as it is stored (out, in), or whole and transposed."""
Over = Literal["tensor", "model"]
Statistics = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Slab:
    """What a statistic sees of one slab: inputs [n, m], weights [n], parameters, statistics found before it.

    Inputs and uniforms are [n, rows, columns] where a statistic looks at whole matrices and the tensor is seen as such.
    """

    inputs: Floats
    weights: Doubles
    params: Params
    statistics: Statistics
    uniforms: Floats | None


def inputs_of(slab: Slab) -> Floats:
    """Give the inputs as they are."""
    return slab.inputs


@dataclass(frozen=True)
class Select:
    """A statistic: the k-th largest magnitude of each input, exactly; float32 [n]; inf for k = 0, 0 if k reaches all.

    `count` gives k from the parameters and the number of entries, or instead of that what the Sum named `among` has
    counted. `of` gives what is ranked, float32 [n, m], default the inputs; if `joint` it is one row [1, m].
    If `whole` it is given whole matrices and may give another number of entries of each, counted by `among`.
    """

    name: str
    count: Callable[[Params, int], int]
    over: Callable[[Params], Over]
    needed: Callable[[Params], bool]
    of: Callable[[Slab], Floats] = inputs_of
    among: str | None = None
    joint: bool = False
    whole: bool = False


def one_number(n: int) -> tuple[int, ...]:
    """Say that a sum is a single number."""
    return (1,)


@dataclass(frozen=True)
class Sum:
    """A statistic: the sum over fixed blocks of what `block` gives for one block, in float64, in block order.

    `shape` gives the shape of that from the number of inputs. If `whole` a block is a whole matrix.
    """

    name: str
    block: Callable[[Slab], Doubles]
    over: Callable[[Params], Over]
    needed: Callable[[Params], bool]
    shape: Callable[[int], tuple[int, ...]] = one_number
    whole: bool = False


Statistic = Select | Sum


@dataclass(frozen=True)
class PerRow:
    """A statistic: what each entry gets from the whole row in which it lies; [n, m], cut to the slab.

    `find` takes whole rows [n, rows, length] and the parameters and gives an array of that shape. A row runs along
    the last axis of a tensor; a vector is one row.
    """

    name: str
    find: Callable[[Floats, Params], NDArray[Any]]
    needed: Callable[[Params], bool]


def over_tensor(params: Params) -> Over:
    """Say that a statistic is always taken per tensor."""
    return "tensor"


def always(params: Params) -> bool:
    """Say that a statistic is always needed."""
    return True


def linear_maps(role: Role, params: Params) -> View:
    """See all matrices whole but those with a row per token, unless the parameter `embeddings` says so."""
    is_map = role == "linear" or params.get("embeddings") == "matrix"
    return "matrix" if is_map else "elements"


def some_copies(n: int, rows: int, columns: int) -> int:
    """Give the bytes of a float64 copy of all inputs and of as many results, as a method on matrices may need."""
    return 8 * (2 * n + 4) * rows * columns


@dataclass(frozen=True)
class Method:
    """A registered method and what the engine and the documentation need to know of it.

    `check` tells what is wrong with parameters that are valid one by one; the place of its problem is a field's name.
    `view` says how matrices are given to a method of matrix scope; `working_bytes` what it takes to merge n of them.
    """

    name: str
    function: Callable[..., Floats]
    space: Space
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
    normalizes: Callable[[Params], bool] | None = None
    check: Callable[[Params], Problem | None] | None = None

    @property
    def scope(self) -> Scope:
        """What the method has to see at a time."""
        return "matrix" if self.view else "element"

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


@dataclass(frozen=True)
class ResolvedMethod:
    """A method with all parameters after presets and defaults; `key` is equal for equal work.

    `gradients` has the anchors of parameters that change over the layers; `params` what they come to here.
    """

    method: Method
    params: Params
    gradients: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A text that is the same for the same method and parameters."""
        return f"{self.method.name}({', '.join(f'{k}={v!r}' for k, v in sorted(self.params.items()))})"

    @property
    def written(self) -> dict[str, Any]:
        """All parameters, with the anchors where they change over the layers."""
        return {**self.params, **{name: list(anchors) for name, anchors in self.gradients.items()}}

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
        return any(statistic.needed(self.params) for statistic in self.method.rows)

    def find_in_rows(self, inputs: Floats, length: int) -> dict[str, NDArray[Any]]:
        """Find what entries get from their rows: for inputs [n, m] of whole rows, arrays [n, m] by name."""
        rows = inputs.reshape(len(inputs), -1, length) if inputs.size else inputs[:, None]
        needed = [statistic for statistic in self.method.rows if statistic.needed(self.params)]
        return {statistic.name: statistic.find(rows, self.params).reshape(inputs.shape) for statistic in needed}

    def __call__(
        self,
        inputs: Floats,
        weights: Doubles,
        statistics: Statistics | None = None,
        uniforms: Floats | None = None,
    ) -> Floats:
        """Combine inputs [n, m] to [m], or matrices [n, rows, columns]; a delta method's answer is without the base."""
        extra: dict[str, Any] = dict(statistics or {})
        if self.method.random:
            extra["uniforms"] = uniforms
        return self.method.function(inputs, weights, **{_argument(k): v for k, v in self.params.items()}, **extra)


_REGISTERED: dict[str, Method] = {}


def merge_method(*, space: Space, reference: str, **facts: Any) -> Callable[..., Any]:  # noqa: ANN401 - Method's own fields
    """Register a function as a merge method under its own name; `facts` are fields of Method."""

    def register(function: Callable[..., Floats]) -> Callable[..., Floats]:
        names = {statistic.name for statistic in (*facts.get("statistics", ()), *facts.get("rows", ()))}
        schema = _schema_of(function, names | {"uniforms"})
        _REGISTERED[function.__name__] = Method(function.__name__, function, space, reference, schema, **facts)
        return function

    return register


def _argument(field_name: str) -> str:
    return f"{field_name}_" if field_name == "lambda" else field_name


def _schema_of(function: Callable[..., Any], not_parameters: set[str]) -> type[BaseModel]:
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in not_parameters:
            fields[parameter.name.rstrip("_")] = (hints[parameter.name], parameter.default)
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid", strict=True, frozen=True), **fields)


def methods() -> dict[str, Method]:
    """Return all methods by name: those of this package, then those of installed packages."""
    for module in iter_modules(package.__path__):
        if not module.name.startswith("_") and module.name != "registry":
            import_module(f"{package.__name__}.{module.name}")
    for point in entry_points(group="mediator_cli.methods"):
        point.load()
    return dict(sorted(_REGISTERED.items()))


def get_method(name: str) -> Method:
    """Return a method by name; raise KeyError with a suggestion when there is none."""
    known = methods()
    if name not in known:
        raise KeyError(did_you_mean(name, known))
    return known[name]


def resolve_method(
    name: str, preset: str | None, given: Params, place: Callable[[str], str]
) -> ResolvedMethod | list[Problem]:
    """Check method, preset and parameters; give the resolved method or all that is wrong with them.

    `place` turns the name of a field into where the user wrote it.
    """
    known = methods()
    if name not in known:
        return [Problem(place("method"), f"unknown merge method '{name}'", did_you_mean(name, known))]
    method = known[name]
    presets = {"paper": {}, **method.presets}
    if preset is not None and preset not in presets:
        return [Problem(place("preset"), f"{name} has no preset '{preset}'", did_you_mean(preset, presets))]
    values = {**presets[preset or "paper"], **given}
    try:
        params = method.schema.model_validate(values).model_dump()
    except ValidationError as error:
        return [_parameter_problem(method, place, item) for item in error.errors(include_url=False)]
    wrong = method.check(params) if method.check else None
    return [replace(wrong, place=place(wrong.place))] if wrong else ResolvedMethod(method, params)


def _parameter_problem(method: Method, place: Callable[[str], str], item: Any) -> Problem:  # noqa: ANN401 - pydantic's dict
    name = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        known = list(method.schema.model_fields)
        hint = did_you_mean(name, known) if known else f"{method.name} takes no parameters"
        return Problem(place(name), f"{method.name} has no parameter '{name}'", hint)
    if item["type"] == "missing":
        return Problem(place(name), f"{method.name} needs '{name}'", f"see `mediator methods {method.name}`")
    message = item["msg"][0].lower() + item["msg"][1:]
    return Problem(place(name), f"{message} (got {item['input']!r})", f"see `mediator methods {method.name}`")
