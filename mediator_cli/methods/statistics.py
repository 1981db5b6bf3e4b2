"""What methods declare and are given: names of their kinds, statistics of slabs, rows and matrices, factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from mediator_cli.kernels.arrays import Doubles, Floats

Params = Mapping[str, Any]
Space = Literal["delta", "weight", "adapter"]
Scope = Literal["element", "matrix"]
Role = Literal["linear", "embedding", "head"]
"""What a tensor is: rows of `embedding` and `head` are tokens; all other tensors, matrices or not, are `linear`."""
View = Literal["elements", "matrix", "transposed"]
"""How a matrix is given to a method: in slabs, whole as it is stored (out, in), or whole and transposed."""
Over = Literal["tensor", "model"]
Statistics = Mapping[str, NDArray[Any]]
Factor = Literal["A", "B", "delta"]
Uniforms = Callable[[int, Factor, tuple[int, ...]], Floats]
"""Gives the uniform numbers in [0, 1) that belong to a factor, or the dense delta, of one adapter; of that shape."""


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


def once(n: int) -> int:
    """Say that a statistic is found once, however many inputs there are."""
    return 1


@dataclass(frozen=True)
class Select:
    """A statistic: the k-th largest magnitude of each input, exactly; float32 [n]; inf for k = 0, 0 if k reaches all.

    `count` gives k from the parameters and the number of entries, or instead of that what the Sum named `among` has
    counted. `of` gives what is ranked, float32 [n, m], default the inputs; if `joint` it is one row [1, m].
    If `whole` it is given whole matrices and may give another number of entries of each, counted by `among`.
    If `smallest`, a k that reaches all gives the smallest magnitude instead of 0. If `signed`, values are ranked, not
    their magnitudes. Two in a row with the same `of` share their passes. It is found `rounds(n)` times in turn for n
    inputs, each time with what it was before among the statistics.
    """

    name: str
    count: Callable[[Params, int], int]
    over: Callable[[Params], Over]
    needed: Callable[[Params], bool]
    of: Callable[[Slab], Floats] = inputs_of
    among: str | None = None
    joint: bool = False
    whole: bool = False
    smallest: bool = False
    signed: bool = False
    rounds: Callable[[int], int] = once


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


@dataclass(frozen=True)
class Position:
    """A statistic: where a slab lies in the model; int64 [2], the place of its first entry and the entries of all.

    Places are counted over all tensors that the method merges with the same choices, in the plan's order.
    """

    name: str
    needed: Callable[[Params], bool]

    def over(self, params: Params) -> Over:
        """Say that places are counted over the model."""
        return "model"


Statistic = Select | Sum | Position


@dataclass(frozen=True)
class PerRow:
    """A statistic: what each entry gets from the whole row in which it lies; [n, m], cut to the slab.

    `find` takes whole rows [n, rows, length] and the parameters, of a method that `needs_base` also the base's rows
    [rows, length], and gives an array of the first's shape. A row runs along the last axis of a tensor; a vector is
    one row. With `length`, rows are so many entries each of the flattened tensor, the last as many as are left; all
    of a method have the same. It is needed too where experts differ in the parameter `where_own`.
    """

    name: str
    find: Callable[..., NDArray[Any]]
    needed: Callable[[Params], bool]
    length: Callable[[Params], int] | None = None
    where_own: str = ""


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
