"""Base and experts as streams of slabs: float32, finite, in recipe order."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.adapter.read import AdapterReader
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.permuted import PermutedReader
from mediator_cli.checkpoint.read import FullReader, MappedReader, open_files
from mediator_cli.checkpoint.source import weight_files
from mediator_cli.errors import CheckpointError, OutputError, Problem
from mediator_cli.kernels.random import fill_uniforms

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.checkpoint.digest import Digests
    from mediator_cli.checkpoint.permuted import Axes
    from mediator_cli.checkpoint.read import Handle, Reader
    from mediator_cli.checkpoint.spans import Layout
    from mediator_cli.kernels.arrays import Doubles, Floats
    from mediator_cli.methods.statistics import Space
    from mediator_cli.plan.model import ExpertSource, Plan

RUNTIME_BYTES = 184 << 20
"""Memory of the interpreter with its compiled kernels, before anything is read."""
TABLE_BYTES = 64 << 20
"""What the search for thresholds holds beside the slabs, at most: where each tensor of a batch has its own."""
_ROW_BLOCKS = 20
"""Blocks of all experts and the base in a slab, about: more leave the processor's cache, fewer are much overhead."""


@dataclass(frozen=True)
class Budget:
    """How much runs at a time: worker threads, elements in a slab (a multiple of BLOCK), bytes of a whole matrix.

    `whole` is what merging the largest matrix takes that a method has to see whole: inputs, results, working memory.
    """

    workers: int
    slab: int
    whole: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of one tensor."""

    tensor: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Inputs:
    """One slab of all experts: rows [n, m], and the base [m] where the rows are deltas.

    `memo` keeps what one of those who look at the slab has worked out for the others.
    """

    rows: Floats
    base: Floats | None
    memo: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)


def make_budget(n_experts: int, workers: int, memory: int, resident: int = RUNTIME_BYTES, whole: int = 0) -> Budget:
    """Choose the largest slab, up to what suits the processor, with which all workers fit in `memory` bytes.

    `resident` is there before; `whole` is what the largest whole matrix takes.

    Raises OutputError when not even one worker with one block does.
    """
    most = max(1, min(4, _ROW_BLOCKS // (n_experts + 1)))
    for count in range(workers, 0, -1):
        for blocks in range(most, 0, -1):
            budget = Budget(count, blocks * BLOCK, whole)
            if peak_bytes(n_experts, budget, resident) <= memory:
                return budget
    least = peak_bytes(n_experts, Budget(1, BLOCK, whole), resident)
    message = f"{memory >> 20} MiB are too little for {n_experts} experts"
    message += f" and matrices of {whole >> 20} MiB that the method sees whole" if whole else ""
    raise OutputError(Problem("--memory", message, f"give at least {-(-least >> 20)} MiB"))


def peak_bytes(n_experts: int, budget: Budget, resident: int = RUNTIME_BYTES) -> int:
    """Estimate the peak memory of streaming: what is there before, tables, and about two float32 slabs per expert."""
    return resident + TABLE_BYTES + budget.workers * max(budget.slab * 4 * (2 * n_experts + 8), budget.whole)


def pieces(tensor: str, size: int, slab: int) -> list[Piece]:
    """Cut a tensor into slabs; an empty tensor has none."""
    return [Piece(tensor, start, min(start + slab, size)) for start in range(0, size, slab)]


@dataclass(frozen=True)
class Streams:
    """All sources of a plan, open for reading; `stored` has the base's tensors as they lie on disk.

    `weights` are the merge coefficients [n] in float64 by tensor. `second_moments` are those of all experts, or none.
    """

    stored: FullReader
    base: Reader
    experts: tuple[Reader, ...]
    names: tuple[str, ...]
    weights: Mapping[str, Doubles]
    seed: int
    second_moments: tuple[Reader, ...] = ()

    def n_inputs(self, tensor: str) -> int:
        """Count what is merged to a tensor: all experts, or as many inputs as its slice has."""
        return len(self.weights[tensor]) if tensor in self.weights else len(self.names)

    def inputs(self, piece: Piece, space: Space) -> Inputs:
        """Read one slab of all experts and, for deltas, of the base."""
        rows = np.empty((self.n_inputs(piece.tensor), piece.size), np.float32)
        for name, reader, row in zip(self.names, self.experts, rows, strict=False):
            fill(reader, f"expert {name}", piece, row)
        if space == "weight":
            return Inputs(rows, None)
        base = np.empty(piece.size, np.float32)
        fill(self.base, "base", piece, base)
        rows -= base
        return Inputs(rows, base)

    def deltas(self, piece: Piece) -> Inputs:
        """Read one slab of all deltas."""
        return self.inputs(piece, "delta")

    def tensors(self, piece: Piece) -> Inputs:
        """Read one slab of all experts' own parameters."""
        return self.inputs(piece, "weight")

    def moments(self, piece: Piece) -> Floats:
        """Read the second moments of all experts for one slab [n, m]; raise CheckpointError where one is negative."""
        rows = np.empty((len(self.second_moments), piece.size), np.float32)
        for name, reader, row in zip(self.names, self.second_moments, rows, strict=True):
            fill(reader, f"second moment of {name}", piece, row)
            if (row < 0).any():
                raise _negative(row, name, piece)
        return rows

    def uniforms(self, piece: Piece) -> Floats:
        """Draw uniform numbers in [0, 1) for one slab [n, m], from (seed, expert, tensor, position) alone."""
        rows = np.empty((self.n_inputs(piece.tensor), piece.size), np.float32)
        for name, row in zip(self.names, rows, strict=False):
            draw(self.seed, name, piece, row)
        return rows


def fill(reader: Reader, who: str, piece: Piece, out: Floats) -> None:
    """Read one slab; raise CheckpointError with the first entry that is NaN or infinite."""
    if not reader.read_into(piece.tensor, piece.start, piece.stop, out):
        raise not_finite(out, who, piece)


def not_finite(values: Floats, who: str, piece: Piece) -> CheckpointError:
    """Say which entry of a slab is the first that is no finite number."""
    at = int(np.argmin(np.isfinite(values)))
    message = f"{who} is {values[at]} at flat index {piece.start + at}"
    hint = "the fine-tune diverged or the file is damaged; leave it out or fetch it again"
    return CheckpointError(Problem(piece.tensor, message, hint))


def _negative(values: Floats, name: str, piece: Piece) -> CheckpointError:
    at = int(np.argmax(values < 0))
    message = f"second moment of {name} is {values[at]} at flat index {piece.start + at}"
    return CheckpointError(Problem(piece.tensor, message, "means of squares are never negative; is this exp_avg?"))


def draw(seed: int, name: str, piece: Piece, out: Floats) -> None:
    """Draw the uniform numbers of one expert for one slab [m]."""
    key = hashlib.blake2b(f"{seed}\0{name}\0{piece.tensor}".encode(), digest_size=8).digest()
    fill_uniforms(int.from_bytes(key, "little") >> 1, piece.start, out)


@contextmanager
def open_streams(
    plan: Plan, digests: Digests | None = None, axes: Mapping[str, Mapping[str, Axes]] | None = None
) -> Iterator[Streams]:
    """Open all files of a plan for reading; `digests` take note of the sources' tensors as they pass by.

    `axes` say, by source and tensor, in which order rows and columns are read.
    """
    files = [*weight_files(plan.base.tensors)]
    for expert in plan.experts:
        files += weight_files(expert.tensors)
        files += weight_files(expert.moments.tensors) if expert.moments else ()
    with open_files(files) as descriptors:
        stored = FullReader(descriptors, plan.base.tensors, digests)
        own: dict[str, Reader] = {"base": stored}
        own |= {expert.name: _own_reader(expert, stored, descriptors, digests) for expert in plan.experts}
        own |= {name: PermutedReader(own[name], each) for name, each in (axes or {}).items()}
        readers = {name: _mapped(name, own, plan.vocabulary.get(name, {})) for name in own}
        names = tuple(expert.name for expert in plan.experts)
        if plan.inputs:
            names = tuple(name for name in plan.inputs if name != "base")
            readers = {name: MappedReader(name, readers, layout) for name, layout in plan.inputs.items()}
        weights = {tensor.name: np.array(tensor.weights, np.float64) for tensor in plan.tensors}
        experts = tuple(readers[name] for name in names)
        moments = tuple(_moments(plan, descriptors, digests, axes or {}))
        yield Streams(stored, readers["base"], experts, names, weights, plan.loaded.recipe.seed, moments)


def _moments(
    plan: Plan,
    descriptors: Mapping[Path, Handle],
    digests: Digests | None,
    axes: Mapping[str, Mapping[str, Axes]],
) -> Iterator[Reader]:
    """Read the second moments of all experts that have them, in the order in which their tensors are read."""
    for expert in plan.experts:
        if expert.moments is not None:
            stored = FullReader(descriptors, expert.moments.tensors, digests)
            yield PermutedReader(stored, axes[expert.name]) if expert.name in axes else stored


def _own_reader(
    expert: ExpertSource, base: FullReader, descriptors: Mapping[Path, Handle], digests: Digests | None
) -> Reader:
    """Read an expert's tensors under the base's names."""
    if isinstance(expert.source, Adapter):
        return AdapterReader(base, descriptors, expert.source)
    stored = FullReader(descriptors, expert.source.tensors, digests)
    return _mapped(expert.name, {expert.name: stored}, expert.layout)


def _mapped(name: str, readers: Mapping[str, Reader], layout: Layout) -> Reader:
    return MappedReader(name, readers, layout) if layout else readers[name]


def cut(tensors: Mapping[str, int] | Sequence[tuple[str, int]], slab: int) -> list[Piece]:
    """Cut tensors, given with their sizes, into slabs, tensor by tensor."""
    items = tensors.items() if hasattr(tensors, "items") else tensors
    return [piece for name, size in items for piece in pieces(name, size, slab)]
