"""A feed-forward block as one that all experts share, and small corrections of it: the neurons that changed.

A hidden neuron j of a gated block adds down[:, j] · act(gate[j] · x) · (up[j] · x) to the output, and nothing else
depends on it. So an expert that differs from the shared block S in the neurons J only is S plus a block of 2·|J|
neurons: the expert's neurons J, and those of S with `down` negated. If it differs in other neurons too, that is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mediator_cli.kernels.arrays import Counts, Doubles

    Reals = NDArray[np.floating[Any]]

Score = Literal["relative", "change"]


@dataclass(frozen=True)
class Block:
    """A gated feed-forward block: gate [ff, d], up [ff, d], down [d, ff]."""

    gate: Reals
    up: Reals
    down: Reals


def row_squares(expert: Reals, shared: Reals) -> Doubles:
    """Sum over each row of gate or up [k, d]: squares of the shared one, squares of the expert's change of it; [2, k].

    In float64, each row by itself, so that it makes no difference how many rows are given at a time.
    """
    wide = shared.astype(np.float64)
    sums: Doubles = np.stack([np.square(wide).sum(axis=1), np.square(expert - wide).sum(axis=1)])
    return sums


def column_squares(expert: Reals, shared: Reals, before: Doubles | None = None) -> Doubles:
    """Sum over each column of down [k, ff], as row_squares over rows; [2, ff].

    `before` is what was summed over the rows above: rows are added one by one in float64, however many are given at a
    time.
    """
    total: Doubles = np.zeros((2, shared.shape[1])) if before is None else before.copy()
    for mine, common in zip(expert, shared, strict=True):
        wide = common.astype(np.float64)
        total += np.stack([np.square(wide), np.square(mine - wide)])
    return total


def score_neurons(gate: Doubles, up: Doubles, down: Doubles, score: Score = "relative") -> Doubles:
    """Score how much an expert changed each hidden neuron, from weights alone: sums over its three vectors; [ff].

    `change`: the squared norm of the change. `relative`: each vector's part of it divided by the squared norm that this
    vector has in the shared block; measured to choose a little better. Both are 0 where nothing changed, only there.
    gate and up [2, ff] come from row_squares, down [2, ff] from column_squares.
    """
    changes = np.stack([gate[1], up[1], down[1]])
    parts: Doubles = changes
    if score == "relative":
        sizes = np.stack([gate[0], up[0], down[0]])
        never = np.where(changes > 0, np.inf, 0.0)
        parts = np.divide(changes, sizes, out=never, where=sizes > 0)
    total: Doubles = parts.sum(axis=0)
    return total


def most_changed(scores: Doubles, count: int) -> Counts:
    """Choose the neurons with the largest scores [ff], those that changed at all; [at most count], in rising order.

    Of equal scores the earlier neuron is taken.

    >>> most_changed(np.array([0.0, 3.0, 1.0, 3.0, 1.0]), 3).tolist()
    [1, 2, 3]
    """
    order = np.argsort(-scores, kind="stable")[:count]
    return np.sort(order[scores[order] > 0]).astype(np.int64)


def correction_of(expert: Block, shared: Block, chosen: Counts, width: int) -> Block:
    """Build the block to add to the shared one so that the neurons chosen [n] are the expert's; `width` wide.

    The expert's neurons, the shared ones with `down` negated, then zeros; no value is rounded, both blocks being of one
    dtype. Neurons that did not change are better not chosen: they would cancel but for rounding.
    """
    spare = (0, width - 2 * len(chosen))
    down = np.concatenate([expert.down[:, chosen], -shared.down[:, chosen]], axis=1)
    return Block(
        gate=np.pad(np.concatenate([expert.gate[chosen], shared.gate[chosen]]), (spare, (0, 0))),
        up=np.pad(np.concatenate([expert.up[chosen], shared.up[chosen]]), (spare, (0, 0))),
        down=np.pad(down, ((0, 0), spare)),
    )
