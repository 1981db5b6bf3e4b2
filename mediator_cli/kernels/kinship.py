"""Inner products of all pairs of deltas, block by block."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.conflict import spread, sum_products
from mediator_cli.kernels.jit import kernel
from mediator_cli.kernels.lanes import LANES, TILE, aligned


@kernel
def sum_pairs(deltas: Floats, block: int, out: Doubles) -> None:
    """Sum the products of all pairs of rows [n, m] over each block into `out` [blocks, n, n], in float64."""
    n = deltas.shape[0]
    wide, lanes = aligned(n * TILE).reshape(n, TILE), aligned(n * (n + 1) // 2 * LANES).reshape(-1, LANES)
    for b in range(out.shape[0]):
        sum_products(deltas, b * block, min((b + 1) * block, deltas.shape[1]), wide, lanes)
        spread(lanes, out[b])
