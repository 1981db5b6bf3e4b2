"""Write the dense tensors: averaged, copied from the base, slab by slab into files of known size."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.checkpoint.read import TORCH_DTYPES, bytes_view, read_slab
from mediator_cli.checkpoint.write import create_file, write_at
from mediator_cli.engine.reduce import metered
from mediator_cli.engine.streams import check_finite, pieces
from mediator_cli.stages.average import average_slab

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.write import NewTensor
    from mediator_cli.engine.statistics import Found
    from mediator_cli.engine.streams import Budget, Piece, Streams
    from mediator_cli.plan.model import TensorPlan


@dataclass(frozen=True)
class DenseTensor:
    """A dense output tensor: merged, or with `from_base` the base's own values."""

    plan: TensorPlan
    from_base: bool


def write_dense(
    streams: Streams,
    tensors: Sequence[DenseTensor],
    shards: Mapping[Path, Sequence[NewTensor]],
    found: Found,
    budget: Budget,
    advance: Callable[[int], None],
) -> dict[str, TensorInfo]:
    """Compute and write all dense tensors; return where each one lies."""
    infos: dict[str, TensorInfo] = {}
    for file, members in shards.items():
        infos |= create_file(file, members, {"format": "pt"})
    dense = {tensor.plan.name: tensor for tensor in tensors}
    with ExitStack() as stack:
        outputs = {file: stack.enter_context(file.open("r+b", buffering=0)).fileno() for file in shards}

        def work(piece: Piece) -> None:
            tensor = dense[piece.tensor]
            data = _slab(streams, tensor, piece, found.get(piece.tensor, {}))
            info = infos[piece.tensor]
            offset = info.start + piece.start * data.element_size()
            write_at(outputs[info.file], info.file, bytes_view(data.contiguous()), offset)

        parts = [part for tensor in tensors for part in pieces(tensor.plan.name, tensor.plan.size, budget.slab)]
        for _ in metered(work, parts, budget, lambda piece: advance(piece.stop - piece.start)):
            pass
    return infos


def _slab(streams: Streams, tensor: DenseTensor, piece: Piece, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    method = tensor.plan.average
    dtype = TORCH_DTYPES[tensor.plan.dtype]
    if not dtype.is_floating_point:
        info = streams.stored.tensors[piece.tensor]
        return read_slab(streams.stored.descriptors, info, piece.start, piece.stop)
    if method is None or tensor.from_base:
        return streams.base.read(piece.tensor, piece.start, piece.stop).to(dtype)
    inputs, base = streams.inputs(piece, method.method.space)
    uniforms = streams.uniforms(piece) if method.method.random else None
    merged = average_slab(method, inputs, base, streams.weights[piece.tensor], found, uniforms).to(dtype)
    if not torch.isfinite(merged.sum(dtype=torch.float32)):
        check_finite(merged, f"the merged tensor in {tensor.plan.dtype}", piece)
    return merged
