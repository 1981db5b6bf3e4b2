"""How much the rows of deltas disagree, block by block: counts over masks of one bit an entry, sums in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.jit import kernel
from mediator_cli.kernels.lanes import LANES, TILE, aligned, total

Words = NDArray[np.uint32]
"""Masks: entry k of a block of L words is bit k // L of word k % L, so that 32 entries a step are 32 words apart."""
_BITS = 32


@kernel
def count_blocks(deltas: Floats, means: Floats, limits: Floats, block: int, out: Doubles) -> None:
    """Count conflicts in each block of deltas [n, m] into a row of `out` [blocks, 3·n² + n + 2].

    An entry is kept if |x - mean| > limit, in float32, with its row's mean and limit [n]; zeros are in no count. A row
    has the tables [n, n] of kept pairs with opposite signs, of kept pairs, and of inner products of all entries, then
    how many are kept [n], positions with two opposite signs, and positions that two or more keep.
    """
    n, n_words = deltas.shape[0], -(-block // _BITS)
    positive, negative = np.empty((n, n_words), np.uint32), np.empty((n, n_words), np.uint32)
    wide, lanes = aligned(n * TILE).reshape(n, TILE), aligned(n * (n + 1) // 2 * LANES).reshape(-1, LANES)
    for b in range(out.shape[0]):
        first, row = b * block, out[b]
        for i in range(n):
            mark_signs(deltas[i, first : first + block], means[i], limits[i], positive[i], negative[i])
        count_pairs(positive, negative, row)
        count_positions(positive, negative, row)
        sum_products(deltas, first, min(first + block, deltas.shape[1]), wide, lanes)
        spread(lanes, row[2 * n * n : 3 * n * n].reshape(n, n))


@kernel
def mark_signs(row: Floats, mean: float, limit: float, positive: Words, negative: Words) -> None:
    """Set the bits of the kept entries [m] above and below zero, and clear all others."""
    zero, none = np.float32(0), np.uint32(0)
    n_words = positive.shape[0]
    positive[:] = none
    negative[:] = none
    for k in range(_BITS):
        bit, part = np.uint32(np.uint32(1) << np.uint32(k)), row[k * n_words : (k + 1) * n_words]
        for w in range(part.shape[0]):
            is_kept = abs(part[w] - mean) > limit
            positive[w] |= bit if is_kept & (part[w] > zero) else none
            negative[w] |= bit if is_kept & (part[w] < zero) else none


@kernel
def count_bits(word: int) -> int:
    """Count the bits that are set in a uint32, in the form which compilers know to be one instruction."""
    v = np.uint32(word - np.uint32(np.uint32(word >> np.uint32(1)) & np.uint32(0x55555555)))
    v = np.uint32((v & np.uint32(0x33333333)) + np.uint32(np.uint32(v >> np.uint32(2)) & np.uint32(0x33333333)))
    v = np.uint32(np.uint32(v + np.uint32(v >> np.uint32(4))) & np.uint32(0x0F0F0F0F))
    return int(np.uint32(v * np.uint32(0x01010101)) >> np.uint32(24))


@kernel
def count_pairs(positive: Words, negative: Words, row: Doubles) -> None:
    """Count, for all pairs, entries that both keep, and those among them with opposite signs; and each one's own."""
    n, n_words = positive.shape
    for i in range(n):
        up, down = positive[i], negative[i]
        for j in range(i, n):
            other_up, other_down = positive[j], negative[j]
            opposite, both = 0, 0
            for w in range(n_words):
                opposite += count_bits((up[w] & other_down[w]) | (down[w] & other_up[w]))
                both += count_bits((up[w] | down[w]) & (other_up[w] | other_down[w]))
            row[i * n + j] = row[j * n + i] = opposite
            row[n * n + i * n + j] = row[n * n + j * n + i] = both
        row[3 * n * n + i] = row[n * n + i * n + i]


@kernel
def count_positions(positive: Words, negative: Words, row: Doubles) -> None:
    """Count positions where any two signs differ, and those that two or more keep: the last two of `row`."""
    n, n_words = positive.shape
    any_up, any_down, shared = np.zeros(n_words, np.uint32), np.zeros(n_words, np.uint32), np.zeros(n_words, np.uint32)
    for i in range(n):
        up, down = positive[i], negative[i]
        for w in range(n_words):
            shared[w] |= (any_up[w] | any_down[w]) & (up[w] | down[w])
            any_up[w] |= up[w]
            any_down[w] |= down[w]
    n_opposite, n_shared = 0, 0
    for w in range(n_words):
        n_opposite += count_bits(any_up[w] & any_down[w])
        n_shared += count_bits(shared[w])
    row[-2], row[-1] = n_opposite, n_shared


@kernel
def sum_products(deltas: Floats, start: int, stop: int, wide: Doubles, lanes: Doubles) -> None:
    """Sum the products of all pairs of rows over entries `start` to `stop` into lanes [n·(n + 1) / 2, lanes]."""
    n = deltas.shape[0]
    lanes[:] = 0.0
    for t in range(start, stop, TILE):
        for i in range(n):
            part, tile = deltas[i, t : min(t + TILE, stop)], wide[i]
            if part.shape[0] < TILE:
                tile[:] = 0.0
            for k in range(part.shape[0]):
                tile[k] = part[k]
        pair = 0
        for i in range(n):
            for j in range(i, n):
                # In this function, since a call costs more than a tile; four products at once spare loads of the sums.
                a, b, sums = wide[i], wide[j], lanes[pair]
                for k in range(LANES):
                    first = a[k] * b[k] + a[k + LANES] * b[k + LANES]
                    second = a[k + 2 * LANES] * b[k + 2 * LANES] + a[k + 3 * LANES] * b[k + 3 * LANES]
                    sums[k] += first + second
                pair += 1


@kernel
def spread(lanes: Doubles, table: Doubles) -> None:
    """Add up the lanes of each pair of rows into a symmetric table [n, n]."""
    pair = 0
    for i in range(table.shape[0]):
        for j in range(i, table.shape[0]):
            table[i, j] = table[j, i] = total(lanes[pair])
            pair += 1


@kernel
def sum_moments(deltas: Floats, block: int, out: Doubles) -> None:
    """Sum x and x² over each block of deltas [n, m] into `out` [blocks, 2, n]."""
    first, second = aligned(LANES), aligned(LANES)
    tail = np.empty(TILE, np.float32)
    for b in range(out.shape[0]):
        for i in range(deltas.shape[0]):
            row = deltas[i, b * block : (b + 1) * block]
            first[:] = 0.0
            second[:] = 0.0
            for t in range(0, row.shape[0], TILE):
                tile = row[t : t + TILE]
                if tile.shape[0] < TILE:
                    tail[:] = np.float32(0)
                    tail[: tile.shape[0]] = tile
                    tile = tail
                for k in range(LANES):
                    p, q = np.float64(tile[k]), np.float64(tile[k + LANES])
                    r, s = np.float64(tile[k + 2 * LANES]), np.float64(tile[k + 3 * LANES])
                    first[k] += (p + q) + (r + s)
                    second[k] += (p * p + q * q) + (r * r + s * s)
            out[b, 0, i], out[b, 1, i] = total(first), total(second)
