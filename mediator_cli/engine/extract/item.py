"""One tensor of one expert as it is read for extraction: the expert's values less the dense ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.checkpoint.read import narrow, read_slab, widen
from mediator_cli.engine.streams import Inputs, fill, pieces
from mediator_cli.kernels.sparse import subtract_bf16

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.adapter.open import Adapter
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Handle, Reader
    from mediator_cli.engine.streams import Piece
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.plan.model import ResolvedExtract, TensorPlan

_LOSSLESS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Dense:
    """The dense tensors just written, open for reading."""

    descriptors: Mapping[Path, Handle]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Extraction:
    """The experts to extract, by name, the dense tensors they add to, the slab size and the seed.

    `adapters` are those of them of which the factors may be kept as they are.
    `stop` is set when another tensor's error or an interrupt has made the work useless.
    """

    experts: Mapping[str, Reader]
    dense: Dense
    slab: int
    seed: int
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    stop: Event = field(default_factory=Event)


@dataclass(frozen=True)
class Part:
    """One slab: the expert's tensor as it is read [m], the dense one as it is stored, and their difference.

    The expert's tensor is rounded to the dense one's dtype before they are subtracted.
    """

    expert: Floats
    dense: NDArray[Any]
    delta: Floats


@dataclass(frozen=True)
class Item:
    """One tensor of one expert."""

    job: Extraction
    expert: str
    tensor: TensorPlan

    @property
    def key(self) -> tuple[str, str]:
        """Expert and tensor by name."""
        return self.expert, self.tensor.name

    def pieces(self) -> list[Piece]:
        """Cut the tensor into slabs."""
        return pieces(self.tensor.name, self.tensor.size, self.job.slab)

    def part(self, piece: Piece) -> Part:
        """Read one slab; raise CheckpointError when the expert is not finite."""
        values = np.empty(piece.size, np.float32)
        fill(self.job.experts[self.expert], f"expert {self.expert}", piece, values)
        dense = read_slab(self.job.dense.descriptors, self.job.dense.tensors[piece.tensor], piece.start, piece.stop)
        return Part(values, dense, _less(values, dense, self.tensor.dtype))

    def rows(self, piece: Piece) -> Inputs:
        """Read the delta of one slab as a single row."""
        return Inputs(self.part(piece).delta[None], None)


def may_override(extract: ResolvedExtract) -> bool:
    """Whether entries that a round trip would change are stored as they are: where nothing else is lost."""
    return extract.mode == "sparse" and extract.density == 1 and extract.values in _LOSSLESS and extract.rescale == 1


def _less(values: Floats, dense: NDArray[Any], dtype: str) -> Floats:
    if dtype == "BF16":
        subtract_bf16(values, dense, out := np.empty(len(values), np.float32))
        return out
    rounded = values if dtype == "F32" else widened(narrow(values, dtype)[0], dtype)
    return rounded - widened(dense, dtype)


def widened(stored: NDArray[Any], dtype: str) -> Floats:
    """Turn stored elements [m] into float32 [m]."""
    if dtype == "F32":
        return stored
    out = np.empty(len(stored), np.float32)
    widen(stored, dtype, out)
    return out
