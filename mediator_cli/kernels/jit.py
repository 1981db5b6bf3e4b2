"""The one way to compile a loop."""

from __future__ import annotations

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
    return cast("F", numba.njit(nogil=True, cache=True, error_model="numpy")(function))
