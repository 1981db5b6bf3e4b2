"""Queries to a bundle: the mixture of each is decided by its prompt alone, never by an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mediator_cli.errors import BundleError, Problem
from mediator_cli.evaluate.forward import score_alike, score_mixed
from mediator_cli.runtime.model import RoutedModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from mediator_cli.evaluate.forward import Job, Scored

_SMALL = 2
"""Bins that a mixture must fill to get passes of its own."""


def score_by_prompt(
    job: Job, owners: Sequence[int], mixture: str | Mapping[str, float] | None = None
) -> Iterator[tuple[int, Scored]]:
    """Score all queries, each with its prompt's mixture: `mixture`, or what a bundle's router makes of the prompt.

    `owners` number the prompts from 0 and say which each query has; its mixture is decided once for all its answers.
    Raises BundleError when a bundle has no router, or a mixture is given for a plain model.
    """
    model, everything = job.model, range(len(job.queries))
    if not everything:
        return
    if not isinstance(model, RoutedModel):
        if mixture is not None:
            raise BundleError(Problem("", "only a bundle mixes experts", "leave the mixture out"))
        yield from score_alike(job, everything)
        return
    if mixture is None and not model.opened.is_mixed:
        mixture = "dense"
    if mixture is None and model.gating is not None:
        yield from score_alike(job, everything)
        return
    if mixture is not None:
        with model.mixing(mixture):
            yield from score_alike(job, everything)
        return
    yield from _scores_routed(job, model, owners)


def _scores_routed(job: Job, model: RoutedModel, owners: Sequence[int]) -> Iterator[tuple[int, Scored]]:
    """Group queries by equal mixtures; groups too small for a pass of their own share passes."""
    prompts = {at: query.prompt for at, query in zip(owners, job.queries, strict=True)}
    weights = model.route([list(prompts[at]) for at in sorted(prompts)]).weights
    groups: dict[bytes, list[int]] = {}
    for index, at in enumerate(owners):
        groups.setdefault(weights[at].tobytes(), []).append(index)
    small: list[tuple[NDArray[np.float32], list[int]]] = []
    for indices in groups.values():
        own = weights[owners[indices[0]]]
        if sum(len(job.queries[index].fed) for index in indices) < _SMALL * job.limits.n_bin:
            small.append((own, indices))
            continue
        with model.mixing(torch.from_numpy(own[None])):
            yield from score_alike(job, indices)
    yield from score_mixed(job, model, small)
