"""Put the hidden units of all sources in one order before anything else looks at them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.read import open_files, read_slab
from mediator_cli.checkpoint.write import NewTensor, create_file, sync, write_at
from mediator_cli.engine.align import Effort, Pair, axes_of, match_units, voting_entries
from mediator_cli.engine.streams import RUNTIME_BYTES, open_streams
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.settings import row_bytes
from mediator_cli.stages.align import is_identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.digest import Digests
    from mediator_cli.checkpoint.permuted import Axes
    from mediator_cli.engine.align import Orders
    from mediator_cli.engine.streams import Streams
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan
    from mediator_cli.plan.units import AlignPlan

ALIGNMENT = "alignment.safetensors"
_METADATA = {"format": "mediator alignment 1"}
_FEW = 0.01
"""Share of units up to which an order counts as that of a fine-tune of the same base."""


@dataclass(frozen=True)
class Aligned:
    """How the sources' tensors are read, by source and tensor, and what there is to say of it."""

    axes: Mapping[str, Mapping[str, Axes]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def align_words(plan: Plan) -> str:
    """Name the alignment in words, the same for the same setting."""
    spec = plan.loaded.recipe.align
    if plan.align is None or spec is None or not plan.align.moving:
        return "none"
    return f"{spec.method} of {', '.join(spec.groups)} to {spec.to}, seed {plan.align.seed}, {spec.max_passes} passes"


@contextmanager
def open_aligned(plan: Plan, run: Settings, digests: Digests | None = None) -> Iterator[Streams]:
    """Open all files of a plan for reading, each source in the order that the recipe's `align` gives it."""
    aligned = align_sources(plan, run)
    with open_streams(plan, digests, aligned.axes) as streams:
        yield streams


def align_sources(plan: Plan, run: Settings, folder: Path | None = None) -> Aligned:
    """Find the orders of all units of all sources; with a folder they are kept in it, or found there.

    Of a team the first process finds them, and all get them. Notices are told.
    """
    if plan.align is None or not plan.align.moving:
        return Aligned()
    found: dict[str, Orders] = {name: _as_they_are(plan.align) for name in plan.align.moving}
    if run.team.is_first:
        file = None if folder is None else folder / ALIGNMENT
        if file is not None and file.is_file():
            _read(file, found)
        else:
            found = _match(plan, plan.align, run)
            if file is not None:
                _write(file, found)
    else:
        found = {name: {key: np.zeros_like(order) for key, order in each.items()} for name, each in found.items()}
    shared = run.team.share([list(each.values()) for each in found.values()])
    orders = {name: dict(zip(found[name], some, strict=True)) for name, some in zip(found, shared, strict=True)}
    return _aligned(plan, plan.align, orders, run)


def _as_they_are(align: AlignPlan) -> Orders:
    return {one.name: np.arange(one.size) for one in align.units}


def _aligned(plan: Plan, align: AlignPlan, orders: Mapping[str, Orders], run: Settings) -> Aligned:
    shapes = {name: info.shape for name, info in plan.base.tensors.items()}
    axes: dict[str, Mapping[str, Axes]] = {name: axes_of(align.units, each, shapes) for name, each in orders.items()}
    # An adapter is read as the base with something added, so it goes where the base goes.
    axes |= {expert.name: axes["base"] for expert in plan.experts if expert.kind == "lora" and "base" in axes}
    notices = tuple(_told(align, name, each) for name, each in orders.items())
    for notice in notices:
        run.notify(notice)
    return Aligned({name: each for name, each in axes.items() if each}, notices)


def _told(align: AlignPlan, name: str, orders: Orders) -> str:
    """Say how many units of each group moved."""
    counts = {group: [0, 0] for group in dict.fromkeys(one.group for one in align.units)}
    for one in align.units:
        counts[one.group][0] += int((orders[one.name] != np.arange(one.size)).sum())
        counts[one.group][1] += one.size
    moved, total = (sum(count[at] for count in counts.values()) for at in (0, 1))
    who = "the base" if name == "base" else f"expert {name}"
    told = f"align: of {who} {', '.join(f'{m} of {n} units of {group}' for group, (m, n) in counts.items())} moved"
    few = "; it is in that order already, or nearly, as fine-tunes of one base are: align does nothing for it"
    return told + (few if moved <= _FEW * total else "")


def _match(plan: Plan, align: AlignPlan, run: Settings) -> dict[str, Orders]:
    with open_streams(plan) as streams:
        readers = {"base": streams.base, **dict(zip(streams.names, streams.experts, strict=True))}
        said = {name: "base" if name == "base" else f"expert {name}" for name in readers}
        shapes = {name: info.shape for name, info in plan.base.tensors.items()}
        # A tensor whose rows come from several sources votes for none, and what is kept from the base has no other.
        mixed = {name for layout in plan.vocabulary.values() for name in layout}
        voters = frozenset(t.name for t in plan.tensors if t.average is not None and t.size) - mixed
        pairs = {
            name: Pair(readers[align.target], readers[name], (said[align.target], said[name]), shapes, voters)
            for name in align.moving
        }
        entries = sum(voting_entries(one, pair) for pair in pairs.values() for one in align.units)
        advance = counter(run.progress, "align", entries * row_bytes(plan), row_bytes(plan))
        room = max(0, run.memory - RUNTIME_BYTES)
        effort = Effort(align.spec.max_passes, align.seed, run.workers, room)
        found = {name: match_units(pair, align.units, effort, advance) for name, pair in pairs.items()}
        advance(entries)
    return found


def _write(file: Path, found: Mapping[str, Orders]) -> None:
    """Write the orders that are not the identity as int32 under `source/units`; the file appears whole."""
    moved = {
        f"{name}/{units}": order.astype(np.int32)
        for name, orders in found.items()
        for units, order in orders.items()
        if not is_identity(order)
    }
    staged = file.with_name(f".{file.name}.new")
    staged.unlink(missing_ok=True)
    infos = create_file(staged, [NewTensor(key, "I32", order.shape) for key, order in moved.items()], _METADATA)
    descriptor = os.open(staged, os.O_RDWR)
    try:
        for key, order in moved.items():
            write_at(descriptor, staged, bytes_of(order), infos[key].start)
    finally:
        os.close(descriptor)
    sync(staged)
    staged.replace(file)


def _read(file: Path, found: Mapping[str, Orders]) -> None:
    """Take the orders that a file has over into `found`."""
    infos = {info.name: info for info in read_header(file).tensors}
    with open_files([file]) as handles:
        for name, orders in found.items():
            for units in orders:
                if (info := infos.get(f"{name}/{units}")) is not None:
                    orders[units] = read_slab(handles, info, 0, prod(info.shape)).astype(np.int64)
