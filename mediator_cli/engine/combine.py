"""Write the dense tensors: averaged, copied from the base, slab by slab into files of known size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.checkpoint.read import LocalHandle, narrow, read_slab
from mediator_cli.checkpoint.write import write_at
from mediator_cli.engine.matrices import as_seen, as_stored, naming
from mediator_cli.engine.statistics import of_piece
from mediator_cli.engine.streams import not_finite, pieces
from mediator_cli.kernels.arrays import bytes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.digest import Digests
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.engine.streams import Piece, Streams
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.plan.model import TensorPlan


@dataclass(frozen=True)
class DenseTensor:
    """A dense output tensor: merged, or with `from_base` the base's own values."""

    plan: TensorPlan
    from_base: bool


@dataclass(frozen=True)
class Target:
    """The file that dense tensors go to, where each lies in it, and the digests that take note of them."""

    file: Path
    descriptor: int
    infos: Mapping[str, TensorInfo]
    digests: Digests


def write_dense(
    streams: Streams, tensor: DenseTensor, piece: Piece, found: Mapping[str, NDArray[Any]], target: Target
) -> None:
    """Compute one slab of a dense tensor and write it to its place."""
    data = _slab(streams, tensor, piece, found)
    info = target.infos[piece.tensor]
    target.digests.note(info, piece.start, data)
    write_at(target.descriptor, target.file, bytes_of(data), info.start + piece.start * data.itemsize)


def digest_passed_over(target: Target, tensors: Sequence[TensorPlan], slab: int) -> None:
    """Take the digests of written tensors whose parts were no whole blocks, as matrices of a 3-D tensor may be."""
    known = target.digests.of(target.file)
    infos = [target.infos[tensor.name] for tensor in tensors if tensor.size and tensor.name not in known]
    handles = {target.file: LocalHandle(target.descriptor)}
    for info in infos:
        for piece in pieces(info.name, info.size, slab):
            target.digests.note(info, piece.start, read_slab(handles, info, piece.start, piece.stop))


def _slab(streams: Streams, tensor: DenseTensor, piece: Piece, found: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    method = tensor.plan.average
    if tensor.plan.dtype not in FLOAT_DTYPES:
        return read_slab(streams.stored.descriptors, streams.stored.tensors[piece.tensor], piece.start, piece.stop)
    if method is None or tensor.from_base:
        base = np.empty(piece.size, np.float32)
        streams.base.read_into(piece.tensor, piece.start, piece.stop, base)
        return narrow(base, tensor.plan.dtype)[0]
    inputs = streams.inputs(piece, method.space)
    uniforms = as_seen(tensor.plan, streams.uniforms(piece)) if method.method.random else None
    statistics = of_piece(streams, tensor.plan, piece, found)
    seen = as_seen(tensor.plan, inputs.rows)
    beside = None if inputs.base is None else as_seen(tensor.plan, inputs.base[None])[0]
    with naming(piece.tensor):
        answer = method(seen, streams.weights[piece.tensor], statistics, uniforms, beside)
    merged = as_stored(tensor.plan, answer)
    merged = merged if inputs.base is None else inputs.base + merged
    stored, is_whole = narrow(merged, tensor.plan.dtype)
    if not is_whole:
        raise not_finite(_too_large(merged, tensor.plan.dtype), f"the merged tensor in {tensor.plan.dtype}", piece)
    return stored


def _too_large(values: Floats, dtype: str) -> Floats:
    """Mark what is infinite once rounded."""
    limit = np.float32(65520.0) if dtype == "F16" else np.uint32(0x7F7F8000).view(np.float32)
    return np.where(np.abs(values) >= limit, np.copysign(np.float32(np.inf), values), values)
