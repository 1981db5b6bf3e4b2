"""One model: LoraHub, which searches the weights without gradients."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import minimize

from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.strategies._fitting import largest_rank, names_of, rows_to_fit
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.library import Change, Library

MOST = 1.5
"""The largest magnitude of a weight, as in the paper."""

Rows = Annotated[int, Field(ge=1, description="Validation rows of each task that a try looks at, the first of them.")]
Tries = Annotated[int, Field(ge=1, description="How many weights are tried; two more than experts at least.")]
Penalty = Annotated[float, Field(ge=0, allow_inf_nan=False, description="Multiplies the mean |w|, added to the loss.")]
Reach = Annotated[float, Field(gt=0, le=MOST, description="How far the first tries go from 0.")]


@strategy(group="merge", reference="https://arxiv.org/abs/2307.13269", needs=("rows",))
def merge_lorahub(
    bench: Bench, *, rows: Rows = 5, tries: Tries = 40, penalty: Penalty = 0.05, reach: Reach = 0.5
) -> Fitted:
    """Search weights without gradients, on a few rows: W + (Σ wₜ bₜ)·(Σ wₜ aₜ) with each wₜ from -1.5 to 1.5.

    From w = 0 on, COBYLA (a trust region with linear models, deterministic) lowers the loss of a few validation rows
    plus 0.05 · mean |w|; the best try is kept. The authors use another gradient-free optimiser, with as many tries.
    Lower ranks are filled up with zeros; b has its adapter's scaling.
    """
    started, names = perf_counter(), names_of(bench)
    few = rows_to_fit(bench, rows)
    budget = max(tries, len(names) + 2)
    seen: list[tuple[float, float]] = []

    def value(weights: Doubles) -> float:
        loss = bench.loss(Fitted(folded=(combined(bench.library, weights),)), few)
        seen.append((loss + penalty * float(np.abs(weights).mean()), loss))
        bench.progress("search weights", min(len(seen), budget), budget)
        return seen[-1][0]

    best = search(value, len(names), budget, reach)
    change = combined(bench.library, best)
    at = min(range(len(seen)), key=lambda n: seen[n][0])
    facts = {
        "weights": dict(zip(names, best.tolist(), strict=True)),
        "loss_at_start": seen[0][1],
        "loss": seen[at][1],
        "tries": len(seen),
        "values": [value for value, _ in seen],
        "rank": largest_rank(change),
        "seconds": perf_counter() - started,
    }
    return Fitted(folded=(change,), facts=facts)


def combined(library: Library, weights: Doubles) -> Change:
    """Give (Σ wₜ bₜ)·(Σ wₜ aₜ) for weights [experts]; of each matrix that some expert with a weight changes."""
    found: dict[str, list[tuple[FactorDelta, float]]] = {}
    for change, weight in zip(library.experts.values(), weights.tolist(), strict=True):
        for name, delta in change.items() if weight else ():
            found.setdefault(name, []).append((delta, weight))
    return {name: _apart(parts) for name, parts in found.items()}


def _apart(parts: list[tuple[FactorDelta, float]]) -> FactorDelta:
    (rows, columns), rank = parts[0][0].shape, max(len(delta.a) for delta, _ in parts)
    a, b = torch.zeros(rank, columns), torch.zeros(rows, rank)
    for delta, weight in parts:
        a[: len(delta.a)] += weight * delta.a
        b[:, : len(delta.a)] += weight * delta.b
    return FactorDelta(a, b)


def search(value: Callable[[Doubles], float], n: int, budget: int, reach: float) -> Doubles:
    """Minimise a function of n numbers between -1.5 and 1.5 from 0 on by COBYLA; the best that was tried, [n]."""
    best: list[tuple[float, Doubles]] = []

    def asked(point: Doubles) -> float:
        # COBYLA may leave its bounds by rounding, or for a step.
        inside = np.clip(point, -MOST, MOST)
        found = value(inside)
        if not best or found < best[0][0]:
            best[:] = [(found, inside)]
        return found

    options = {"rhobeg": reach, "maxiter": budget}
    minimize(asked, np.zeros(n), method="COBYLA", bounds=[(-MOST, MOST)] * n, tol=1e-3, options=options)
    return best[0][1]
