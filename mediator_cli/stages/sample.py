"""The scores of a unit from a sample of its blocks, with 95 % bounds on their error.

Blocks are clusters, drawn without replacement in each tensor; tensors are strata. A score is a smooth function of the
unit's totals, so its error is, near enough, that of a total of one number for each block: the score's gradient times
the block's counts: Taylor linearisation, as in Särndal, Swensson and Wretman, Model Assisted Survey Sampling, 1992.
The rule that says which entries count is taken as given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.kernels.random import fill_uniforms
from mediator_cli.stages.conflict import ConflictScores, score_counts, unpack_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.kernels.arrays import Counts, Doubles
    from mediator_cli.recipe.schema import Measure

LEAST_BLOCKS = 4
"""Blocks of a tensor that are drawn at least, so that their spread says something of the error."""
_NORMAL = 1.959963984540054
_NAMES = ("sign", "any_sign", "cosine", "overlap")


@dataclass(frozen=True)
class BlockSample:
    """What was counted in some blocks of a tensor: `counts` [drawn, k] as of `count_conflicts`; it has `n_blocks`.

    Two are drawn at least, unless that is all: one block says nothing of how much they differ.
    """

    counts: Doubles
    n_blocks: int

    def __post_init__(self) -> None:
        if len(self.counts) < min(2, self.n_blocks):
            raise ValueError(f"{len(self.counts)} of {self.n_blocks} blocks are no sample")

    @property
    def total(self) -> Doubles:
        """The estimated counts of the whole tensor [k]; exact where all blocks are drawn."""
        summed: Doubles = self.counts.sum(axis=0)
        return summed * (self.n_blocks / max(1, len(self.counts)))


@dataclass(frozen=True)
class ScoreBounds:
    """How far the scores of a unit may be from those of all its entries, in 95 of 100 samples."""

    sign: float
    any_sign: float
    cosine: float
    overlap: float

    def by(self, measure: Measure) -> float:
        """Return the bound on the score of a measure."""
        return {"sign": self.sign, "any_sign": self.any_sign, "cosine": self.cosine / 2}[measure]


def draw_blocks(key: int, n_blocks: int, share: float) -> Counts:
    """Draw a share of the blocks of a tensor without replacement, LEAST_BLOCKS at least; rising numbers.

    They depend on nothing but `key`, made of seed and tensor.
    """
    order = np.empty(n_blocks, np.float32)
    fill_uniforms(key, 0, order)
    n_drawn = min(n_blocks, max(LEAST_BLOCKS, math.ceil(share * n_blocks)))
    return np.sort(np.argsort(order, kind="stable")[:n_drawn])


def score_sample(samples: Sequence[BlockSample], n: int) -> tuple[ConflictScores, ScoreBounds]:
    """Score a unit of n experts from samples of its tensors; bound the errors, 0 where all blocks are drawn."""
    scores = score_counts([unpack_counts(sample.total, n) for sample in samples])
    if not samples:
        return scores, ScoreBounds(0.0, 0.0, 0.0, 0.0)
    gradients = _gradients(np.sum([sample.total for sample in samples], axis=0), n)
    bounds = [_bound(samples, gradient) for gradient in gradients]
    return scores, ScoreBounds(**dict(zip(_NAMES, bounds, strict=True)))


def _bound(samples: Sequence[BlockSample], gradient: Doubles) -> float:
    """Bound the error of a score with this gradient [k]: Student's t with Satterthwaite's degrees of freedom."""
    variance, spread = 0.0, 0.0
    for sample in samples:
        drawn = len(sample.counts)
        if drawn < sample.n_blocks:
            part = _variance(sample, gradient)
            variance += part
            spread += part * part / (drawn - 1)
    return student(variance * variance / spread) * math.sqrt(variance) if spread > 0 else 0.0


def _variance(sample: BlockSample, gradient: Doubles) -> float:
    """Estimate the variance of a tensor's part of a total over blocks."""
    drawn = len(sample.counts)
    values = (sample.counts * gradient).sum(axis=1)
    missing = 1 - drawn / sample.n_blocks
    return float(sample.n_blocks**2 * missing * values.var(ddof=1) / drawn)


def student(freedom: float) -> float:
    """Give the 97.5 % point of Student's t, within 0.2 % from 3 degrees of freedom up.

    The expansion of Abramowitz and Stegun, 26.7.5.

    >>> round(student(3), 2), round(student(10), 3)
    (3.18, 2.228)
    """
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))


def _gradients(total: Doubles, n: int) -> list[Doubles]:
    """Differentiate sign, any-sign, cosine and overlap of totals [k] by each of them; [k] each."""
    size, pairs = n * n, list(combinations(range(n), 2))
    changes = [np.zeros(len(total)) for _ in _NAMES]
    sign, any_sign, cosine, overlap = changes
    for i, j in pairs:
        at, first, second = i * n + j, 3 * size + i, 3 * size + j
        _add_ratio(sign, total, [(at, 1)], [(size + at, 1)])
        _add_ratio(overlap, total, [(size + at, 1)], [(first, 1), (second, 1), (size + at, -1)])
        _add_cosine(cosine, total, 2 * size + at, (2 * size + i * n + i, 2 * size + j * n + j))
    _add_ratio(any_sign, total, [(len(total) - 2, 1)], [(len(total) - 1, 1)])
    for change in (sign, cosine, overlap):
        change /= max(1, len(pairs))
    return changes


def _add_ratio(
    change: Doubles, total: Doubles, above: Sequence[tuple[int, int]], below: Sequence[tuple[int, int]]
) -> None:
    """Add the derivatives of one sum of totals over another, each listed with its sign."""
    numerator = sum(sign * total[at] for at, sign in above)
    denominator = sum(sign * total[at] for at, sign in below)
    if denominator > 0:
        for at, sign in above:
            change[at] += sign / denominator
        for at, sign in below:
            change[at] -= sign * numerator / denominator**2


def _add_cosine(change: Doubles, total: Doubles, inner: int, norms: tuple[int, int]) -> None:
    """Add the derivatives of inner / √(left · right)."""
    left, right = total[norms[0]], total[norms[1]]
    if left > 0 and right > 0:
        root = math.sqrt(left * right)
        change[inner] += 1 / root
        for norm in norms:
            change[norm] -= total[inner] / (2 * root * total[norm])
