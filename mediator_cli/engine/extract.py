"""Write one sparse expert: what it adds to the dense tensors of the routed units."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.sparse import (
    ESCAPE,
    decode_values,
    encode_gaps,
    encode_values,
    index_codec,
    pack_bits,
    same_bits,
)
from mediator_cli.bundle.sparse_file import SparseTensor, start_sparse_file
from mediator_cli.checkpoint.read import TORCH_DTYPES, bytes_view, read_slab
from mediator_cli.engine.reduce import blocks_of, sum_blocks
from mediator_cli.engine.select import select_magnitudes
from mediator_cli.engine.streams import check_finite, pieces, uniform_slab
from mediator_cli.stages.extract import (
    keep_largest,
    keep_random,
    kept_count,
    scale_candidates,
    scale_errors,
    sign_sums,
    step_sums,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.sparse import IndexCodec
    from mediator_cli.bundle.sparse_file import SparseFileWriter
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Reader
    from mediator_cli.engine.streams import Piece
    from mediator_cli.plan.model import ResolvedExtract, TensorPlan

_LOSSLESS = ("fp32", "bf16", "fp16")
_REFINEMENTS = 2


@dataclass(frozen=True)
class Dense:
    """The dense tensors just written, open for reading."""

    descriptors: Mapping[Path, int]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Extraction:
    """One expert to extract: its reader, the dense tensors it adds to, the slab size and the seed."""

    name: str
    reader: Reader
    dense: Dense
    slab: int
    seed: int


@dataclass(frozen=True)
class Kept:
    """What a sparse expert keeps of one tensor: entries, squared norm of the delta and of the error."""

    n_kept: int
    n_overrides: int
    energy: float
    error: float


def extract_expert(
    job: Extraction, tensors: Sequence[TensorPlan], file: Path, advance: Callable[[int], None]
) -> dict[str, Kept]:
    """Write the file of one sparse expert; return what it keeps of each tensor."""
    kept: dict[str, Kept] = {}
    common = _common_threshold(job, [tensor for tensor in tensors if tensor.extract.over == "model" and tensor.size])
    with file.open("xb") as stream:
        writer = start_sparse_file(file, stream, job.name, [tensor.name for tensor in tensors])
        for tensor in tensors:
            if not tensor.size:
                kept[tensor.name] = Kept(0, 0, 0.0, 0.0)
            elif tensor.extract.over == "model":
                choice = _survey(job, tensor, common)
                common = replace(common, ties=common.ties - choice.ties)
                kept[tensor.name] = _extract_tensor(job, tensor, choice, writer)
            else:
                kept[tensor.name] = _extract_tensor(job, tensor, _choose_alone(job, tensor), writer)
            advance(tensor.size)
        writer.finish()
    return kept


def may_override(extract: ResolvedExtract) -> bool:
    """Whether entries that a round trip would change are stored as they are: where nothing else is lost."""
    return extract.density == 1 and extract.values in _LOSSLESS and extract.rescale == 1


@dataclass(frozen=True)
class _Part:
    """One slab: the expert's tensor [m] and the dense one in the output dtype, and their difference in float32."""

    expert: torch.Tensor
    dense: torch.Tensor
    delta: torch.Tensor


def _part(job: Extraction, tensor: TensorPlan, piece: Piece) -> _Part:
    exact = job.reader.read(piece.tensor, piece.start, piece.stop)
    if not torch.isfinite(exact.sum()):
        check_finite(exact, f"expert {job.name}", piece)
    expert = exact.to(TORCH_DTYPES[tensor.dtype])
    dense = read_slab(job.dense.descriptors, job.dense.tensors[piece.tensor], piece.start, piece.stop)
    return _Part(expert, dense, expert.float() - dense.float())


@dataclass(frozen=True)
class _Limit:
    """What the largest entries of several tensors reach, and how many of those that just reach it are kept."""

    value: float
    ties: int


@dataclass(frozen=True)
class _Choice:
    """Which entries of one tensor are kept: all above `limit`, and the first `ties` that equal it.

    No magnitude that is kept is above `bound`; `index` is the code for the positions.
    """

    limit: float
    ties: int
    bound: float
    index: IndexCodec


def _masked(job: Extraction, tensor: TensorPlan, choice: _Choice) -> Iterator[tuple[Piece, _Part, torch.Tensor]]:
    """Go through a tensor in order; give each slab with its mask of kept entries."""
    ties = choice.ties
    for piece in pieces(tensor.name, tensor.size, job.slab):
        part = _part(job, tensor, piece)
        if tensor.extract.select == "random":
            mask = keep_random(part.delta, uniform_slab(job.seed, job.name, piece), tensor.extract.density)
        else:
            mask = keep_largest(part.delta, choice.limit, ties)
            ties -= int((part.delta[mask].abs() == choice.limit).sum())
        yield piece, part, mask


def _choose_alone(job: Extraction, tensor: TensorPlan) -> _Choice:
    """Rank a tensor by itself."""
    count = kept_count(tensor.extract.density, tensor.size)
    index = index_codec(tensor.extract.density)
    needs_bound = tensor.extract.values == "int8"
    if not needs_bound and (tensor.extract.select == "random" or count == tensor.size):
        return _Choice(0.0, count, float("inf"), index)
    (found,) = select_magnitudes(pieces(tensor.name, tensor.size, job.slab), _deltas(job, [tensor]), [count], map)
    return _Choice(found.value, count - found.n_above, found.bound, index)


def _common_threshold(job: Extraction, tensors: Sequence[TensorPlan]) -> _Limit:
    """Rank the entries of several tensors together; they share one density."""
    if not tensors:
        return _Limit(0.0, 0)
    size = sum(tensor.size for tensor in tensors)
    count = kept_count(tensors[0].extract.density, size)
    if count == size:
        return _Limit(0.0, count)
    parts = [piece for tensor in tensors for piece in pieces(tensor.name, tensor.size, job.slab)]
    (found,) = select_magnitudes(parts, _deltas(job, tensors), [count], map)
    return _Limit(found.value, count - found.n_above)


def _deltas(job: Extraction, tensors: Sequence[TensorPlan]) -> Callable[[Piece], torch.Tensor]:
    planned = {tensor.name: tensor for tensor in tensors}
    return lambda piece: _part(job, planned[piece.tensor], piece).delta[None]


def _survey(job: Extraction, tensor: TensorPlan, common: _Limit) -> _Choice:
    """Find what a tensor keeps of the common share: its entries, its part of the ties, and how to code them."""
    n_kept, ties, bound = 0, 0, 0.0
    for _, part, mask in _masked(job, tensor, _Choice(common.value, common.ties, 0.0, "gaps")):
        kept = part.delta[mask].abs()
        n_kept += len(kept)
        ties += int((kept == common.value).sum())
        bound = max(bound, float(kept.max())) if len(kept) else bound
    return _Choice(common.value, ties, bound, index_codec(n_kept / tensor.size))


def _scale(job: Extraction, tensor: TensorPlan, choice: _Choice) -> float:
    """Find the scale with the least squared error: exact for signs, the best of a list then refined for int8."""
    if tensor.extract.values == "sign":
        total, count = sum_blocks(map(_per_block(sign_sums), _kept_values(job, tensor, choice))).tolist()
        return total / count if count else 1.0
    if tensor.extract.values == "int8" and 0 < choice.bound < float("inf"):
        scales = scale_candidates(choice.bound * tensor.extract.rescale)
        errors = _per_block(partial(scale_errors, scales=scales))
        scale = float(scales[sum_blocks(map(errors, _kept_values(job, tensor, choice))).argmin()])
        for _ in range(_REFINEMENTS):
            sums = _per_block(partial(step_sums, scale=scale))
            inner, norm = sum_blocks(map(sums, _kept_values(job, tensor, choice))).tolist()
            scale = inner / norm if norm else scale
        return scale
    return 1.0


def _kept_values(job: Extraction, tensor: TensorPlan, choice: _Choice) -> Iterator[tuple[torch.Tensor, ...]]:
    """Give each slab's kept values, block by block."""
    factor = tensor.extract.rescale
    for _, part, mask in _masked(job, tensor, choice):
        blocks = zip(blocks_of(part.delta), blocks_of(mask), strict=True)
        yield tuple(delta[kept] * factor for delta, kept in blocks)


def _per_block(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[tuple[torch.Tensor, ...]], torch.Tensor]:
    return lambda blocks: torch.stack([function(block) for block in blocks])


def _extract_tensor(job: Extraction, tensor: TensorPlan, choice: _Choice, writer: SparseFileWriter) -> Kept:
    coder = _Coder(tensor, _scale(job, tensor, choice), choice.index)
    stored = (coder.encode(piece, part, mask) for piece, part, mask in _masked(job, tensor, choice))
    codec = tensor.extract.values
    if codec == "sign":
        writer.append(_packed(stored), f"{tensor.name}.values", torch.uint8)
    else:
        writer.append(stored, f"{tensor.name}.values", encode_values(torch.zeros(0), codec, 1.0).dtype)
    return coder.finish(writer)


@dataclass
class _Coder:
    """What gathers while the values of one tensor are written."""

    tensor: TensorPlan
    scale: float
    index_codec: IndexCodec
    # Bytes, not lists of tensors: thousands of small tensors would keep the heap from shrinking.
    index: bytearray = field(default_factory=bytearray)
    override_index: bytearray = field(default_factory=bytearray)
    override_values: bytearray = field(default_factory=bytearray)
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    position: int = 0
    n_kept: int = 0

    def encode(self, piece: Piece, part: _Part, mask: torch.Tensor) -> torch.Tensor:
        """Encode one slab's kept values and note their positions, errors and overrides."""
        extract = self.tensor.extract
        local = torch.nonzero(mask).flatten()
        self._note_positions(piece, local, mask)
        stored = encode_values(part.delta[local] * extract.rescale, extract.values, self.scale)
        decoded = decode_values(stored, extract.values, self.scale)
        wide = part.delta.double()
        missing = wide.clone()
        # Rescaled values are meant to overshoot; what is kept is judged before.
        missing[local] -= decoded.double() / extract.rescale
        self.squares = sum_blocks([_square_sums(wide, missing)], self.squares)
        self.n_kept += len(local)
        if may_override(extract):
            self._note_overrides(piece, part, local, decoded)
        return stored

    def _note_positions(self, piece: Piece, local: torch.Tensor, mask: torch.Tensor) -> None:
        if self.index_codec == "bitmap":
            self.index += bytes_view(pack_bits(mask))
        elif len(local):
            self.index += bytes_view(encode_gaps(local + piece.start, self.position))
            self.position = piece.start + int(local[-1]) + 1

    def _note_overrides(self, piece: Piece, part: _Part, local: torch.Tensor, decoded: torch.Tensor) -> None:
        rebuilt = part.dense.float()
        rebuilt[local] += decoded
        wrong = torch.nonzero(~same_bits(rebuilt.to(part.expert.dtype), part.expert)).flatten()
        if len(wrong):
            self.override_index += bytes_view(wrong + piece.start)
            self.override_values += bytes_view(part.expert[wrong])

    def finish(self, writer: SparseFileWriter) -> Kept:
        """Append index and overrides, note the tensor in the header."""
        name, extract = self.tensor.name, self.tensor.extract
        codec = self.index_codec
        fill = ESCAPE if codec == "gaps" else 0
        writer.append([_tensor_of(self.index, torch.uint8)], f"{name}.{codec}", torch.uint8, fill)
        n_overrides = len(self.override_index) // torch.int64.itemsize
        if n_overrides:
            dtype = TORCH_DTYPES[self.tensor.dtype]
            writer.append([_tensor_of(self.override_index, torch.int64)], f"{name}.override_index", torch.int64)
            writer.append([_tensor_of(self.override_values, dtype)], f"{name}.override_values", dtype)
        writer.tensors[name] = SparseTensor(
            shape=self.tensor.shape,
            n_kept=self.n_kept,
            index=codec,
            values=extract.values,
            scale=self.scale,
            n_overrides=n_overrides,
        )
        energy, error = self.squares.tolist()
        return Kept(self.n_kept, n_overrides, energy, error)


def _tensor_of(data: bytearray, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _packed(signs: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Pack bools into bytes, eight across slabs where a slab's count is no multiple of eight."""
    rest = torch.empty(0, dtype=torch.bool)
    for part in signs:
        bits = torch.cat([rest, part])
        whole = len(bits) // 8 * 8
        yield pack_bits(bits[:whole])
        rest = bits[whole:]
    yield pack_bits(rest)


def _square_sums(wide: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    sums = [torch.stack([block.square().sum() for block in blocks_of(tensor)]) for tensor in (wide, missing)]
    return torch.stack(sums, dim=1)
