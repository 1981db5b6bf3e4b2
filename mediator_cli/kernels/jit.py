"""The one way to compile a loop."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar, cast

import numba

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., object]")


def kernel(function: F) -> F:
    """Compile a loop over numpy arrays that runs without the interpreter's lock; kept on disk for the next process.

    Floats are neither reordered nor contracted, so that bits are the same on every machine. Division by zero gives
    inf or nan as numpy does.
    """
    try:
        return cast("F", numba.njit(nogil=True, cache=True, error_model="numpy")(function))
    except RuntimeError:
        # Where neither the package nor the user's cache can be written, each process compiles for itself.
        return cast("F", numba.njit(nogil=True, error_model="numpy")(function))


def spare_scipy() -> None:
    """Load numba's array functions without its check for scipy's linear algebra, which takes as long as all the rest.

    Only for a process that compiles nothing but kernels of this package: products of matrices are then no part of
    what numba can compile.
    """
    blocked = "scipy.linalg.cython_blas"
    if blocked in sys.modules:
        return
    sys.modules[blocked] = None  # type: ignore[assignment]  # how an import is made to fail
    try:
        import_module("numba.np.arraymath")
    finally:
        del sys.modules[blocked]
