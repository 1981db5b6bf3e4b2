"""Kernels where nothing can be kept on disk."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from mediator_cli.kernels.jit import kernel


def test_a_kernel_compiles_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = numba.njit

    def without_cache(*functions: object, **options: object) -> object:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(*functions, **options)

    monkeypatch.setattr(numba, "njit", without_cache)

    def doubled(row: np.ndarray) -> float:
        return row.sum() * 2

    assert kernel(doubled)(np.ones(3)) == 6.0
