"""Put the inner neurons of one expert in the order of another's: an expert is the same in any order of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mediator_cli.kernels.arrays import Counts, Doubles, Floats
    from mediator_cli.moe.compress.matrices import Matrices

_COMPONENTS = 64


def by_weights(reference: Matrices, other: Matrices) -> Counts | None:
    """Order by ⟨W_in^ref, P W_in⟩ + ⟨W_out^ref, W_out Pᵀ⟩, as M-SMoE does; see `best_order`."""
    gate, up, down = (left @ right.T for left, right in zip(reference.rows, other.rows, strict=True))
    return best_order(gate + up + down)


def by_activations(cosines: Doubles, reference: Matrices, other: Matrices, seed: int) -> Counts | None:
    """Order by what neurons say and what they are, as REAM does; see `best_order`.

    The cost is the distance of the activations over the tokens, scaled to length 1, from their `cosines` [inner of the
    reference, inner of the other], and that of 64 principal components of the rows [gate | up | downᵀ], scaled to
    length 1 too. Principal components by a randomised SVD of both experts together, the same for a seed.
    """
    said = np.sqrt(np.maximum(2 - 2 * cosines, 0.0))
    rows = _components(np.concatenate([_scaled(reference), _scaled(other)]), seed).astype(np.float64)
    n, lengths = len(cosines), np.square(rows).sum(axis=1)
    apart = np.sqrt(np.maximum(lengths[:n, None] + lengths[None, n:] - 2 * rows[:n] @ rows[n:].T, 0.0))
    return best_order(-(said + apart))


def best_order(scores: Doubles | Floats) -> Counts | None:
    """Find for each neuron of the reference (row) its own partner (column) so that the scores' sum is largest.

    None where all stay where they are. Where each row has its largest score at another column, those are the answer,
    which experts of one base nearly always meet; else the assignment problem is solved, in time inner³.
    """
    n = len(scores)
    best = scores.argmax(axis=1)
    # Of equal scores the neuron itself comes first, so that equal experts stay as they are.
    best = np.where(scores[np.arange(n), best] <= np.diag(scores), np.arange(n), best)
    if len(np.unique(best)) < n:
        from scipy.optimize import linear_sum_assignment

        best = linear_sum_assignment(scores, maximize=True)[1]
    return None if (best == np.arange(n)).all() else best.astype(np.int64)


def _scaled(matrices: Matrices) -> Floats:
    rows = np.concatenate(matrices.rows, axis=1)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return found


def _components(rows: Floats, seed: int) -> Floats:
    if min(rows.shape) <= _COMPONENTS:
        return rows
    from sklearn.utils.extmath import randomized_svd

    centred = rows - rows.mean(axis=0)
    u, s, _ = randomized_svd(centred, _COMPONENTS, random_state=seed)
    found: Floats = u * s
    return found
