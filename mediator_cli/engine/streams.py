"""Base and experts as streams of slabs: float32, finite, in recipe order."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.adapter.read import AdapterReader
from mediator_cli.checkpoint.read import FullReader, MappedReader, open_files
from mediator_cli.checkpoint.source import weight_files
from mediator_cli.errors import CheckpointError, OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.read import Reader
    from mediator_cli.checkpoint.spans import Layout
    from mediator_cli.methods.registry import Space
    from mediator_cli.plan.model import ExpertSource, Plan

BLOCK = 1 << 16
"""Elements in a fixed block. Sums and random numbers are per block; slabs are whole blocks, so they change nothing."""
RUNTIME_BYTES = 400 << 20
"""Memory of the interpreter with torch, before anything is read."""
_BLOCKS_PER_SLAB = 2


@dataclass(frozen=True)
class Budget:
    """How much runs at a time: worker threads, and elements in a slab (a multiple of BLOCK)."""

    workers: int
    slab: int


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of one tensor."""

    tensor: str
    start: int
    stop: int


def make_budget(n_experts: int, workers: int, memory: int, resident: int = RUNTIME_BYTES) -> Budget:
    """Choose the largest slab, up to two blocks, with which all workers fit in `memory` bytes beside `resident`.

    Raises OutputError when not even one worker with one block does.
    """
    for count in range(workers, 0, -1):
        for blocks in range(_BLOCKS_PER_SLAB, 0, -1):
            if peak_bytes(n_experts, Budget(count, blocks * BLOCK), resident) <= memory:
                return Budget(count, blocks * BLOCK)
    least = peak_bytes(n_experts, Budget(1, BLOCK), resident)
    message = f"{memory >> 20} MiB are too little for {n_experts} experts"
    raise OutputError(Problem("--memory", message, f"give at least {-(-least >> 20)} MiB"))


def peak_bytes(n_experts: int, budget: Budget, resident: int = RUNTIME_BYTES) -> int:
    """Estimate the peak memory of streaming: what is there before, and about six float32 slabs per expert."""
    return resident + budget.workers * budget.slab * 4 * (6 * n_experts + 8)


def pieces(tensor: str, size: int, slab: int) -> list[Piece]:
    """Cut a tensor into slabs; an empty tensor has none."""
    return [Piece(tensor, start, min(start + slab, size)) for start in range(0, size, slab)]


@dataclass(frozen=True)
class Streams:
    """All sources of a plan, open for reading; `stored` has the base's tensors as they lie on disk.

    `weights` are the merge coefficients [n] in float64 by tensor.
    """

    stored: FullReader
    base: Reader
    experts: tuple[Reader, ...]
    names: tuple[str, ...]
    weights: Mapping[str, torch.Tensor]
    seed: int

    def inputs(self, piece: Piece, space: Space) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read one slab of all experts [n, m] and, for deltas, of the base [m]."""
        tensors = torch.stack([reader.read(piece.tensor, piece.start, piece.stop) for reader in self.experts])
        if space == "weight":
            self._check(tensors, None, piece)
            return tensors, None
        base = self.base.read(piece.tensor, piece.start, piece.stop)
        tensors -= base
        self._check(tensors, base, piece)
        return tensors, base

    def deltas(self, piece: Piece) -> torch.Tensor:
        """Read one slab of all deltas [n, m]."""
        return self.inputs(piece, "delta")[0]

    def uniforms(self, piece: Piece) -> torch.Tensor:
        """Draw uniform numbers in [0, 1) for one slab [n, m], from (seed, expert, tensor, block) alone."""
        return torch.stack([uniform_slab(self.seed, name, piece) for name in self.names])

    def _check(self, tensors: torch.Tensor, base: torch.Tensor | None, piece: Piece) -> None:
        # A finite sum proves that every entry is finite, in one pass.
        if torch.isfinite(tensors.sum()):
            return
        if base is not None:
            check_finite(base, "base", piece)
        for name, tensor in zip(self.names, tensors, strict=True):
            check_finite(tensor, f"delta of expert {name}" if base is not None else f"expert {name}", piece)


def check_finite(tensor: torch.Tensor, who: str, piece: Piece) -> None:
    """Raise CheckpointError with the first entry that is NaN or infinite."""
    bad = torch.nonzero(~torch.isfinite(tensor))
    if len(bad):
        message = f"{who} is {tensor[bad[0, 0]].item()} at flat index {piece.start + int(bad[0, 0])}"
        hint = "the fine-tune diverged or the file is damaged; leave it out or fetch it again"
        raise CheckpointError(Problem(piece.tensor, message, hint))


def uniform_slab(seed: int, name: str, piece: Piece) -> torch.Tensor:
    """Draw the uniform numbers of one expert for one slab [m]; the slab starts on a block."""
    blocks = []
    for block in range(piece.start // BLOCK, -(-piece.stop // BLOCK)):
        key = hashlib.blake2b(f"{seed}\0{name}\0{piece.tensor}\0{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        blocks.append(torch.rand(BLOCK, generator=generator))
    return torch.cat(blocks)[: piece.stop - piece.start]


@contextmanager
def open_streams(plan: Plan) -> Iterator[Streams]:
    """Open all files of a plan for reading."""
    files = [*weight_files(plan.base.tensors)]
    for expert in plan.experts:
        files += weight_files(expert.tensors)
    with open_files(files) as descriptors:
        stored = FullReader(descriptors, plan.base.tensors)
        own: dict[str, Reader] = {"base": stored}
        own |= {expert.name: _own_reader(expert, stored, descriptors) for expert in plan.experts}
        readers = {name: _mapped(name, own, plan.vocabulary.get(name, {})) for name in own}
        names = tuple(expert.name for expert in plan.experts)
        weights = {tensor.name: torch.tensor(tensor.weights, dtype=torch.float64) for tensor in plan.tensors}
        experts = tuple(readers[name] for name in names)
        yield Streams(stored, readers["base"], experts, names, weights, plan.loaded.recipe.seed)


def _own_reader(expert: ExpertSource, base: FullReader, descriptors: Mapping[Path, int]) -> Reader:
    """Read an expert's tensors under the base's names."""
    if isinstance(expert.source, Adapter):
        return AdapterReader(base, descriptors, expert.source)
    stored = FullReader(descriptors, expert.source.tensors)
    return _mapped(expert.name, {expert.name: stored}, expert.layout)


def _mapped(name: str, readers: Mapping[str, Reader], layout: Layout) -> Reader:
    return MappedReader(name, readers, layout) if layout else readers[name]
