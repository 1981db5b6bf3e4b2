"""Experts of a bundle as SHiRA adapters, the sparse ones of PEFT: single entries of linear weights, exactly."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.checkpoint.write import NewTensor, create_file, write_at
from mediator_cli.errors import BundleError, OutputError, Problem
from mediator_cli.export.folder import (
    building,
    check_experts,
    chosen_experts,
    folder_bytes,
    losses,
    made_by,
    write_card,
    write_report,
)
from mediator_cli.export.origin import Origin, stored_delta
from mediator_cli.export.report import AdapterReport, ExpertReport
from mediator_cli.export.targets import left_behind, left_notices, linear_targets, module_of
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.pipeline.adapter_folder import CONFIG, WEIGHTS, short_names
from mediator_cli.pipeline.carried import task_type
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.side_files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.read import Bundle
    from mediator_cli.export.settings import Run
    from mediator_cli.kernels.arrays import Counts, Floats

_ROOT = "base_model.model."


@dataclass(frozen=True)
class ShiraJob:
    """Which experts, all where none is named, and the most adapters that one may become; None = as many as needed."""

    experts: tuple[str, ...] = ()
    max_adapters: int | None = None
    base_name: str | None = None


@dataclass(frozen=True)
class Split:
    """How an expert is stored: `count` adapters of one `r`, so of r · (in + out) entries for each weight."""

    r: int
    count: int


def export_shira(bundle: Bundle, target: Path, job: ShiraJob, run: Run) -> AdapterReport:
    """Write one folder an adapter, NAME or NAME-1, NAME-2 to be summed; all appear together or not at all.

    Raises BundleError for unknown experts, OutputError where an expert needs more adapters than it may have.
    """
    check_experts(bundle)
    names = chosen_experts(bundle, job.experts)
    targets = _check_targets(bundle)
    splits = _check_splits(bundle, {name: _split(bundle, name, targets, run) for name in names}, job)
    with building(target, run, f"shira {job!r} {bundle.manifest.digest}") as folder:
        experts = [_Export(bundle, folder, job, run, targets, splits[name]).write(name) for name in names]
        report = AdapterReport(
            format="shira",
            folder=str(target.absolute()),
            bundle=bundle.manifest.digest,
            rank=max(each.rank for each in experts),
            dtype="F32",
            targets=tuple(sorted({place_of(name).kind for name in targets})),
            bytes=sum(each.bytes for each in experts),
            experts=tuple(experts),
            notices=(*losses(bundle.manifest), *_notices(experts)),
        )
        write_report(folder, report)
    for notice in report.notices:
        run.notify(notice)
    return report


def _check_targets(bundle: Bundle) -> tuple[str, ...]:
    targets = linear_targets(bundle)
    if any(targets.values()):
        message = "stores linear weights as [in, out], which SHiRA adapters do not reach"
        raise BundleError(Problem(str(bundle.path), message, "--to lora, or --to dense --expert NAME"))
    if not targets:
        message = "routes no linear weights, and adapters carry nothing else"
        raise BundleError(Problem(str(bundle.path), message, "--to dense --expert NAME"))
    return tuple(targets)


def _entries(bundle: Bundle, expert: str, name: str) -> tuple[Counts, Floats]:
    """List where an expert differs from the dense model in a tensor: flat positions [k], differences [k], float32."""
    sparse = bundle.experts.get(expert)
    if sparse is None or name not in sparse.tensors:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    flat = stored_delta(bundle, expert, name).reshape(-1)
    positions = np.flatnonzero(flat)
    return positions, flat[positions]


def _split(bundle: Bundle, expert: str, targets: Sequence[str], run: Run) -> Split:
    """Find the fewest adapters, and then the least r, that hold all entries of an expert."""
    advance = counter(run.progress, f"count {expert}", sum(4 * bundle.tensors[name].size for name in targets))
    counts = {}
    for name in targets:
        counts[name] = len(_entries(bundle, expert, name)[0])
        advance(4 * bundle.tensors[name].size)
    return split_for(_most(bundle, counts))


def _most(bundle: Bundle, counts: Mapping[str, int]) -> dict[tuple[int, ...], int]:
    """Give the most entries that a weight of each shape needs room for; only weights that change have any."""
    found: dict[tuple[int, ...], int] = defaultdict(int)
    for name, count in counts.items():
        if count:
            shape = bundle.tensors[name].shape
            found[shape] = max(found[shape], count)
    return found


def split_for(most: Mapping[tuple[int, ...], int]) -> Split:
    """Choose r and the number of adapters for weights of these shapes that change in at most so many entries.

    An adapter has one r, and PEFT refuses r · (in + out) above in · out; the smallest weight that changes decides.

    >>> split_for({(8, 8): 16}), split_for({(8, 8): 17}), split_for({(8, 8): 64, (4, 8): 8})
    (Split(r=1, count=1), Split(r=2, count=1), Split(r=2, count=2))
    """
    sides = {shape: sum(shape) for shape in most}
    if not sides:
        return Split(1, 1)
    cap = min(shape[0] * shape[1] // sides[shape] for shape in sides)
    count = max(ceil(n / (cap * sides[shape])) for shape, n in most.items()) if cap else 0
    if not count:
        return Split(0, 0)
    r = max(ceil(n / (count * sides[shape])) for shape, n in most.items())
    return Split(max(1, r), count)


def _check_splits(bundle: Bundle, splits: dict[str, Split], job: ShiraJob) -> dict[str, Split]:
    if any(not split.count for split in splits.values()):
        message = "routes a weight with so few rows or columns that no SHiRA adapter reaches it"
        raise BundleError(Problem(str(bundle.path), message, "--to dense --expert NAME"))
    limit = job.max_adapters
    many = {name: split.count for name, split in splits.items() if limit is not None and split.count > limit}
    if many:
        hint = f"--max-adapters {max(many.values())}, or --to dense --expert NAME"
        raise OutputError([
            Problem(f"expert {name}", f"has more entries than {limit} SHiRA adapters hold; {count} would", hint)
            for name, count in many.items()
        ])  # fmt: skip
    return splits


@dataclass(frozen=True)
class _Export:
    """What the adapters of one expert share."""

    bundle: Bundle
    folder: Path
    job: ShiraJob
    run: Run
    targets: tuple[str, ...]
    split: Split

    def write(self, expert: str) -> ExpertReport:
        """Write one expert's adapters."""
        count, origin = self.split.count, _origin(self.bundle, expert)
        changed = [name for name in self.targets if len(_entries(self.bundle, expert, name)[0])]
        if not changed:
            message = "is the dense expert itself in all linear weights, so there is no adapter to write"
            raise BundleError(Problem(f"expert {expert}", message, "name the others: --expert NAME"))
        names = [expert] if count == 1 else [f"{expert}-{n}" for n in range(1, count + 1)]
        total = 4 * count * sum(self.bundle.tensors[name].size for name in changed)
        advance = counter(self.run.progress, f"adapter {expert}", total)
        for number, name in enumerate(names):
            self._write_one(expert, name, number, changed, advance)
        return ExpertReport(
            name=expert,
            folder=expert if count == 1 else f"{expert}-1",
            origin="stored",
            rank=self.split.r,
            n_adapters=count,
            n_targets=len(changed),
            energy=1.0,
            bytes=sum(folder_bytes(self.folder / name) for name in names),
            not_carried=tuple(left_behind(self.bundle, origin)),
        )

    def _write_one(
        self, expert: str, name: str, number: int, changed: Sequence[str], advance: Callable[[int], None]
    ) -> None:
        folder = self.folder / name
        folder.mkdir(parents=True)
        tensors = [tensor for target in changed for tensor in self._tensors(target)]
        places = create_file(folder / WEIGHTS, tensors, {"format": "pt"})
        with (folder / WEIGHTS).open("r+b") as stream:
            for target in changed:
                for tensor, array in zip(self._tensors(target), self._arrays(expert, target, number), strict=True):
                    data = bytes_of(np.ascontiguousarray(array))
                    write_at(stream.fileno(), folder / WEIGHTS, data, places[tensor.name].start)
                advance(4 * self.bundle.tensors[target].size)
        write_json(folder / CONFIG, self._config(changed))
        self._card(expert, name)

    def _tensors(self, target: str) -> tuple[NewTensor, NewTensor]:
        module, room = f"{_ROOT}{module_of(target)}", self._room(target)
        indices, weight = f"{module}.shira_indices", f"{module}.shira_weight"
        return NewTensor(indices, "I32", (2, room)), NewTensor(weight, "F32", (room,))

    def _room(self, target: str) -> int:
        return self.split.r * sum(self.bundle.tensors[target].shape)

    def _arrays(self, expert: str, target: str, number: int) -> tuple[Any, Any]:
        """Give rows and columns [2, k] and values [k] of one adapter; what is free is filled with zeros elsewhere."""
        shape, room = self.bundle.tensors[target].shape, self._room(target)
        positions, values = _entries(self.bundle, expert, target)
        part = slice(number * room, (number + 1) * room)
        taken, own = positions[part], values[part]
        positions = np.concatenate([taken, _free(taken, room - len(taken))])
        values = np.concatenate([own, np.zeros(room - len(own), np.float32)])
        order = np.argsort(positions, kind="stable")
        rows = np.stack(np.unravel_index(positions[order], shape)).astype(np.int32)
        return rows, values[order]

    def _config(self, changed: Sequence[str]) -> dict[str, Any]:
        config = read_json(self.bundle.path / "config.json")
        return {
            "peft_type": "SHIRA",
            "task_type": task_type(config),
            "base_model_name_or_path": self.job.base_name or str(self.bundle.path.absolute()),
            "inference_mode": True,
            "r": self.split.r,
            "mask_type": "random",
            "random_seed": 0,
            "target_modules": short_names(map(module_of, changed), self.bundle.tensors),
            "fan_in_fan_out": False,
            "init_weights": True,
            "modules_to_save": None,
        }

    def _card(self, expert: str, name: str) -> None:
        count = self.split.count
        part = "" if count == 1 else f" One of {count} that have to be summed: activate all of them together."
        lines = [
            f"A SHiRA adapter on the dense model of a bundle: the sparse expert {expert}.{part} {made_by(self.bundle)}",
            "",
            "Load it on the bundle's dense model: `PeftModel.from_pretrained(dense, FOLDER)`. Linear weights alone",
            "travel; `export.json` names the rest.",
            "",
        ]
        write_card(self.bundle, self.folder / name, name, lines, tags=("shira",))


def _free(taken: Counts, wanted: int) -> Counts:
    """Give the first positions that are not taken, which rise."""
    if not wanted:
        return np.empty(0, np.int64)
    mask = np.ones(len(taken) + wanted, bool)
    mask[taken[taken < len(mask)]] = False
    return np.flatnonzero(mask)[:wanted]


def _origin(bundle: Bundle, expert: str) -> Origin:
    return Origin(expert, "stored", "", lambda name: stored_delta(bundle, expert, name))


def _notices(experts: Sequence[ExpertReport]) -> Iterator[str]:
    for each in experts:
        if each.n_adapters > 1:
            yield f"{each.name}: {each.n_adapters} adapters, {each.name}-1 to -{each.n_adapters}, have to be summed"
    yield from left_notices(experts)
