"""Append some tensors to the files of all sparse experts: choose, measure, place, encode."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from mediator_cli.engine.extract.choose import choose
from mediator_cli.engine.extract.encode import Coder
from mediator_cli.engine.extract.item import Item
from mediator_cli.engine.extract.measure import measure
from mediator_cli.engine.pool import run_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mediator_cli.bundle.sparse_writer import SparseFileWriter
    from mediator_cli.engine.extract.choose import Limit
    from mediator_cli.engine.extract.encode import Kept
    from mediator_cli.engine.extract.item import Extraction
    from mediator_cli.engine.extract.measure import Measured
    from mediator_cli.plan.model import TensorPlan


@dataclass(frozen=True)
class Stored:
    """A tensor of a sparse expert in its file, and what it keeps."""

    measured: Measured
    kept: Kept

    def as_json(self) -> dict[str, Any]:
        """Write it as JSON can hold it."""
        spec = self.measured.spec.model_dump(mode="json")
        return {"spec": spec, "n_index": self.measured.n_index, "kept": asdict(self.kept)}


def extract_batch(
    job: Extraction,
    tensors: Sequence[TensorPlan],
    writers: Mapping[str, SparseFileWriter],
    limits: Mapping[tuple[str, str], Limit],
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, dict[str, Stored]]:
    """Append tensors to the file of every sparse expert; return what stands there, by expert and tensor.

    `limits` are those over the model, by expert and tensor. Files are the same for any workers.
    """
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
    found: dict[str, dict[str, Stored]] = {expert: {} for expert in job.experts}
    for item in items:
        found[item.expert][item.tensor.name] = Stored(measured[item.key], kept[item.key])
    return found


def _placed(item: Item, measured: Measured, writer: SparseFileWriter) -> Coder:
    places = writer.place(item.tensor.name, measured.spec, item.tensor.dtype, measured.n_index)
    return Coder(item, measured.spec, writer, places)
