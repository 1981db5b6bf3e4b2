"""Prune the experts one after the other, so that no two keep the same entry, and add what is left."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.errors import Problem
from mediator_cli.kernels.arrays import Doubles, Flags, Floats
from mediator_cli.methods._kernels_scores import sizes_left, take_largest
from mediator_cli.methods._ops import Lambda, floats, keep_marked, kth_magnitudes, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Params, PerRow, Select, Slab, over_tensor


def _prunes_blocks(params: Params) -> bool:
    return bool(params["prune"] == "n:m")


def _prunes_tensors(params: Params) -> bool:
    return bool(params["prune"] == "magnitude")


def _block_length(params: Params) -> int:
    return int(params["m"])


def _marks_of_blocks(rows: Floats, params: Params) -> Flags:
    """Mark what each expert keeps of blocks [n, blocks, m]; nothing of a block that is too short."""
    marks = np.zeros(rows.shape, np.bool_)
    if rows.shape[2] < params["m"]:
        return marks
    taken, sizes, at = np.zeros(rows.shape[1:], np.bool_), np.empty(rows.shape[1:], np.float32), -params["n"]
    for blocks, mark in zip(rows, marks, strict=True):
        sizes_left(floats(blocks), taken, sizes)
        limits = np.partition(sizes, at, axis=1)[:, at]
        take_largest(sizes, floats(limits), params["n"], taken, mark)
    return marks


def _limit_rank(params: Params, n: int) -> int:
    """Give the rank of the largest entry that is pruned: index int(n·(1 - density)) of the ascending ones."""
    # Rounded, so that 1 - 0.3 counts as the 0.7 that it stands for.
    return n - int(n * round(1 - params["density"], 12))


def _marks_above(deltas: Floats, limits: Floats) -> Flags:
    """Mark what each expert keeps of deltas [n, m]: what lies above its limit [n] and no expert before keeps."""
    above = np.abs(deltas) > limits[:, None]
    free = np.logical_or.accumulate(above, axis=0)
    above[1:] &= ~free[:-1]
    return above


def _left_over(slab: Slab) -> Floats:
    """Give the deltas without what experts before them keep, as far as their limits are known."""
    limits = slab.statistics.get("limits")
    return slab.inputs if limits is None else _without_taken(slab.inputs, limits)


def _without_taken(deltas: Floats, limits: Floats) -> Floats:
    marks = _marks_above(deltas, limits)
    taken = np.zeros_like(marks)
    taken[1:] = np.logical_or.accumulate(marks, axis=0)[:-1]
    return keep_marked(deltas, ~taken)


def _limits(deltas: Floats, params: Params) -> Floats:
    """Find the limits [n] one after the other: what an expert may keep depends on those before it."""
    rank = _limit_rank(params, deltas.shape[1])
    limits = np.full(len(deltas), np.inf, np.float32)
    for expert in range(len(deltas)):
        limits[expert] = kth_magnitudes(_without_taken(deltas, limits)[expert : expert + 1], rank)[0]
    return limits


def _check(params: Params) -> Problem | None:
    if params["n"] <= params["m"]:
        return None
    return Problem("n", f"keeps {params['n']} of every {params['m']} entries", "choose n no larger than m")


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2503.01874",
    statistics=(Select("limits", _limit_rank, over_tensor, _prunes_tensors, of=_left_over, rounds=lambda n: n),),
    rows=(PerRow("marks", _marks_of_blocks, _prunes_blocks, length=_block_length),),
    symmetric=False,
    check=_check,
)
def cabs(
    deltas: Floats,
    weights: Doubles,
    *,
    prune: Annotated[
        Literal["n:m", "magnitude"],
        Field(description="n:m: keep the n largest of every m entries. magnitude: a share of each tensor."),
    ] = "n:m",
    n: Annotated[int, Field(ge=1, description="Entries kept of each block, for `prune: n:m`.")] = 64,
    m: Annotated[int, Field(ge=1, le=32768, description="Entries of a block, for `prune: n:m`.")] = 256,
    density: Annotated[
        float, Field(gt=0, le=1, description="Share of each tensor that is kept, for `prune: magnitude`.")
    ] = 0.25,
    lambda_: Lambda = 1.0,
    marks: Flags | None = None,
    limits: Floats | None = None,
) -> Floats:
    """Prune the experts one by one, each where those before keep nothing, and add what is left.

    W₀ + λ · Σ wₜ·τ̂ₜ, with the experts in the recipe's order. n:m: blocks of m entries follow each other in the
    flattened tensor; each expert sets to zero what earlier ones keep, then keeps its n largest of every block, the
    first of equal ones. A block at the end that is shorter keeps nothing. magnitude: the same with a share of the
    tensor, of which the entry at index int(N·(1 - density)) in rising order and all up to it are pruned. Nothing is
    rescaled.

    Apt when experts overlap and would overwrite each other; blocks keep every part of a tensor alive. Put the expert
    that matters most first: it alone chooses freely.

    Not apt when n·experts exceeds m: later experts find their blocks taken.

    Elsewhere: the authors have two experts; more go on in the same way, behind all before them. Defaults are those of
    their script for 7B models, whose branch for n of at least m/2 leaves the second expert too dense, and is not
    followed. Their recipes scale with 0.4 to 1.2.

    >>> tau = np.array([[4, 1, 2, 3], [9, 5, 1, 8]], np.float32)
    >>> cabs(tau, np.ones(2), n=1, m=2).tolist()
    [4.0, 5.0, 1.0, 3.0]
    """
    params = {"prune": prune, "n": n, "m": m, "density": density}
    if prune == "magnitude":
        kept = _marks_above(deltas, _limits(deltas, params) if limits is None else limits)
    else:
        kept = _blocks(deltas, params) if marks is None else marks
    return weighted_sum(keep_marked(deltas, kept), weights, factor=lambda_)


def _blocks(deltas: Floats, params: Params) -> Flags:
    """Mark what is kept of deltas [n, size] that begin with a block."""
    end = deltas.shape[1] // params["m"] * params["m"]
    marks = np.zeros(deltas.shape, np.bool_)
    whole = deltas[:, :end].reshape(len(deltas), -1, params["m"])
    marks[:, :end] = _marks_of_blocks(whole, params).reshape(len(deltas), end)
    return marks
