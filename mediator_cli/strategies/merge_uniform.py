"""One model: the mean of all experts' changes."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from mediator_cli.strategies._fitting import Scale, TuningRows, fit_scale, names_of
from mediator_cli.strategies.library import summed
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="merge", reference="https://arxiv.org/abs/2603.03535")
def merge_uniform(bench: Bench, *, scale: Scale = 1.0, tuning_rows: TuningRows = 16) -> Fitted:
    """Average what the experts add, each as its product: W + scale · Σ bₜaₜ / T, without cross terms."""
    started, names = perf_counter(), names_of(bench)
    weights = dict.fromkeys(names, 1 / len(names))
    change = summed([(bench.library.experts[name], weight) for name, weight in weights.items()])
    return fit_scale(bench, change, scale, tuning_rows, {"weights": weights}, started)
