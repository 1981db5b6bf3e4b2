"""Write the model folder: made tensors, then the bodies, slab by slab; never more than one slab in memory."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.checkpoint.heterogeneous import EMBED, HEAD, HEAD_BIAS, ROUTER, ROUTER_BIAS
from mediator_cli.checkpoint.read import narrow, open_files, read_slab, widen
from mediator_cli.checkpoint.source import weight_files
from mediator_cli.checkpoint.write import create_file, index_json, plan_shards, write_at
from mediator_cli.engine.publish import check_output, publish
from mediator_cli.engine.streams import Piece, not_finite
from mediator_cli.errors import OutputError, Problem
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.pipeline.download import download, far_files, free_bytes
from mediator_cli.pipeline.heterogeneous.folder import write_folder
from mediator_cli.pipeline.heterogeneous.router import choose_texts, start_router
from mediator_cli.pipeline.heterogeneous.rows import Table, averaged, side_by_side
from mediator_cli.pipeline.heterogeneous.start import projector_weight
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.settings import Settings
from mediator_cli.pipeline.side_files import write_json
from mediator_cli.recipe.sizes import human_bytes, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Handle
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.pipeline.heterogeneous.model import HeterogeneousPlan, PlannedExpert
    from mediator_cli.runtime.fit import Chosen

_METADATA = {"format": "pt"}
_SLAB = 1 << 20
"""Elements that are copied or averaged at a time."""


@dataclass(frozen=True)
class _Writing:
    """What is being written: the plan, where its tensors go, what is open for reading, and who is told."""

    plan: HeterogeneousPlan
    places: Mapping[str, TensorInfo]
    descriptors: Mapping[Path, int]
    handles: Mapping[Path, Handle]
    advance: Callable[[int], None]

    def put(self, name: str, start: int, values: Floats) -> None:
        """Write elements from `start` of a tensor, rounded once."""
        info = self.places[name]
        stored, is_whole = narrow(values.reshape(-1), info.dtype)
        if not is_whole:
            message = f"{name} has numbers that are not finite in {info.dtype}"
            raise OutputError(Problem(str(info.file), message, "write `output: {dtype: float32}`"))
        self.put_stored(name, start, stored)

    def put_stored(self, name: str, start: int, stored: NDArray[Any]) -> None:
        """Write stored elements from `start` of a tensor."""
        info = self.places[name]
        write_at(self.descriptors[info.file], info.file, bytes_of(stored), info.start + start * stored.itemsize)
        self.advance(stored.nbytes)


def output_folder(plan: HeterogeneousPlan, output: Path | str | None) -> Path:
    """Choose the folder: the one given, the recipe's output.path, or one named after the recipe, here."""
    written = plan.loaded.recipe.output.path
    if output is not None:
        return Path(output).absolute()
    return plan.loaded.resolve(written) if written else Path.cwd() / plan.loaded.path.stem


def merge_heterogeneous(
    plan: HeterogeneousPlan, output: Path | str | None = None, settings: Settings | None = None
) -> tuple[Path, tuple[str, ...]]:
    """Write the model of a plan; give its folder, which appears whole or not at all, and what is worth knowing.

    Raises MediatorError for what the user can mend.
    """
    run = settings or Settings()
    target = output_folder(plan, output)
    check_output(target, run.mode)
    chosen = choose_texts(plan)
    far = (file for expert in plan.experts for file in far_files(expert.source.tensors, expert.source.repo))
    download(tuple(dict.fromkeys(far)), run.progress, target, plan.n_bytes)
    _check_space(plan, target)
    with publish(target, run.mode, {"the recipe": plan.loaded.text}) as building:
        notices = _build(plan, building.folder, target.name, chosen, run)
    return target, notices


def _check_space(plan: HeterogeneousPlan, target: Path) -> None:
    free = free_bytes(target)
    if free < plan.n_bytes:
        message = f"the disk has {human_bytes(free)} free, the model needs {human_bytes(plan.n_bytes)}"
        raise OutputError(Problem(str(target), message, "free some space or choose another output with -o"))


def _build(plan: HeterogeneousPlan, folder: Path, title: str, chosen: Chosen | None, run: Settings) -> tuple[str, ...]:
    write_folder(plan, folder, title)
    shards = plan_shards(plan.tensors, parse_size(plan.loaded.recipe.output.shard_size))
    places: dict[str, TensorInfo] = {}
    for name, tensors in shards.items():
        places |= create_file(folder / name, tensors, _METADATA)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", index_json(shards))
    sources = [file for expert in plan.experts for file in weight_files(expert.source.tensors)]
    with open_files(sources) as handles, _open_for_writing(places) as descriptors:
        writing = _Writing(plan, places, descriptors, handles, counter(run.progress, "write", plan.n_bytes))
        _write_rows(writing)
        _write_projectors(writing)
        router, notices = start_router(plan, chosen, folder, places[EMBED])
        writing.put(ROUTER, 0, router.weight)
        writing.put(ROUTER_BIAS, 0, router.bias)
        for name, (expert, stored) in plan.copied.items():
            _copy(writing, name, expert, stored)
    return notices


@contextmanager
def _open_for_writing(places: Mapping[str, TensorInfo]) -> Iterator[dict[Path, int]]:
    with ExitStack() as stack:
        found: dict[Path, int] = {}
        for file in dict.fromkeys(info.file for info in places.values()):
            found[file] = os.open(file, os.O_WRONLY)
            stack.callback(os.close, found[file])
        yield found


def _write_rows(writing: _Writing) -> None:
    """Write embedding, head and its bias, some rows at a time."""
    bodies = [(expert, expert.body) for expert in writing.plan.experts]
    factors = {EMBED: "embedding_factor", HEAD: "head_factor", HEAD_BIAS: "head_factor"}
    for name, field in ((EMBED, "embedding"), (HEAD, "head"), (HEAD_BIAS, "head_bias")):
        if name not in writing.places:
            continue
        stored = [getattr(body, field) for _, body in bodies]
        tables = [
            Table(expert, writing.handles, expert.info(tensor) if tensor else None, getattr(body, factors[name]))
            for (expert, body), tensor in zip(bodies, stored, strict=True)
        ]
        _write_table(writing, name, tables)


def _write_table(writing: _Writing, name: str, tables: list[Table]) -> None:
    shape = writing.places[name].shape
    width = shape[1] if len(shape) == 2 else 1
    # A bias has no coordinates to put side by side.
    joined = side_by_side if writing.plan.loaded.recipe.width == "sum" and len(shape) == 2 else averaged
    step = max(1, _SLAB // width)
    for first in range(0, shape[0], step):
        rows = joined(tables, first, min(first + step, shape[0]), width)
        writing.put(name, first * width, rows)


def _write_projectors(writing: _Writing) -> None:
    recipe = writing.plan.loaded.recipe
    for name, info in writing.places.items():
        if ".proj_" not in name or ".body." in name:
            continue
        is_last = name.rsplit(".", 2)[1] == str(recipe.projectors.depth - 1)
        if name.endswith("bias"):
            values = np.zeros(info.shape, np.float32)
        else:
            values = projector_weight(recipe.projectors, recipe.seed, name, info.shape, is_last=is_last)
        writing.put(name, 0, values)


def _copy(writing: _Writing, name: str, expert: PlannedExpert, stored: str) -> None:
    """Copy a tensor of a body; raise CheckpointError where it holds NaN or infinity."""
    info, target = expert.info(stored), writing.places[name]
    values = np.empty(min(_SLAB, info.size), np.float32)
    for start in range(0, info.size, _SLAB):
        stop = min(start + _SLAB, info.size)
        found = read_slab(writing.handles, info, start, stop)
        if info.dtype not in FLOAT_DTYPES:
            writing.put_stored(name, start, found)
            continue
        part = values[: stop - start]
        if not widen(found, info.dtype, part):
            raise not_finite(part, f"expert {expert.name}", Piece(stored, start, stop))
        if info.dtype == target.dtype:
            writing.put_stored(name, start, found)
        else:
            writing.put(name, start, part)
