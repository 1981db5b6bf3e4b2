"""What a step takes on this machine: done for a made-up model of some megabytes, by the engine itself."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.adapter.read import AdapterReader
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.digest import Digests, digest_blocks
from mediator_cli.checkpoint.header import DTYPE_BYTES
from mediator_cli.checkpoint.read import FullReader, narrow, open_files, read_floats
from mediator_cli.checkpoint.write import NewTensor, create_file
from mediator_cli.engine.batches import cut_shards
from mediator_cli.engine.conflict import count_tensors
from mediator_cli.engine.journal import start_journal
from mediator_cli.engine.pool import run_all
from mediator_cli.engine.statistics import Group, find_statistics
from mediator_cli.engine.streams import Budget, Piece, Streams, cut
from mediator_cli.engine.sweep import carry_out
from mediator_cli.engine.team import Alone
from mediator_cli.pipeline.cost import USUAL, read_step
from mediator_cli.pipeline.forecast import Rate
from mediator_cli.pipeline.settings import new_tensor
from mediator_cli.pipeline.write import Work, carry_out_batches
from mediator_cli.plan.model import ResolvedExtract, TensorPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Reader
    from mediator_cli.engine.statistics import Found
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.methods.method import ResolvedMethod
    from mediator_cli.pipeline.cost import Step

_LARGE, _SMALL = ((1024, 1024), 16), ((512,), 48)
"""Shapes and numbers of the tensors on which costs for each element, and for each tensor, are measured."""
_SIDES = 96, 384
"""Sides of the matrices on which methods that see them whole are measured."""
_SOURCES = 4
"""Experts that are written; where more are asked for, they are read again under other names."""
REPEATS = 3
"""How often a step is done to find the least that it takes, after a first time that does not count."""
_SPREAD = 0.002
_NANO = 1e9
_PLAIN = ResolvedExtract(1.0, "tensor", "magnitude", 1.0, "bf16")


@dataclass(frozen=True)
class Spent:
    """Processor time of all threads and time on the clock, in seconds."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Bench:
    """A made-up base and its experts, open for reading, and a folder to write to."""

    folder: Path
    descriptors: Mapping[Path, Any]
    base: Mapping[str, TensorInfo]
    experts: tuple[Mapping[str, TensorInfo], ...]
    budget: Budget
    serial: Iterator[int]
    stack: ExitStack

    def streams(self, n: int) -> Streams:
        """Open base and n experts, with weights of one."""
        stored = FullReader(self.descriptors, self.base)
        readers = tuple(FullReader(self.descriptors, self.experts[at % _SOURCES]) for at in range(n))
        weights = dict.fromkeys(self.base, np.ones(n, np.float64))
        return Streams(stored, stored, readers, tuple(f"e{at}" for at in range(n)), weights, 0)

    def tensors(
        self, large: bool, method: ResolvedMethod | None, extract: ResolvedExtract = _PLAIN, n: int = 1
    ) -> list[TensorPlan]:
        """Plan the large or the small tensors; as vectors where the method would see matrices whole."""
        wanted = [info for info in self.base.values() if (len(info.shape) > 1) == large]
        is_flat = method is not None and method.method.scope == "matrix"
        shapes = [(info.size,) if is_flat else info.shape for info in wanted]
        return [
            TensorPlan(info.name, info.name, shape, info.size, USUAL, method, extract, (1.0,) * n)
            for info, shape in zip(wanted, shapes, strict=True)
        ]


@contextmanager
def open_bench(folder: Path, workers: int) -> Iterator[Bench]:
    """Write a made-up base and experts of bfloat16 into a folder, and open them."""
    generator = np.random.default_rng(0)
    names = ["base", *(f"expert{at}" for at in range(_SOURCES))]
    members = [
        NewTensor(f"model.layers.{at}.{'norm' if len(shape) == 1 else 'mlp'}.weight", USUAL, shape)
        for shape, number in (_LARGE, _SMALL)
        for at in range(number)
    ]
    values = 0.02 * generator.standard_normal(sum(member.n_bytes // 2 for member in members), np.float32)
    placed = [_write(folder / f"{name}.safetensors", members, _changed(generator, values, name)) for name in names]
    with ExitStack() as stack:
        opened = stack.enter_context(open_files(info.file for infos in placed for info in infos.values()))
        yield Bench(folder, opened, placed[0], tuple(placed[1:]), Budget(workers, 2 * BLOCK), count(), stack)


def _changed(generator: np.random.Generator, values: Floats, name: str) -> Floats:
    if name == "base":
        return values
    return values + np.float32(_SPREAD) * generator.standard_normal(len(values), np.float32)


def _write(file: Path, members: Sequence[NewTensor], values: Floats) -> dict[str, TensorInfo]:
    infos = create_file(file, members, {})
    stored, _ = narrow(values, USUAL)
    with file.open("r+b") as stream:
        stream.seek(min(info.start for info in infos.values()))
        stream.write(stored.tobytes())
    return infos


def write_tiny_recipe(folder: Path) -> Path:
    """Write a recipe that merges one tiny tensor of two experts."""
    experts = [{"name": name, "model": f"./{name}"} for name in ("a", "b")]
    members = [NewTensor("model.embed_tokens.weight", USUAL, (4, 4))]
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        _write(folder / name / "model.safetensors", members, np.ones(16, np.float32))
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    recipe = {"version": 1, "base": "./base", "experts": experts, "assign": {"rule": "none"}, "tokenizer": "base"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"output": {"path": "./out"}}), encoding="utf-8")
    return folder / "recipe.yaml"


def best_time(function: Callable[[], object]) -> Spent:
    """Do something a few times and give the least that it took; the first time, which compiles, does not count."""
    function()
    found = []
    for _ in range(REPEATS):
        cpu, wall = time.process_time(), time.perf_counter()
        function()
        found.append(Spent(time.process_time() - cpu, time.perf_counter() - wall))
    return Spent(min(each.cpu for each in found), min(each.wall for each in found))


def measure(bench: Bench, step: Step) -> Rate:
    """Measure one step, on large tensors and on small ones."""
    if step.kind == "digest":
        return Rate(_digest(bench))
    if step.kind in ("read", "adapter", "pass"):
        return Rate(_read(bench, step))
    if step.kind == "matrix":
        return _matrix(bench, step.subject, step.n)
    large, small = (_PROBES[step.kind](bench, step, is_large) for is_large in (True, False))
    (shape, number), (other, others) = _LARGE, _SMALL
    element = large / (math.prod(shape) * number)
    return Rate(element, max(0.0, small / others - element * math.prod(other)))


def _conflict(bench: Bench, step: Step, large: bool) -> float:
    streams, sizes = bench.streams(step.n), {tensor.name: tensor.size for tensor in bench.tensors(large, None)}
    slab, workers = bench.budget.slab, bench.budget.workers
    return (
        _NANO * best_time(lambda: carry_out(count_tensors(streams, sizes, step.subject, slab), workers, _unheard)).cpu
    )


def _statistics(bench: Bench, step: Step, large: bool) -> float:
    return _NANO * best_time(lambda: _found(bench, step, large)).cpu


def _found(bench: Bench, step: Step, large: bool) -> Found:
    group = Group(tuple(bench.tensors(large, step.subject, n=step.n)))
    search = find_statistics(bench.streams(step.n), group, bench.budget.slab)
    return carry_out(search, bench.budget.workers, _unheard)


def _average(bench: Bench, step: Step, large: bool) -> float:
    tensors = bench.tensors(large, step.subject, n=step.n)
    found = _found(bench, step, large) if Group(tuple(tensors)).spans_model else {}
    return _NANO * best_time(lambda: _batches(bench, step.n, tensors, found)).cpu


def _copy(bench: Bench, step: Step, large: bool) -> float:
    tensors = [replace(tensor, dtype=step.what) for tensor in bench.tensors(large, None)]
    return _NANO * best_time(lambda: _batches(bench, 1, tensors)).cpu


def _extract(bench: Bench, step: Step, large: bool) -> float:
    """Measure what one expert's extraction adds to a copy of the base."""
    tensors = bench.tensors(large, None, step.subject)
    names = frozenset(tensor.name for tensor in tensors)
    both = best_time(lambda: _batches(bench, 2, tensors, routed=names)).cpu
    return _NANO * max(0.0, both - best_time(lambda: _batches(bench, 2, tensors)).cpu) / 2


def _matrix(bench: Bench, method: ResolvedMethod, n: int) -> Rate:
    """Measure a method on square matrices of two sizes: what it takes for each entry, and for entries times side."""
    _matrix_time(bench, method, n, _SIDES[0])
    small, large = (_matrix_time(bench, method, n, side) / side**2 for side in _SIDES)
    slope = max(0.0, (large - small) / (_SIDES[1] - _SIDES[0]))
    return Rate(slope, max(0.0, large - slope * _SIDES[1]))


def _matrix_time(bench: Bench, method: ResolvedMethod, n: int, side: int) -> float:
    """Time one matrix on each worker; they take long enough to be done but once."""
    streams, name = bench.streams(n), next(info.name for info in bench.base.values() if len(info.shape) > 1)
    inputs = streams.inputs(Piece(name, 0, side * side), method.space).rows.reshape(n, side, side)
    uniforms = np.full(inputs.shape, 0.5, np.float32) if method.method.random else None
    before = time.process_time()
    with threadpool_limits(1, user_api="blas"):
        workers = bench.budget.workers
        run_all(lambda _: method(inputs, np.ones(n), {}, uniforms), range(workers), workers)
    return _NANO * (time.process_time() - before) / workers


_PROBES: dict[str, Callable[[Bench, Step, bool], float]] = {
    "conflict": _conflict, "statistics": _statistics, "average": _average, "copy": _copy, "extract": _extract,
}  # fmt: skip


def _batches(
    bench: Bench,
    n: int,
    tensors: Sequence[TensorPlan],
    found: Found | None = None,
    routed: frozenset[str] = frozenset(),
) -> None:
    """Write tensors, and sparse experts of those that are routed, as a merge does."""
    folder = bench.folder / f"out{next(bench.serial)}"
    folder.mkdir()
    files = {"model.safetensors": [new_tensor(tensor) for tensor in tensors]}
    work = Work(
        streams=bench.streams(n),
        shards=cut_shards(files, {tensor.name: tensor for tensor in tensors}, n),
        found=found or {},
        routed=routed,
        from_base=frozenset(),
        folder=folder,
        journal=start_journal(folder / "journal", {}),
        seen=Digests(),
        budget=bench.budget,
        elements=0,
        advance=_unheard,
        team=Alone(),
    )
    carry_out_batches(work)
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


def _read(bench: Bench, step: Step) -> float:
    reader, parts = _reader(bench, step)
    taken = read_all(reader, parts, bench.budget.workers).cpu
    if step.kind == "adapter":
        taken -= read_all(*_reader(bench, read_step(USUAL)), bench.budget.workers).cpu
    return _NANO * max(0.0, taken) / sum(piece.size for piece in parts)


def read_all(read: Callable[[Piece], object], parts: Sequence[Piece], workers: int) -> Spent:
    """Read slabs with so many workers."""
    return best_time(lambda: run_all(read, parts, workers))


def all_deltas(bench: Bench, n: int) -> tuple[Callable[[Piece], object], list[Piece]]:
    """Give what reads a slab of n deltas, and all slabs of the large tensors."""
    sizes = {tensor.name: tensor.size for tensor in bench.tensors(True, None)}
    return bench.streams(n).deltas, cut(sizes, bench.budget.slab)


def _reader(bench: Bench, step: Step) -> tuple[Callable[[Piece], object], list[Piece]]:
    """Give what reads a slab as a step says, and the slabs to read."""
    if step.kind == "pass":
        return all_deltas(bench, step.n)
    infos = {name: info for name, info in bench.base.items() if len(info.shape) > 1}
    if step.kind == "read":
        infos = {name: _as(info, step.what) for name, info in infos.items()}
    reader: Reader = FullReader(bench.descriptors, infos)
    if step.kind == "adapter":
        reader = _adapter(bench, reader, infos, step.subject)
    parts = cut({name: info.size for name, info in infos.items()}, bench.budget.slab)
    return lambda piece: read_floats(reader, piece.tensor, piece.start, piece.stop), parts


def _as(info: TensorInfo, dtype: str) -> TensorInfo:
    """Look at the bytes of a tensor as if they were of another dtype."""
    return replace(info, dtype=dtype, shape=(info.n_bytes // DTYPE_BYTES[dtype],))


def _adapter(bench: Bench, base: Reader, infos: Mapping[str, TensorInfo], rank: int) -> AdapterReader:
    """Write an adapter of a rank on all large tensors, and open it."""
    folder = bench.folder / f"adapter{rank}"
    folder.mkdir(exist_ok=True)
    members = []
    for name, info in infos.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        members.append(NewTensor(f"{module}.lora_A.weight", "F32", (rank, info.shape[1])))
        members.append(NewTensor(f"{module}.lora_B.weight", "F32", (info.shape[0], rank)))
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "base_model_name_or_path": ""}
    (folder / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")
    file = folder / "adapter_model.safetensors"
    file.unlink(missing_ok=True)
    create_file(file, members, {})
    opened = open_adapter(folder, infos)
    return AdapterReader(base, bench.stack.enter_context(open_files([file])), opened)


def _digest(bench: Bench) -> float:
    """Measure the digest of one byte."""
    data = np.zeros(1 << 22, np.uint16)
    starts = range(0, len(data), bench.budget.slab)
    spent = best_time(
        lambda: run_all(lambda at: digest_blocks(data[at : at + bench.budget.slab]), starts, bench.budget.workers)
    )
    return _NANO * spent.cpu / data.nbytes


def _unheard(n: int) -> None:
    """Report nothing."""
