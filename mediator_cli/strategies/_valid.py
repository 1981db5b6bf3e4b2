"""What all experts say of the validation rows, as ensembles and selections look at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.strategies._fitting import names_of, rows_to_fit
from mediator_cli.strategies.log_probs import expert_scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mediator_cli.strategies._sweep import Kept
    from mediator_cli.strategies.bench import Bench

    Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ValidTokens:
    """Tokens of the answers of validation rows: `log_probs` [tokens, models] of the base, called `dense`, and experts.

    `shares` [tokens] are such that Σ share · -ln p is the mean over tasks of the mean loss of a row; `task` [tokens]
    numbers `tasks`. `losses` [tasks, models] are those means. `kept` is what is known of each token's place, by task.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    log_probs: Floats
    shares: Floats
    task: NDArray[np.int64]
    losses: Floats
    rows: Floats


def valid_tokens(bench: Bench) -> ValidTokens:
    """Ask all experts about the validation rows of seen tasks, once on a bench; raises CheckpointError without rows."""
    names_of(bench)
    found: ValidTokens = bench.once("valid_tokens", lambda: _read(bench))
    return found


def _read(bench: Bench) -> ValidTokens:
    names = tuple(rows_to_fit(bench))
    scores = [expert_scores(bench, task, "valid") for task in bench.seen if task.name in names]
    tokens = [each.wanted()[0] for each in scores]
    counts = [len(own) for own in tokens]
    shares = [np.full(n, 1 / (len(names) * len(each.asked.rows))) for n, each in zip(counts, scores, strict=True)]
    return ValidTokens(
        models=scores[0].models,
        tasks=names,
        log_probs=np.concatenate(tokens),
        shares=np.concatenate(shares),
        task=np.repeat(np.arange(len(names)), counts),
        losses=-np.stack([each.answers.mean(axis=0) for each in scores]),
        rows=np.concatenate([each.answers for each in scores]),
    )


def valid_places(bench: Bench) -> list[Kept]:
    """Give what is kept of the places of answers' tokens, by task, in the order of `valid_tokens`."""
    found = []
    for task in bench.seen:
        if task.valid:
            scores = expert_scores(bench, task, "valid")
            kept = scores.kept()
            if kept is None:
                raise ValueError("validation rows are kept with their places")
            found.append(kept)
    return found
