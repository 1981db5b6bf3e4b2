"""Clustering in the space of outputs: experts that do well and badly on the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.strategies._clusters import cluster
from mediator_cli.strategies._valid import valid_tokens
from mediator_cli.strategies.selection.gram import cosines
from mediator_cli.strategies.selection.groups import Grouped

if TYPE_CHECKING:
    from mediator_cli.strategies._valid import Floats
    from mediator_cli.strategies.bench import Bench


def outputs(bench: Bench, k: int) -> Grouped:
    """Share experts out to k clusters by k-means on the rows of cosine similarities of what they change in the answers.

    An expert's vector is what it adds to the log-probability of the answer of each validation row, over the base.
    """
    alike: Floats = bench.once("outputs", lambda: _similarities(bench))
    return Grouped(cluster(alike, bench.library.names, k, bench.seed), alike)


def _similarities(bench: Bench) -> Floats:
    rows = valid_tokens(bench).rows
    gains = np.round(rows[:, 1:] - rows[:, :1], 4).T
    return cosines(gains @ gains.T)
