"""Weigh each entry by how it competes with the others of its expert and with the other experts."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods import _kernels_scores
from mediator_cli.methods._ops import Lambda, floats
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Over, Params, Select, Slab, always


def _low_rank(params: Params, n: int) -> int:
    """Give the rank, 1 for the largest of n, of the entry at index int(n·clip) of the ascending ones."""
    return n - int(n * params["clip"])


def _high_rank(params: Params, n: int) -> int:
    return n - int(n * (1 - params["clip"]) - 1)


def _least_rank(params: Params, n: int) -> int:
    return max(1, n - int(n * (1 - params["density"])))


def _most_rank(params: Params, n: int) -> int:
    return 1


def _over_model(params: Params) -> Over:
    return "model"


def _scores_of(slab: Slab) -> Floats:
    found = slab.statistics
    return _scores(slab.inputs, found["low"], found["high"], slab.params["agreement"] == "shares")


def _scores(deltas: Floats, low: Floats, high: Floats, by_shares: bool) -> Floats:
    scores = np.empty(deltas.shape, np.float32)
    _kernels_scores.competition(floats(deltas), floats(low), floats(high), by_shares, scores)
    return scores


def _kth(values: Floats, rank: int) -> Floats:
    """Give the value [n] of a rank, 1 for the largest, in each row [n, m]; zero where there are no entries."""
    size = values.shape[1]
    return np.partition(values, size - rank, axis=1)[:, size - rank] if size else np.zeros(len(values), np.float32)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2410.02396",
    statistics=(
        Select("low", _low_rank, _over_model, always, smallest=True),
        Select("high", _high_rank, _over_model, always, smallest=True),
        Select("least", _least_rank, _over_model, always, of=_scores_of, smallest=True, signed=True),
        Select("most", _most_rank, _over_model, always, of=_scores_of, smallest=True, signed=True),
    ),
    presets={
        "nlp": {"density": 0.1, "clip": 0.01, "lambda": 1.0},
        "vision": {"density": 0.05, "clip": 0.01, "lambda": 1.2, "agreement": "shares"},
    },
)
def pcb(
    deltas: Floats,
    weights: Doubles,
    *,
    density: Annotated[
        float, Field(gt=0, le=1, description="Share of each expert's entries that is kept, those of the best score.")
    ] = 0.1,
    clip: Annotated[
        float, Field(ge=0, lt=0.5, description="Share of the smallest and of the largest magnitudes that are clipped.")
    ] = 0.0001,
    agreement: Annotated[
        Literal["deltas", "shares"],
        Field(description="What an entry is compared with: the sum of deltas, or of their signed shares â (vision)."),
    ] = "deltas",
    lambda_: Lambda = 1.0,
    low: Floats | None = None,
    high: Floats | None = None,
    least: Floats | None = None,
    most: Floats | None = None,
) -> Floats:
    """Score entries by their size and by agreement with the other experts, average the best by score.

    a = |τₜ| clipped at the quantiles `clip` and 1 - `clip` of the expert's model; â = a from 0 at the lower to 1 at the
    upper one. Score s = e^(n·â²) · tanh(τₜ · Σ τ) of n experts; S = s from 0 at the score that the share `density`
    exceeds to 1 at the largest, 0 below. The result is λ · Σ wₜ·sign(τₜ)·a·S / Σ S, zero where all S are.

    Apt when many experts compete for few entries: large changes on which the others agree win. Everything is ranked
    over the model, so that tensors compete with each other too.

    Not apt when single entries of a delta are huge: â is a share of the largest, which only `clip` holds back. An
    expert all of whose scores are the same has no best ones and adds nothing.

    Elsewhere: the defaults are the authors' function; their scripts clip more (`nlp`, `vision`), and the one for vision
    compares with shares. Formulas in the paper are softmaxes instead; this is the code, which made its numbers. Scores
    are taken here times e^(-n), which changes no S, so that many experts do not overflow.

    >>> tau = np.array([[4, 2, 1, 1], [4, -2, 1, 1]], np.float32)
    >>> pcb(tau, np.ones(2), density=0.5, clip=0.0, lambda_=0.5).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    choices = {"density": density, "clip": clip}
    size = deltas.shape[1]
    if low is None or high is None:
        sizes = np.abs(deltas)
        low, high = (_kth(sizes, rank(choices, size)) for rank in (_low_rank, _high_rank))
    scores = _scores(deltas, low, high, agreement == "shares")
    if least is None or most is None:
        least, most = (_kth(scores, rank(choices, size)) for rank in (_least_rank, _most_rank))
    merged = np.empty(size, np.float32)
    limits = floats(low), floats(high), scores, floats(least), floats(most)
    _kernels_scores.balance(floats(deltas), *limits, floats(weights * lambda_), merged)
    return merged
