"""Write the weights of the compressed model: tensor by tensor, an expert's matrices one group at a time."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.checkpoint.moe_layout import PROJECTIONS
from mediator_cli.checkpoint.read import FullReader, narrow, open_files, read_bytes
from mediator_cli.checkpoint.write import create_file, index_json, write_at, write_error
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.moe.compress.align import by_weights
from mediator_cli.moe.compress.decide import new_gates, slots
from mediator_cli.moe.compress.layout import all_experts, new_shards
from mediator_cli.moe.compress.matrices import Matrices, project, weighted_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.moe_layout import MoeLayout, Projection
    from mediator_cli.checkpoint.read import Handle
    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.moe.compress.groups import Group
    from mediator_cli.moe.compress.job import Job

_STEP = 1 << 24
"""Bytes that are copied at a time."""
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class _Work:
    """Where tensors come from and where they go; `advanced` is told of the bytes written."""

    source: Checkpoint
    layout: MoeLayout
    job: Job
    handles: Mapping[Path, Handle]
    descriptors: Mapping[Path, int]
    placed: Mapping[str, TensorInfo]
    advanced: Callable[[int], None]

    def read(self, name: str) -> Floats:
        """Read a source's matrix in float32; raise CheckpointError where it is not finite."""
        info = self.source.tensors[name]
        out = np.empty(info.size, np.float32)
        if not FullReader(self.handles, self.source.tensors).read_into(name, 0, info.size, out):
            message, hint = "holds NaN or infinite values", "such experts cannot be merged: mend the checkpoint"
            raise CheckpointError(Problem(f"{self.source.path}: {name}", message, hint))
        return out.reshape(info.shape)

    def write(self, name: str, values: Floats) -> None:
        """Round a tensor once to its dtype and write it."""
        info = self.placed[name]
        if values.shape != info.shape:
            message = f"is {list(values.shape)}, where expert 0 says {list(info.shape)}"
            raise CheckpointError(Problem(f"{self.source.path}: {name}", message, "experts have to be of one shape"))
        stored, is_whole = narrow(np.ascontiguousarray(values, np.float32).reshape(-1), info.dtype)
        if not is_whole:
            raise CheckpointError(Problem(name, f"is too large for {info.dtype} once merged", "was it float16?"))
        write_at(self.descriptors[info.file], info.file, bytes_of(stored), info.start)
        self.advanced(info.n_bytes)

    def copy(self, name: str, to: str) -> None:
        """Copy a tensor's bytes."""
        info, place = self.source.tensors[name], self.placed[to]
        for first in range(0, info.n_bytes, _STEP):
            data = read_bytes(self.handles, info, first, min(first + _STEP, info.n_bytes))
            write_at(self.descriptors[place.file], place.file, bytes_of(data), place.start + first)
            self.advanced(len(data))


def write_weights(
    source: Checkpoint,
    layout: MoeLayout,
    job: Job,
    groups: Mapping[int, tuple[Group, ...]],
    folder: Path,
    shard_size: int,
    advanced: Callable[[int], None],
) -> dict[int, tuple[Group, ...]]:
    """Write all weight files and their index; `groups` by layer say what becomes of the experts.

    Members of a group are aligned here where the job says so and the groups hold no order yet; gives the groups with
    their orders.
    """
    shards = new_shards(source.tensors, layout, job.written(layout), shard_size)
    placed: dict[str, TensorInfo] = {}
    with ExitStack() as stack:
        descriptors = {}
        for name, members in shards.items():
            file = folder / name
            placed |= create_file(file, members, _METADATA)
            descriptors[file] = os.open(file, os.O_WRONLY)
            stack.callback(os.close, descriptors[file])
        handles = stack.enter_context(open_files(info.file for info in source.tensors.values()))
        work = _Work(source, layout, job, handles, descriptors, placed, advanced)
        done = _write_all(work, groups)
    index = json.dumps(index_json(shards), indent=2) + "\n"
    try:
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    except OSError as error:
        raise write_error(folder, error) from None
    return done


def _write_all(work: _Work, groups: Mapping[int, tuple[Group, ...]]) -> dict[int, tuple[Group, ...]]:
    old = {*all_experts(work.layout), *work.layout.routers}
    for name in work.source.tensors:
        if name not in old:
            work.copy(name, name)
    done = {}
    for layer, own in groups.items():
        gates = work.layout.format.router_of(layer)
        work.write(gates, new_gates(work.job, own, work.read(gates)))
        aligned = tuple(_with_orders(work, layer, group) for group in own)
        for group, places in zip(aligned, slots(work.job, own), strict=True):
            _write_group(work, layer, group, places)
        done[layer] = aligned
    return done


def _write_group(work: _Work, layer: int, group: Group, places: tuple[int, ...]) -> None:
    """Write what a group becomes, at each of its places."""
    form = work.layout.format
    for projection in PROJECTIONS:
        targets = [form.expert_of(layer, place, projection) for place in places]
        only = work.source.tensors[form.expert_of(layer, group.centre, projection)]
        if len(group.members) == 1 and (only.dtype, only.shape) == _form(work.placed[targets[0]]):
            work.copy(only.name, targets[0])
            continue
        merged = _merge(work, layer, group, projection)
        for target in targets:
            work.write(target, merged)


def _form(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return info.dtype, info.shape


def _merge(work: _Work, layer: int, group: Group, projection: Projection) -> Floats:
    def members() -> Iterator[Floats]:
        return (work.read(work.layout.format.expert_of(layer, member, projection)) for member in group.members)

    orders = group.orders or (None,) * len(group.members)
    mean = weighted_mean(members(), group.weights, orders, projection)
    if work.job.rank < 1:
        mean = project(mean, members(), work.job.rank)
    found: Floats = mean.astype(np.float32)
    return found


def _with_orders(work: _Work, layer: int, group: Group) -> Group:
    """Align the members of a group by their weights, unless a pass has aligned them by what they say."""
    if not work.job.align or group.orders or len(group.members) == 1:
        return group
    reference = _matrices(work, layer, group.centre)
    others = (by_weights(reference, _matrices(work, layer, member)) for member in group.members[1:])
    return replace(group, orders=(None, *others))


def _matrices(work: _Work, layer: int, expert: int) -> Matrices:
    gate, up, down = (work.read(work.layout.format.expert_of(layer, expert, each)) for each in PROJECTIONS)
    return Matrices(gate, up, down.T)


def new_config(config: Mapping[str, Any], layout: MoeLayout, job: Job) -> dict[str, Any]:
    """Change the fields of config.json that count experts."""
    form = layout.format
    changed = {form.n_experts: job.written(layout), form.top_k: job.top_k(layout)}
    # Some versions of transformers write the number of experts by both of its names.
    also = {name: job.written(layout) for name in ("num_experts", "num_local_experts") if name in config}
    return {**config, **changed, **also}
