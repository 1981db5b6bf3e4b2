"""The experts of GraniteMoeShared: for each, the neurons in which it differs most from the block that all share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.read import FullReader, narrow, open_files
from mediator_cli.checkpoint.write import write_at
from mediator_cli.engine.streams import Piece, fill, open_streams
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.pipeline.progress import counter
from mediator_cli.plan.moe.check import block_tensor
from mediator_cli.plan.moe_plan import BASE
from mediator_cli.stages.neurons import (
    Block,
    column_squares,
    correction_of,
    most_changed,
    row_squares,
    score_neurons,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.moe_layout import Projection
    from mediator_cli.checkpoint.read import Reader
    from mediator_cli.kernels.arrays import Counts, Doubles, Floats
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan
    from mediator_cli.plan.moe_plan import MoePlan

_ROWS = 256
"""Rows that are read at a time: a block of a large model is far larger than what is kept of it."""


@dataclass(frozen=True)
class _Matrix:
    """A matrix [rows, columns] that is read some rows at a time, from flat index `start` of a tensor."""

    reader: Reader
    who: str
    name: str
    rows: int
    columns: int
    start: int = 0
    scale: float = 1.0

    def parts(self) -> Iterator[tuple[int, Floats]]:
        """Read all rows, some at a time, with the number of the first."""
        for row in range(0, self.rows, _ROWS):
            count = min(_ROWS, self.rows - row)
            out = np.empty(count * self.columns, np.float32)
            first = self.start + row * self.columns
            fill(self.reader, self.who, Piece(self.name, first, first + out.size), out)
            yield row, self.scale * out.reshape(count, self.columns)

    def chosen_rows(self, chosen: Counts) -> Floats:
        """Read some rows; [chosen, columns]."""
        return np.concatenate([part[chosen[_inside(chosen, row, part)] - row] for row, part in self.parts()])

    def chosen_columns(self, chosen: Counts) -> Floats:
        """Read some columns; [rows, chosen]."""
        return np.concatenate([part[:, chosen] for _, part in self.parts()])


def _inside(chosen: Counts, row: int, part: Floats) -> slice:
    first, last = np.searchsorted(chosen, [row, row + len(part)])
    return slice(int(first), int(last))


_Blocks = dict["Projection", _Matrix]


def write_neurons(plan: Plan, moe: MoePlan, folder: Path, infos: Mapping[str, TensorInfo], run: Settings) -> None:
    """Write the correction of every expert in every layer into a file that stands in its full size.

    The shared blocks are read as they were written. `infos` say where each tensor of the file goes.
    """
    layers, n_experts = moe.layers or (), len(moe.experts)
    hidden, inner = _shape(plan)
    advance = counter(run.progress, "neurons", len(layers) * n_experts * 3 * hidden * inner, 2 * 3 * hidden * inner)
    written = {info.name: info for file in sorted(folder.glob("*.safetensors")) for info in read_header(file).tensors}
    with open_streams(replace(plan, inputs={})) as streams, open_files(info.file for info in written.values()) as files:
        readers = {**dict(zip(streams.names, streams.experts, strict=True)), BASE: streams.base}
        common = FullReader(files, written)
        for layer in layers:
            shared = _shared(common, layer, hidden, inner)
            for number, name in enumerate(moe.experts):
                own = moe.spec.experts.get(name)
                expert = _expert(readers[name], name, layer, (hidden, inner), own.residual_scale if own else 1.0)
                _write(_correction(expert, shared, moe.inner), infos, layer, number)
                advance(1)


def _shape(plan: Plan) -> tuple[int, int]:
    hidden, inner = plan.base.tensors[block_tensor(0, "down_proj")].shape
    return hidden, inner


def _shared(reader: Reader, layer: int, hidden: int, inner: int) -> _Blocks:
    stem = f"model.layers.{layer}.shared_mlp"
    both = f"{stem}.input_linear.weight"
    return {
        "gate_proj": _Matrix(reader, "the merged model", both, inner, hidden),
        "up_proj": _Matrix(reader, "the merged model", both, inner, hidden, inner * hidden),
        "down_proj": _Matrix(reader, "the merged model", f"{stem}.output_linear.weight", hidden, inner),
    }


def _expert(reader: Reader, name: str, layer: int, shape: tuple[int, int], scale: float) -> _Blocks:
    (hidden, inner), who = shape, f"expert {name}"
    return {
        "gate_proj": _Matrix(reader, who, block_tensor(layer, "gate_proj"), inner, hidden),
        "up_proj": _Matrix(reader, who, block_tensor(layer, "up_proj"), inner, hidden),
        "down_proj": _Matrix(reader, who, block_tensor(layer, "down_proj"), hidden, inner, scale=scale),
    }


def _correction(expert: _Blocks, shared: _Blocks, width: int) -> Block:
    """Choose the neurons that changed most, as many as the width has place for, and build the correction of these."""
    gate, up = _rows(expert, shared, "gate_proj"), _rows(expert, shared, "up_proj")
    chosen = most_changed(score_neurons(gate, up, _columns(expert, shared)), width // 2)
    return correction_of(_chosen(expert, chosen), _chosen(shared, chosen), np.arange(len(chosen)), width)


def _rows(expert: _Blocks, shared: _Blocks, projection: Projection) -> Doubles:
    pairs = zip(expert[projection].parts(), shared[projection].parts(), strict=True)
    return np.concatenate([row_squares(mine, common) for (_, mine), (_, common) in pairs], axis=1)


def _columns(expert: _Blocks, shared: _Blocks) -> Doubles:
    total: Doubles = np.zeros((2, shared["down_proj"].columns))
    for (_, mine), (_, common) in zip(expert["down_proj"].parts(), shared["down_proj"].parts(), strict=True):
        total = column_squares(mine, common, total)
    return total


def _chosen(blocks: _Blocks, chosen: Counts) -> Block:
    gate, up = blocks["gate_proj"].chosen_rows(chosen), blocks["up_proj"].chosen_rows(chosen)
    return Block(gate, up, blocks["down_proj"].chosen_columns(chosen))


def _write(block: Block, infos: Mapping[str, TensorInfo], layer: int, number: int) -> None:
    """Put one expert's correction in its place: gate rows, then up rows; then down."""
    stem = f"model.layers.{layer}.block_sparse_moe"
    parts = {"input_linear": np.concatenate([block.gate, block.up]), "output_linear": block.down}
    for name, values in parts.items():
        info = infos[f"{stem}.{name}.weight"]
        stored, _ = narrow(np.ascontiguousarray(values, np.float32).reshape(-1), info.dtype)
        with info.file.open("r+b") as stream:
            write_at(stream.fileno(), info.file, bytes_of(stored), info.start + number * stored.nbytes)
