"""What the arrays of a sparse tensor will hold: counts first, so that every byte has its place before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.sparse import decode_values, encode_values, index_codec
from mediator_cli.bundle.sparse_file import SparseTensor
from mediator_cli.checkpoint.read import narrow
from mediator_cli.engine.extract.choose import slabs
from mediator_cli.engine.extract.item import may_override, widened
from mediator_cli.kernels.sparse import add_kept, count_gap_bytes, find_differing
from mediator_cli.stages.extract import scale_candidates, scale_errors, sign_sums, step_sums

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import NDArray

    from mediator_cli.engine.extract.choose import Limit, Slab
    from mediator_cli.engine.extract.item import Item
    from mediator_cli.kernels.arrays import Counts, Doubles, Floats

_REFINEMENTS = 2


@dataclass(frozen=True)
class Measured:
    """What a tensor's header says, and the bytes of its index."""

    spec: SparseTensor
    n_index: int


def measure(item: Item, limit: Limit) -> Measured:
    """Count what will be stored of a tensor, and find the scale of its values."""
    extract = item.tensor.extract
    n_kept, n_gaps, position, n_overrides, largest = 0, 0, 0, 0, 0.0
    signs = np.zeros(2, np.float64)
    may_be_gaps = extract.over == "model" or index_codec(extract.density) == "gaps"
    for slab in slabs(item, limit):
        n_kept += len(slab.places)
        if may_be_gaps:
            n_bytes, position = count_gap_bytes(slab.places, slab.piece.start, position)
            n_gaps += n_bytes
        if extract.values == "sign":
            for values in slab.by_block(slab.gather(extract.rescale)):
                signs += sign_sums(values)
        elif extract.values == "int8":
            largest = max(largest, float(np.abs(slab.gather(extract.rescale)).max(initial=0.0)))
        if may_override(extract):
            n_overrides += len(find_overrides(item, slab)[0])
    scale = _int8_scale(item, limit, largest) if largest else 1.0
    if signs[1]:
        scale = float(signs[0] / signs[1])
    share = n_kept / item.tensor.size if extract.over == "model" else extract.density
    spec = SparseTensor(
        shape=item.tensor.shape,
        n_kept=n_kept,
        index=index_codec(share),
        values=extract.values,
        scale=scale,
        n_overrides=n_overrides,
    )
    return Measured(spec, n_gaps if spec.index == "gaps" else -(-item.tensor.size // 8))


def _int8_scale(item: Item, limit: Limit, largest: float) -> float:
    """Take the best of a list of scales, then two least-squares steps."""

    def summed(function: Callable[[Floats], Doubles]) -> Doubles:
        total: Doubles | None = None
        for slab in slabs(item, limit):
            for values in slab.by_block(slab.gather(item.tensor.extract.rescale)):
                found = function(values)
                total = found if total is None else total + found
        return np.zeros(0) if total is None else total

    scales = scale_candidates(largest)
    scale = float(scales[summed(lambda values: scale_errors(values, scales)).argmin()])
    for _ in range(_REFINEMENTS):
        inner, norm = summed(lambda values, scale=scale: step_sums(values, scale)).tolist()  # type: ignore[misc]
        scale = inner / norm if norm else scale
    return scale


def find_overrides(item: Item, slab: Slab) -> tuple[Counts, NDArray[Any]]:
    """Find the entries, by flat index, whose bits dense + delta would not give back; with what is to be stored."""
    codec, dtype, piece = item.tensor.extract.values, item.tensor.dtype, slab.piece
    decoded = decode_values(encode_values(slab.gather(1.0), codec, 1.0), codec, 1.0)
    rebuilt = np.empty(piece.size, np.float32)
    add_kept(widened(slab.part.dense, dtype), slab.mask, decoded, rebuilt)
    (again, _), (stored, _) = narrow(rebuilt, dtype), narrow(slab.part.expert, dtype)
    kind, room = f"u{again.itemsize}", np.empty(piece.size, np.int64)
    wrong = room[: find_differing(again.view(kind), stored.view(kind), piece.start, room)]
    return wrong, stored[wrong - piece.start]
