"""Append some tensors to the files of all sparse experts: choose, measure, place, encode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from mediator_cli.engine.extract.choose import choose
from mediator_cli.engine.extract.encode import Coder, Stored
from mediator_cli.engine.extract.factors import extract_factors
from mediator_cli.engine.extract.gated import Scales, extract_gated
from mediator_cli.engine.extract.item import Item
from mediator_cli.engine.extract.measure import measure
from mediator_cli.engine.pool import run_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mediator_cli.bundle.sparse_writer import SparseFileWriter
    from mediator_cli.engine.extract.choose import Limit
    from mediator_cli.engine.extract.encode import Kept
    from mediator_cli.engine.extract.item import Extraction
    from mediator_cli.engine.extract.measure import Measured
    from mediator_cli.plan.model import TensorPlan


@dataclass(frozen=True)
class Common:
    """What is found over all tensors before the first is extracted, by expert and tensor.

    `limits` of entries that are ranked over the model, `scales` of EMR-Merging.
    """

    limits: Mapping[tuple[str, str], Limit] = field(default_factory=dict)
    scales: Scales = field(default_factory=dict)


def extract_batch(
    job: Extraction,
    tensors: Sequence[TensorPlan],
    writers: Mapping[str, SparseFileWriter],
    common: Common,
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Append tensors to the files of all experts; return what stands there, for the journal, by file and tensor.

    Those that are stored sparsely come first, factors last. Files are the same for any workers.
    """
    sparse = [tensor for tensor in tensors if tensor.extract.mode == "sparse"]
    factors = [tensor for tensor in tensors if tensor.extract.mode == "factors"]
    others = [tensor for tensor in tensors if tensor.extract.mode not in ("sparse", "factors")]
    found = _extract_sparse(job, sparse, writers, common.limits, workers, advance)
    for name, each in extract_gated(job, others, writers, common.scales, workers, advance).items():
        found[name] = found.get(name, {}) | each
    for name, each in (extract_factors(job.adapters, factors, writers) if factors else {}).items():
        found[name] = found.get(name, {}) | each
    return found


def _extract_sparse(
    job: Extraction,
    tensors: Sequence[TensorPlan],
    writers: Mapping[str, SparseFileWriter],
    limits: Mapping[tuple[str, str], Limit],
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, dict[str, dict[str, Any]]]:
    items = [Item(job, expert, tensor) for expert, tensor in product(job.experts, tensors) if tensor.size]
    choices = choose(items, limits, workers, advance)
    measured: dict[tuple[str, str], Measured] = {}

    def look(item: Item) -> None:
        measured[item.key] = measure(item, choices[item.key])
        advance(item.tensor.size)

    run_all(look, sorted(items, key=lambda item: -item.tensor.size), workers, stop=job.stop)
    coders = [_placed(item, measured[item.key], writers[item.expert]) for item in items]
    kept: dict[tuple[str, str], Kept] = {}

    def encode(coder: Coder) -> None:
        kept[coder.item.key] = coder.encode(choices[coder.item.key])
        advance(coder.item.tensor.size)

    run_all(encode, sorted(coders, key=lambda coder: -coder.item.tensor.size), workers, stop=job.stop)
    found: dict[str, dict[str, dict[str, Any]]] = {expert: {} for expert in job.experts}
    for item in items:
        found[item.expert][item.tensor.name] = Stored(measured[item.key], kept[item.key]).as_json()
    return found


def _placed(item: Item, measured: Measured, writer: SparseFileWriter) -> Coder:
    places = writer.place(item.tensor.name, measured.spec, item.tensor.dtype, measured.n_index)
    return Coder(item, measured.spec, writer, places)
