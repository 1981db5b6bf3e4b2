"""Experts chosen one by one, each time the one that helps most on validation rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.strategies._clusters import check_count
from mediator_cli.strategies._fitting import rows_to_fit
from mediator_cli.strategies._valid import valid_tokens
from mediator_cli.strategies.selection.groups import Picked, merged_uniformly

if TYPE_CHECKING:
    from mediator_cli.strategies._valid import ValidTokens
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.selection.groups import Kind

MOST_ROWS = 8


@dataclass
class Path:
    """Experts chosen so far and the loss after each choice; goes on from there when more are asked for."""

    names: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tries: int = 0


def greedy(bench: Bench, k: int, kind: Kind, most_rows: int = MOST_ROWS) -> Picked:
    """Choose k experts, each the one with which S has the least validation loss; of equal ones the first.

    The loss is of S as an ensemble with equal weights or as a router that gives each task its best expert of S, both
    of cached log-probabilities; or as a uniform merge, for which every try is a pass over `most_rows` rows of each
    task. It goes on to k also where the loss rises; `losses` tell.
    """
    check_count(k, len(bench.library.experts), "greedy")
    return _choose(bench, k, kind, most_rows, again=False)


def soup(bench: Bench, k: int, most_rows: int = MOST_ROWS) -> Picked:
    """Choose k ingredients of a uniform merge, each the one that lowers its validation loss most, with replacement.

    Greedy soup (Wortsman et al. 2022, arXiv:2203.05482), but that an expert may come again. An expert that was chosen
    twice stands twice in the library.
    """
    check_count(k, len(bench.library.experts), "soup")
    return _choose(bench, k, "merge", most_rows, again=True)


def _choose(bench: Bench, k: int, kind: Kind, most_rows: int, *, again: bool) -> Picked:
    path: Path = bench.once(("greedy", kind, again, most_rows if kind == "merge" else None), Path)
    while len(path.names) < k:
        left = [name for name in bench.library.names if again or name not in path.names]
        losses = _losses(bench, path.names, left, kind, most_rows)
        best = min(range(len(left)), key=lambda at: losses[at])
        path.names.append(left[best])
        path.losses.append(losses[best])
        path.tries += len(left)
    facts = {"losses": path.losses[:k], "kind": kind, **({"rows_by_task": most_rows} if kind == "merge" else {})}
    return Picked(tuple(path.names[:k]), facts)


def _losses(bench: Bench, chosen: list[str], left: list[str], kind: Kind, most_rows: int) -> list[float]:
    """Give the loss of what is chosen with each of those left."""
    if kind == "merge":
        return _merge_losses(bench, chosen, left, most_rows)
    tokens = valid_tokens(bench)
    own, others = ([tokens.models.index(name) for name in names] for names in (chosen, left))
    return _ensemble_losses(tokens, own, others) if kind == "ensemble" else _route_losses(tokens, own, others)


def _ensemble_losses(tokens: ValidTokens, chosen: list[int], left: list[int]) -> list[float]:
    before = np.logaddexp.reduce(tokens.log_probs[:, chosen], axis=1, initial=-np.inf)
    mixed = np.logaddexp(before[:, None], tokens.log_probs[:, left]) - np.log(len(chosen) + 1)
    return [float(loss) for loss in -(tokens.shares @ mixed)]


def _route_losses(tokens: ValidTokens, chosen: list[int], left: list[int]) -> list[float]:
    before = tokens.losses[:, chosen].min(axis=1, initial=np.inf)
    return [float(loss) for loss in np.minimum(before[:, None], tokens.losses[:, left]).mean(axis=0)]


def _merge_losses(bench: Bench, chosen: list[str], left: list[str], most_rows: int) -> list[float]:
    rows, experts = rows_to_fit(bench, most_rows), bench.library.experts
    found = []
    for at, name in enumerate(left):
        bench.progress(f"try merges of {len(chosen) + 1} experts", at, len(left))
        found.append(bench.loss(merged_uniformly([experts[one] for one in (*chosen, name)]), rows))
    return found
