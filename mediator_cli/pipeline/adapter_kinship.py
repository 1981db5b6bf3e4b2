"""Kinship of plain LoRA adapters, read from their factors alone: the base's weights are not touched."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from mediator_cli.checkpoint.adapter.factors import not_factors, read_change
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.read import open_files
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.pipeline.adapters import without_base
from mediator_cli.pipeline.download import download, far_files_of
from mediator_cli.pipeline.progress import counter
from mediator_cli.stages.adapter_kinship import directions_of, low_rank_sums
from mediator_cli.stages.kinship import PairSums

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.adapter.changes import Change
    from mediator_cli.checkpoint.read import Handle
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan
    from mediator_cli.stages.adapter_kinship import Directions, Overlap


@dataclass(frozen=True)
class LowRankSums:
    """Sums over pairs in every tensor, and the overlap of subspaces in those that an adapter changes."""

    sums: Mapping[str, PairSums]
    overlaps: Mapping[str, Overlap]


def what_is_no_factor(plan: Plan) -> Iterator[Problem]:
    """Say what keeps the experts of a plan from being compared by their factors; nothing where they can be."""
    if plan.align is not None and plan.align.moving:
        yield Problem(plan.loaded.place("align"), "aligned experts are compared as a whole", "leave `align` out")
    for index, expert in enumerate(plan.experts):
        place = plan.loaded.place("experts", index, "model")
        if not isinstance(expert.source, Adapter):
            hint = f"make one of it: mediator extract-lora {plan.loaded.recipe.base} MODEL -o DIR"
            yield Problem(place, f"{expert.name} is a full checkpoint, no adapter", hint)
            continue
        for problem in not_factors(expert.source):
            yield Problem(f"{place}: {problem.place}", problem.message, problem.hint)


def sum_factors(plan: Plan, sizes: Mapping[str, int], run: Settings) -> LowRankSums:
    """Measure all pairs of adapters, matrix by matrix, in float64; `sizes` are of the tensors that are compared.

    Raises CheckpointError where a factor is not finite.
    """
    adapters = [expert.source for expert in plan.experts if isinstance(expert.source, Adapter)]
    download(tuple(file for files in far_files_of(without_base(plan)).values() for file in files), run.progress)
    nothing = np.zeros(len(adapters)), np.zeros((len(adapters), len(adapters)))
    sums = {name: PairSums(size, *nothing) for name, size in sizes.items()}
    overlaps: dict[str, Overlap] = {}
    changed: Counter[str] = Counter()
    for adapter in adapters:
        changed.update({name: _n_bytes(change) for name, change in adapter.changes.items() if name in sizes})
    advance = counter(run.progress, "kinship", sum(changed.values()))
    with open_files(adapter.file for adapter in adapters) as handles, threadpool_limits(run.workers, user_api="blas"):
        for name in (name for name in sizes if name in changed):
            parts = [_directions(plan, index, adapter, name, handles) for index, adapter in enumerate(adapters)]
            shape = next(adapter.changes[name].shape for adapter in adapters if name in adapter.changes)
            sums[name], overlaps[name] = low_rank_sums(parts, (shape[0], shape[1]))
            advance(changed[name])
    return LowRankSums(sums, overlaps)


def _n_bytes(change: Change) -> int:
    return sum(window.info.n_bytes for product in change.products for window in (product.left, product.right))


def _directions(
    plan: Plan, index: int, adapter: Adapter, name: str, handles: Mapping[Path, Handle]
) -> Directions | None:
    if name not in adapter.changes:
        return None
    factors = read_change(handles, adapter.changes[name])
    for letter, factor in (("A", factors.a), ("B", factors.b)):
        if not np.isfinite(factor).all():
            message = f"factor {letter} of expert {plan.experts[index].name} holds NaN or infinite values"
            hint = "the training diverged or the file is damaged; leave it out or fetch it again"
            raise CheckpointError(Problem(f"{adapter.file}: {name}", message, hint))
    return directions_of(factors)
