"""Matrices that a method has to see whole, one at a time; everything else goes by in slabs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from mediator_cli.engine.streams import Piece, pieces
from mediator_cli.errors import MediatorError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from mediator_cli.methods.statistics import View
    from mediator_cli.plan.model import TensorPlan

Scalar = TypeVar("Scalar", bound=np.generic)


def view_of(tensor: TensorPlan) -> View:
    """Say how a tensor is given to the method that merges it."""
    return "elements" if tensor.average is None else tensor.average.view_of(tensor.shape, tensor.role)


def parts_of(tensors: Iterable[TensorPlan], slab: int, as_slabs: frozenset[str] = frozenset()) -> list[Piece]:
    """Cut tensors, one after the other: a piece for each matrix that is seen whole, slabs of all others.

    Those named in `as_slabs` are cut into slabs in any case.
    """
    return [
        piece
        for tensor in tensors
        for piece in (pieces(tensor.name, tensor.size, slab) if tensor.name in as_slabs else _parts(tensor, slab))
    ]


def _parts(tensor: TensorPlan, slab: int) -> list[Piece]:
    whole = tensor.size if view_of(tensor) == "elements" else prod(tensor.shape[-2:])
    return pieces(tensor.name, tensor.size, slab if view_of(tensor) == "elements" else whole)


def as_seen(tensor: TensorPlan, rows: NDArray[Scalar]) -> NDArray[Scalar]:
    """Give the rows [n, m] of a piece as the method sees it: a slab as it is, a matrix as [n, rows, columns]."""
    view = view_of(tensor)
    if view == "elements":
        return rows
    matrices = rows.reshape(len(rows), *tensor.shape[-2:])
    return matrices if view == "matrix" else np.ascontiguousarray(matrices.swapaxes(1, 2))


def as_stored(tensor: TensorPlan, merged: NDArray[Scalar]) -> NDArray[Scalar]:
    """Flatten what a method gave for a piece into the order in which the tensor is stored; [m]."""
    stored = merged.T if view_of(tensor) == "transposed" else merged
    return np.ascontiguousarray(stored).ravel()


def whole_bytes(tensors: Iterable[TensorPlan], n_experts: int) -> int:
    """Count the bytes that merging the largest whole matrix takes: inputs, base, result, the method's own."""
    return max((_whole_bytes(tensor, n_experts) for tensor in tensors), default=0)


def _whole_bytes(tensor: TensorPlan, n_experts: int) -> int:
    if tensor.average is None or view_of(tensor) == "elements":
        return 0
    rows, columns = tensor.shape[-2:]
    copies = 2 * n_experts if view_of(tensor) == "transposed" else n_experts
    return 4 * (copies + 4) * rows * columns + tensor.average.method.working_bytes(n_experts, rows, columns)


@contextmanager
def one_blas_thread(tensors: Sequence[TensorPlan]) -> Iterator[None]:
    """Let linear algebra run on the thread that asks for it, where any tensor is seen whole.

    The workers are as many as the processors already, and the bits would depend on the number of threads.
    """
    if all(view_of(tensor) == "elements" for tensor in tensors):
        yield
        return
    with threadpool_limits(1, user_api="blas"):
        yield


@contextmanager
def naming(tensor: str) -> Iterator[None]:
    """Say on which tensor a method failed, which knows but numbers; raise MediatorError for what LAPACK cannot do."""
    try:
        yield
    except MediatorError as error:
        raise type(error)([replace(each, place=each.place or tensor) for each in error.problems]) from None
    except np.linalg.LinAlgError as error:
        hint = "look for extreme values in the experts' tensors, or take a method that merges single entries"
        raise MediatorError(Problem(tensor, f"the method cannot be carried out here: {error}", hint)) from None
