"""Experts of a bundle as LoRA adapters on its dense model, of one rank for all, as servers of many adapters want."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from mediator_cli.bundle.adapter import SAFE_RANKS
from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.engine.streams import Piece, draw
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
from mediator_cli.export.measure import check_tasks, measure
from mediator_cli.export.origin import check_sources, open_origin
from mediator_cli.export.report import AdapterReport, ExpertReport
from mediator_cli.export.targets import left_behind, left_notices, linear_targets, module_of
from mediator_cli.kernels.factors import Factors
from mediator_cli.pipeline.adapter_folder import CONFIG, Shape, create_adapter_file, peft_config
from mediator_cli.pipeline.carried import task_type
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.side_files import write_json
from mediator_cli.recipe.sizes import human_bytes
from mediator_cli.stages.low_rank import find_low_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.read import Bundle
    from mediator_cli.evaluate.tasks import Task
    from mediator_cli.export.origin import Origin
    from mediator_cli.export.settings import Run
    from mediator_cli.kernels.arrays import Doubles, Floats

DEFAULT_RANK = 32
_WORTH_A_WORD = 1 << 20
_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class LoraJob:
    """What to export: `rank` at least, or the least safe rank that holds a share `energy` of every expert's change.

    With neither, 32, or what low-rank experts need to be exact. `sources` say where models lie that the bundle was
    made of; `dtype` is the dense model's where None; `base_name` is what the configs call the dense model.
    """

    rank: int | None = None
    energy: float | None = None
    experts: tuple[str, ...] = ()
    sources: Mapping[str, Path] = field(default_factory=dict)
    dtype: str | None = None
    tasks: tuple[Task, ...] = ()
    limit: int | None = None
    warn_below: float = 0.5
    base_name: str | None = None


def safe_rank(rank: int) -> int:
    """Give the least safe rank that holds as many directions; raise OutputError where none does.

    >>> safe_rank(1), safe_rank(16), safe_rank(33), safe_rank(300)
    (8, 16, 64, 320)
    """
    for safe in SAFE_RANKS:
        if rank <= safe:
            return safe
    raise OutputError(Problem("--rank", f"{rank} is more than servers have room for", f"{SAFE_RANKS[-1]} is the most"))


def export_lora(bundle: Bundle, target: Path, job: LoraJob, run: Run) -> AdapterReport:
    """Write one folder an expert, in the format of PEFT, and a report; all appear together or not at all.

    Raises MediatorError for what the user can mend.
    """
    check_lora(bundle, job)
    with building(target, run, f"lora {job!r} {bundle.manifest.digest}") as folder:
        report = write_lora(bundle, folder, job, run)
        report = report.model_copy(update={"folder": str(target.absolute())})
        write_report(folder, report)
    return report


def check_lora(bundle: Bundle, job: LoraJob) -> None:
    """Raise MediatorError for what can be seen before anything is read."""
    check_experts(bundle)
    names = chosen_experts(bundle, job.experts)
    check_sources(bundle, job.sources)
    check_tasks(job.tasks, names)
    if job.rank is not None:
        safe_rank(job.rank)
    if job.energy is not None and not 0 < job.energy <= 1:
        raise OutputError(Problem("--energy", "is a share of a change: above 0, at most 1", "write --energy 0.9"))
    if not linear_targets(bundle):
        message = "routes no linear weights, and adapters carry nothing else"
        raise BundleError(Problem(str(bundle.path), message, "export each expert: --to dense --expert NAME"))


def write_lora(bundle: Bundle, folder: Path, job: LoraJob, run: Run) -> AdapterReport:
    """Do the same into a folder that is there, and is thrown away by the caller where this fails."""
    check_lora(bundle, job)
    targets = linear_targets(bundle)
    names = chosen_experts(bundle, job.experts)
    dtype = job.dtype or _dtype_of(bundle, targets)
    with threadpool_limits(1, user_api="blas"):
        rank = _choose_rank(bundle, names, targets, job, run)
        made = _Export(bundle, folder, job, run, targets, rank, dtype)
        experts = [made.write(name) for name in names]
    found = measure(bundle, {name: folder / name for name in names}, job.tasks, run, job.limit)
    experts = [each.model_copy(update={"measured": found.get(each.name)}) for each in experts]
    notices = (*losses(bundle.manifest), *_notices(experts, rank, job), *_too_large(bundle, experts, rank))
    for notice in notices:
        run.notify(notice)
    return AdapterReport(
        format="lora",
        folder=str(folder),
        bundle=bundle.manifest.digest,
        rank=rank,
        dtype=dtype,
        targets=tuple(sorted({place_of(name).kind for name in targets})),
        bytes=sum(each.bytes for each in experts),
        experts=tuple(experts),
        notices=notices,
    )


def _dtype_of(bundle: Bundle, targets: Mapping[str, bool]) -> str:
    found = {bundle.tensors[name].dtype for name in targets}
    return found.pop() if len(found) == 1 and found <= set(_DTYPES) else "F32"


def _choose_rank(bundle: Bundle, names: Sequence[str], targets: Mapping[str, bool], job: LoraJob, run: Run) -> int:
    if job.rank is not None:
        return safe_rank(job.rank)
    if job.energy is None:
        stored = [spec.rank for expert in bundle.experts.values() for spec in expert.tensors.values()]
        return safe_rank(min(max(stored), SAFE_RANKS[-1])) if any(stored) else DEFAULT_RANK
    return max(_least_rank(bundle, name, targets, job, run) for name in names)


def _least_rank(bundle: Bundle, expert: str, targets: Mapping[str, bool], job: LoraJob, run: Run) -> int:
    """Find the least safe rank at which an expert's matrices together hold the share that is asked."""
    held, total = np.zeros(len(SAFE_RANKS)), 0.0
    advance = counter(run.progress, f"spectra of {expert}", sum(4 * bundle.tensors[name].size for name in targets))
    with open_origin(bundle, expert, job.sources, run) as origin:
        for name in targets:
            squares = _squares(origin.read(name))
            total += squares.sum()
            held += [squares[:rank].sum() for rank in SAFE_RANKS]
            advance(4 * bundle.tensors[name].size)
    enough = [rank for rank, one in zip(SAFE_RANKS, held, strict=True) if one >= (job.energy or 0) * total]
    return enough[0] if enough else SAFE_RANKS[-1]


def _squares(matrix: Floats) -> Doubles:
    """Give the squares of a matrix's singular values, falling, from its Gram matrix on the shorter side."""
    wide = matrix.astype(np.float64)
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    found: Doubles = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    return found


@dataclass
class _Sums:
    """Squares of changes and what is held of them, over all matrices and by layer."""

    total: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    held: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, total: float, held: float) -> None:
        layer = place_of(name).layer or name
        self.total[layer] += total
        self.held[layer] += held

    @property
    def energy(self) -> float:
        total = sum(self.total.values())
        return round(min(1.0, sum(self.held.values()) / total), 6) if total else 1.0

    @property
    def layers(self) -> dict[str, float]:
        return {name: round(min(1.0, self.held[name] / total), 6) for name, total in self.total.items() if total}


@dataclass(frozen=True)
class _Export:
    """What the experts of one export share."""

    bundle: Bundle
    folder: Path
    job: LoraJob
    run: Run
    targets: Mapping[str, bool]
    rank: int
    dtype: str

    def write(self, expert: str) -> ExpertReport:
        """Write one expert's folder."""
        folder = self.folder / expert
        folder.mkdir(parents=True)
        names = [name for target in self.targets for name in Shape(module_of(target)).names]
        total = sum(4 * self.bundle.tensors[name].size for name in self.targets)
        advance = counter(self.run.progress, f"adapter {expert}", total)
        sums, written = _Sums(), []
        with open_origin(self.bundle, expert, self.job.sources, self.run) as origin:
            with create_adapter_file(folder, self.dtype, names) as made:
                for name in self.targets:
                    factors, squares, held = self._factors(origin, name)
                    sums.add(name, squares, held)
                    if squares:
                        made.add_factors(Shape(module_of(name)), _padded(factors, self.rank))
                        written.append(name)
                    advance(4 * self.bundle.tensors[name].size)
            left = tuple(left_behind(self.bundle, origin))
        self._check(expert, written)
        write_json(folder / CONFIG, self._config(written))
        report = ExpertReport(
            name=expert,
            folder=expert,
            origin=origin.kind,
            note=origin.note,
            rank=self.rank,
            n_targets=len(written),
            energy=sums.energy,
            layers=sums.layers,
            bytes=0,
            not_carried=left,
        )
        self._card(report, origin.told)
        return report.model_copy(update={"bytes": folder_bytes(folder)})

    def _check(self, expert: str, written: Sequence[str]) -> None:
        if not written:
            message = "is the dense expert itself in all linear weights, so there is no adapter to write"
            raise BundleError(Problem(f"expert {expert}", message, "name the others: --expert NAME"))

    def _factors(self, origin: Origin, name: str) -> tuple[Factors, float, float]:
        """Give factors of one matrix as PEFT has it, the squares of its change, and what of them is held."""
        stored = origin.factors(name)
        if stored is not None and stored[0].shape[0] <= self.rank:
            a, b = stored
            squares = float(np.square(b.astype(np.float64) @ a.astype(np.float64)).sum())
            factors, held = Factors(a, b), squares
        else:
            factors, squares, held = self._nearest(origin.read(name), name)
        if not self.targets[name]:
            return factors, squares, held
        return Factors(np.ascontiguousarray(factors.b.T), np.ascontiguousarray(factors.a.T)), squares, held

    def _nearest(self, matrix: Floats, name: str) -> tuple[Factors, float, float]:
        near = find_low_rank(matrix, self.rank, 1.0, _uniforms(self.run.seed, name))
        roots = np.sqrt(near.found.s)
        a, b = roots[:, None] * near.found.vt, near.found.u * roots
        return Factors(a.astype(np.float32), b.astype(np.float32)), near.total, near.energy * near.total

    def _config(self, written: Sequence[str]) -> dict[str, Any]:
        config = read_json(self.bundle.path / "config.json")
        flipped = {self.targets[name] for name in written}
        name = self.job.base_name or str(self.bundle.path.absolute())
        ranks = dict.fromkeys(map(module_of, written), self.rank)
        return peft_config(ranks, name, task_type(config), self.bundle.tensors, fan_in_fan_out=flipped == {True})

    def _card(self, report: ExpertReport, told: str) -> None:
        lines = [
            f"A LoRA adapter on the dense model of a bundle: the expert {report.name}. {made_by(self.bundle)}",
            "",
            f"Rank {self.rank}, {report.n_targets} matrices, made of {told}; they hold {report.energy:.1%} of it.",
            f"Tensors that change and cannot travel: {len(report.not_carried)}; `export.json` names them.",
            "",
            "Load it on the bundle's dense model: `PeftModel.from_pretrained(dense, FOLDER)`.",
            "",
        ]
        write_card(self.bundle, self.folder / report.name, report.name, lines, tags=("lora",))


def _uniforms(seed: int, tensor: str) -> Callable[[tuple[int, int]], Floats]:
    def uniforms(shape: tuple[int, int]) -> Floats:
        numbers = np.empty(shape, np.float32)
        draw(seed, "export", Piece(tensor, 0, numbers.size), numbers.reshape(-1))
        return numbers

    return uniforms


def _padded(factors: Factors, rank: int) -> Factors:
    """Add rows and columns of zeros up to a rank."""
    more = rank - factors.rank
    return Factors(np.pad(factors.a, ((0, more), (0, 0))), np.pad(factors.b, ((0, 0), (0, more))))


def _notices(experts: Sequence[ExpertReport], rank: int, job: LoraJob) -> Iterator[str]:
    if job.rank is not None and rank != job.rank:
        yield f"rank {job.rank} is none that servers have room for; all adapters have rank {rank}, and use it"
    for each in experts:
        if each.note:
            yield (
                f"{each.name}: {each.note}, so its adapter is made of the pruned and rescaled delta as the bundle "
                "stores it, which low rank holds worse; --source NAME=DIR tells where the model lies"
            )
        if job.energy is not None and each.energy < job.energy:
            yield f"{each.name}: rank {rank}, the most that servers have room for, holds {each.energy:.1%} alone"
        if low := each.low_layers(job.warn_below):
            worst = min(low, key=lambda layer: low[layer])
            told = f"less than {job.warn_below:.0%} of the change of {len(low)} of {len(each.layers)} layers"
            yield f"{each.name}: rank {rank} holds {told}, least of {worst}: {low[worst]:.1%}"
    yield from left_notices(experts)


def _too_large(bundle: Bundle, experts: Sequence[ExpertReport], rank: int) -> Iterator[str]:
    dense = sum(info.n_bytes for info in bundle.tensors.values())
    largest = max(each.bytes for each in experts)
    if 2 * largest > dense > _WORTH_A_WORD:
        yield (
            f"at rank {rank} an adapter takes {human_bytes(largest)}, more than half of the dense model's "
            f"{human_bytes(dense)}: try a lower --rank or --energy, or --to dense --expert NAME"
        )
