"""What the arrays of a sparse tensor will hold: counts first, so that every byte has its place before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.sparse import decode_values, encode_values, index_codec
from mediator_cli.bundle.sparse_file import SparseTensor
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.combine import narrow
from mediator_cli.engine.extract.choose import masked
from mediator_cli.engine.extract.item import may_override
from mediator_cli.kernels.sparse import add_kept, count_gap_bytes, find_differing, gather
from mediator_cli.stages.extract import scale_candidates, scale_errors, sign_sums, step_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mediator_cli.engine.extract.choose import Limit
    from mediator_cli.engine.extract.item import Item, Part
    from mediator_cli.engine.streams import Piece
    from mediator_cli.kernels.arrays import Counts, Doubles, Flags, Floats

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
    for piece, part, mask in masked(item, limit):
        n_bytes, position = count_gap_bytes(mask, piece.start, position)
        n_gaps += n_bytes
        for values in kept_by_block(part, mask, extract.rescale):
            n_kept += len(values)
            if extract.values == "sign":
                signs += sign_sums(values)
            elif extract.values == "int8":
                largest = max(largest, float(np.abs(values).max(initial=0.0)))
        if may_override(extract):
            n_overrides += len(find_overrides(item, piece, part, mask))
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


def kept_by_block(part: Part, mask: Flags, factor: float) -> Iterator[Floats]:
    """Give the kept values of each block times the factor."""
    for start in range(0, len(mask), BLOCK):
        window = slice(start, start + BLOCK)
        out = np.empty(len(mask[window]), np.float32)
        yield out[: gather(part.delta[window], mask[window], factor, out)]


def _int8_scale(item: Item, limit: Limit, largest: float) -> float:
    """Take the best of a list of scales, then two least-squares steps."""

    def summed(function: Callable[[Floats], Doubles]) -> Doubles:
        total: Doubles | None = None
        for _, part, mask in masked(item, limit):
            for values in kept_by_block(part, mask, item.tensor.extract.rescale):
                found = function(values)
                total = found if total is None else total + found
        return np.zeros(0) if total is None else total

    scales = scale_candidates(largest)
    scale = float(scales[summed(lambda values: scale_errors(values, scales)).argmin()])
    for _ in range(_REFINEMENTS):
        inner, norm = summed(lambda values, scale=scale: step_sums(values, scale)).tolist()  # type: ignore[misc]
        scale = inner / norm if norm else scale
    return scale


def find_overrides(item: Item, piece: Piece, part: Part, mask: Flags) -> Counts:
    """Find the entries, by flat index, whose bits dense + delta would not give back."""
    codec = item.tensor.extract.values
    values = np.concatenate(list(kept_by_block(part, mask, 1.0)))
    rebuilt = np.empty(piece.size, np.float32)
    add_kept(part.dense, mask, decode_values(encode_values(values, codec, 1.0), codec, 1.0), rebuilt)
    again, _ = narrow(rebuilt, item.tensor.dtype)
    kind, places = f"u{again.itemsize}", np.empty(piece.size, np.int64)
    return places[: find_differing(again.view(kind), part.stored.view(kind), piece.start, places)]
