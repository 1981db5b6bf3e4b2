"""Model-based clustering: experts whose changes of the weights are alike (Ostapenko et al. 2024, arXiv:2405.11157)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.strategies._clusters import cluster
from mediator_cli.strategies.selection.gram import cosines, gram, leading
from mediator_cli.strategies.selection.groups import Grouped

if TYPE_CHECKING:
    from mediator_cli.strategies._valid import Floats
    from mediator_cli.strategies.bench import Bench

_DIRECTIONS = 64


def mbc(bench: Bench, k: int) -> Grouped:
    """Share experts out to k clusters by k-means on the rows of their cosine similarities.

    The paper flattens the factors A and B, sets the smallest entries to zero, and cuts to 64 directions. Factors of
    adapters with different ranks or targets do not line up, and the same change has many factors, so here the whole
    changes b·a are compared instead, exactly and without building them, with no entry set to zero.
    """
    alike: Floats = bench.once("mbc", lambda: _similarities(bench))
    return Grouped(cluster(alike, bench.library.names, k, bench.seed), alike)


def _similarities(bench: Bench) -> Floats:
    return cosines(leading(gram(list(bench.library.experts.values())), _DIRECTIONS))
