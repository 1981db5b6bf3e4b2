"""A fine-tune into an adapter: the nearest matrices of low rank, one matrix of the model at a time."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.digest import Digests
from mediator_cli.checkpoint.remote.url import is_url
from mediator_cli.engine.pool import run_all
from mediator_cli.engine.publish import check_output, publish
from mediator_cli.engine.streams import RUNTIME_BYTES, Piece, draw, open_streams, pieces
from mediator_cli.errors import CheckpointError, MediatorError, OutputError, Problem, some_names
from mediator_cli.kernels.factors import Factors
from mediator_cli.pipeline.adapter_folder import Shape, create_adapter_file, saved_name
from mediator_cli.pipeline.carried import TIED, VOCABULARY, find_parts, find_saved
from mediator_cli.pipeline.download import download_weights
from mediator_cli.pipeline.extraction import (
    DTYPES,
    ChangeReport,
    ExtractionReport,
    Job,
    MatrixReport,
    finish_extraction,
)
from mediator_cli.pipeline.lineage import tell_doubts
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.sources import check_unchanged, identities, source_files
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import parse_partly
from mediator_cli.stages.low_rank import find_low_rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.engine.streams import Streams
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.pipeline.adapter_folder import AdapterFile
    from mediator_cli.pipeline.carried import Part, Saved
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan

_RECIPE, _MODEL = "extract-lora", "model"
_SLAB = 16 * BLOCK


@dataclass(frozen=True)
class _Found:
    """What one matrix came to; `change` are the squares of its change."""

    matrix: MatrixReport
    factors: Factors
    change: float


def extract_lora(job: Job, output: Path | str, run: Settings, access: Access) -> ExtractionReport:
    """Extract an adapter from a fine-tune and write its folder, which appears whole or not at all.

    Raises MediatorError for what the user can mend.
    """
    if is_url(str(output)):
        raise OutputError(Problem("--output", "an adapter is written into a folder", "choose one, then copy it"))
    target = Path(output).absolute()
    check_output(target, run.mode)
    plan = _plan(job, access)
    parts = find_parts(plan, job.choice)
    if not any(part.kind != "other" for part in parts):
        hint = f"`mediator inspect {job.base} --tensors` lists the names"
        raise OutputError(Problem("--include", "chooses no matrix that an adapter can carry", hint))
    download_weights(plan, run.progress, target)
    files = identities(plan)
    with publish(target, run.mode, {"the job": repr(job)}) as building:
        report = _build(job, plan, parts, building.folder, target, run)
        check_unchanged(plan, files)
    return report


def _plan(job: Job, access: Access) -> Plan:
    """Fit the model to the base as a merge would, whatever its tensors are called there."""
    fields = {
        "version": 1,
        "base": job.base,
        "experts": [{"name": _MODEL, "model": job.model}],
        "assign": {"rule": "none"},
        "average": {"method": "task_arithmetic"},
        "seed": job.seed,
    }
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())
    try:
        return make_plan(parse_partly(Path(_RECIPE), text), access)
    except MediatorError as error:
        raise CheckpointError([replace(p, place=_place(p.place)) for p in error.problems]) from None


def nearest_factors(plan: Plan, at: int, rank: int, run: Settings) -> tuple[dict[str, Factors], float]:
    """Find the nearest adapter of expert `at` of a plan: its factors by the base's tensors, as the base lies.

    Also the share of the squares of its whole change that they hold; nothing is written. Raises CheckpointError where
    the expert is the base itself in all matrices that an adapter can carry.
    """
    alone = replace(plan, experts=(plan.experts[at],), tensors=tuple(replace(t, weights=(1.0,)) for t in plan.tensors))
    job = Job(plan.loaded.recipe.base, plan.experts[at].name, rank, seed=plan.loaded.recipe.seed)
    parts = find_parts(alone, job.choice)
    with open_streams(alone) as streams, threadpool_limits(1, user_api="blas"):
        extraction = _Extraction(job, alone, streams, run)
        found, total, held = extraction.nearest(parts)
    if not found:
        message = f"{plan.experts[at].name} is the base itself in all matrices that an adapter can carry"
        raise CheckpointError(Problem("", message, "was the right folder named?"))
    return found, held / total


def _place(place: str) -> str:
    """Name what the command line calls it in place of the line of a recipe that nobody wrote."""
    plain = re.sub(rf"^{_RECIPE}(:\d+)? ?", "", place)
    return re.sub(r"^base", "BASE", re.sub(r"^experts\[0\]\.model", "MODEL", plain))


def _build(job: Job, plan: Plan, parts: Sequence[Part], folder: Path, target: Path, run: Settings) -> ExtractionReport:
    seen = Digests()
    with open_streams(plan, seen) as streams, threadpool_limits(1, user_api="blas"):
        doubts = tell_doubts(plan, streams, run.notify)
        written = _write(_Extraction(job, plan, streams, run), parts, folder)
    if not written.found:
        message = "the model is the base itself in all matrices that an adapter can carry"
        raise CheckpointError(Problem("MODEL", message, "was the right folder named? --embeddings looks at more"))
    told = tuple(_notices(job, written))
    for notice in told:
        run.notify(notice)
    report = _report(plan, parts, written, str(target), (*plan.notices, *doubts, *told))
    finish_extraction(job, plan, report, written.saved, folder, target.name, source_files(plan, seen, run))
    return report.model_copy(update={"bytes": sum(file.stat().st_size for file in folder.iterdir())})


@dataclass(frozen=True)
class _Written:
    """What was found and written: matrices that changed, other tensors that did, and which were stored whole."""

    found: tuple[_Found, ...]
    changes: tuple[ChangeReport, ...]
    saved: tuple[Saved, ...]

    def changes_where(self, *, saved: bool) -> tuple[ChangeReport, ...]:
        """Give the changes that factors cannot carry and that were stored whole, or were not."""
        names = {each.tensor for each in self.saved}
        return tuple(change for change in self.changes if (change.tensor in names) == saved)


def _write(extraction: _Extraction, parts: Sequence[Part], folder: Path) -> _Written:
    """Look at all parts, and write what an adapter carries of them."""
    changes = extraction.look_at([part for part in parts if part.kind == "other"])
    matrices = [part for part in parts if part.kind != "other"]
    saved = extraction.choose_saved(changes, matrices)
    names = [name for part in matrices for name in _shape(part).names]
    names += [saved_name(each.name) for each in saved]
    with create_adapter_file(folder, DTYPES[extraction.job.dtype], names) as made:
        found = extraction.extract(matrices, made)
        extraction.save(saved, made)
    return _Written(tuple(found), tuple(changes), tuple(saved))


def _report(
    plan: Plan, parts: Sequence[Part], written: _Written, target: str, notices: tuple[str, ...]
) -> ExtractionReport:
    total = sum(each.change for each in written.found)
    held = sum(each.matrix.energy * each.change for each in written.found)
    return ExtractionReport(
        adapter=target,
        bytes=0,
        energy=round(held / total, 6),
        matrices=tuple(each.matrix for each in written.found),
        saved=written.changes_where(saved=True),
        not_carried=written.changes_where(saved=False),
        unchanged=len(parts) - len(written.found) - len(written.changes),
        left_out=sum(tensor.average is not None for tensor in plan.tensors) - len(parts),
        notices=notices,
    )


def _notices(job: Job, written: _Written) -> Iterator[str]:
    clamped = [each.matrix.tensor for each in written.found if job.rank > min(each.matrix.shape)]
    if clamped:
        yield f"rank {job.rank} is more than these have rows or columns, so they are held whole: {some_names(clamped)}"
    if tied := [change.tensor for change in written.changes_where(saved=True) if change.reason == TIED]:
        yield f"{tied[0]} {TIED}; it is stored whole (modules_to_save)"


@dataclass(frozen=True)
class _Extraction:
    """What the passes over the tensors share."""

    job: Job
    plan: Plan
    streams: Streams
    run: Settings

    def look_at(self, parts: Sequence[Part]) -> list[ChangeReport]:
        """Measure how much tensors changed that factors cannot carry; those that did not are left out."""
        advance = counter(self.run.progress, "compare others", 4 * sum(part.tensor.size for part in parts))
        found = []
        for part in parts:
            change, base = self._squares(part)
            advance(4 * part.tensor.size)
            if change:
                size = sqrt(change / base) if base else 1.0
                found.append(ChangeReport(tensor=part.tensor.name, reason=part.reason, size=size))
        return found

    def _squares(self, part: Part) -> tuple[float, float]:
        change = base = 0.0
        for piece in pieces(part.tensor.name, part.tensor.size, _SLAB):
            inputs = self.streams.deltas(piece)
            change += float(np.square(inputs.rows, dtype=np.float64).sum())
            base += 0.0 if inputs.base is None else float(np.square(inputs.base, dtype=np.float64).sum())
        return change, base

    def choose_saved(self, changes: Sequence[ChangeReport], matrices: Sequence[Part]) -> list[Saved]:
        """Choose what is stored whole: all that can be if asked, and embeddings that are the head too."""
        wanted = {change.tensor for change in changes if self.job.save_modules or change.reason == TIED}
        parts = [part for part in find_parts(self.plan, self.job.choice) if part.tensor.name in wanted]
        parts = [part for part in parts if part.reason != VOCABULARY]
        found = find_saved(parts, list(self.plan.base.tensors), [part.module for part in matrices])
        return list({each.name: each for each in found}.values())

    def extract(self, parts: Sequence[Part], made: AdapterFile) -> list[_Found]:
        """Extract matrix by matrix, some at a time, and write them in order; those that did not change are left out."""
        advance = counter(self.run.progress, "extract", 4 * sum(part.tensor.size for part in parts))
        workers = self._workers(parts)
        kept: list[_Found] = []
        for first in range(0, len(parts), workers):
            some = parts[first : first + workers]
            for part, found in zip(some, self._find_some(some), strict=True):
                if found.factors.rank:
                    made.add_factors(_shape(part), found.factors)
                    kept.append(replace(found, factors=_without_values(found.factors)))
                advance(4 * part.tensor.size)
        return kept

    def nearest(self, parts: Sequence[Part]) -> tuple[dict[str, Factors], float, float]:
        """Find the factors of all matrices; also the squares of the whole change, and of what the factors hold."""
        found: dict[str, Factors] = {}
        total = held = 0.0
        for part in parts:
            if part.kind == "other":
                total += self._squares(part)[0]
                continue
            near = self._find(part)
            total, held = total + near.change, held + near.matrix.energy * near.change
            if near.factors.rank:
                own = near.factors
                is_turned = part.is_flipped or part.kind == "embedding"
                turned = Factors(np.ascontiguousarray(own.b.T), np.ascontiguousarray(own.a.T)) if is_turned else own
                found[part.tensor.name] = turned
        return found, total, held

    def _workers(self, parts: Sequence[Part]) -> int:
        """Choose how many matrices fit in memory: each in float32, and in float64 where all values are found."""
        largest = max(part.tensor.size for part in parts)
        return int(max(1, min(self.run.workers, (self.run.memory - RUNTIME_BYTES) // (28 * largest))))

    def _find_some(self, parts: Sequence[Part]) -> list[_Found]:
        found: dict[str, _Found] = {}

        def one(part: Part) -> None:
            found[part.tensor.name] = self._find(part)

        run_all(one, parts, len(parts))
        return [found[part.tensor.name] for part in parts]

    def _find(self, part: Part) -> _Found:
        """Read the change of one matrix, whole, and find its largest directions."""
        name, shape = part.tensor.name, part.tensor.shape
        delta, base = np.empty(part.tensor.size, np.float32), 0.0
        for piece in pieces(name, part.tensor.size, _SLAB):
            inputs = self.streams.deltas(piece)
            delta[piece.start : piece.stop] = inputs.rows[0]
            base += 0.0 if inputs.base is None else float(np.square(inputs.base, dtype=np.float64).sum())
        matrix = delta.reshape(shape)
        turned = part.is_flipped or part.kind == "embedding"
        near = find_low_rank(matrix.T if turned else matrix, self.job.rank, self.job.energy, self._uniforms(name))
        roots = np.sqrt(near.found.s)
        a, b = roots[:, None] * near.found.vt, near.found.u * roots
        size = sqrt(near.total / base) if base else float(near.total > 0)
        report = MatrixReport(
            tensor=name, shape=shape, rank=near.rank, energy=round(near.energy, 6), size=round(size, 6)
        )
        return _Found(report, Factors(a.astype(np.float32), b.astype(np.float32)), near.total)

    def _uniforms(self, tensor: str) -> Any:  # noqa: ANN401 - a function of a shape
        def uniforms(shape: tuple[int, int]) -> Floats:
            numbers = np.empty(shape, np.float32)
            draw(self.job.seed, _RECIPE, Piece(tensor, 0, numbers.size), numbers.reshape(-1))
            return numbers

        return uniforms

    def save(self, saved: Sequence[Saved], made: AdapterFile) -> None:
        """Write tensors of the model whole."""
        for each in saved:
            info = self.plan.base.tensors[each.tensor]
            values = np.empty(info.size, np.float32)
            for piece in pieces(each.tensor, info.size, _SLAB):
                values[piece.start : piece.stop] = self.streams.tensors(piece).rows[0]
            made.add(saved_name(each.name), info.shape, values)


def _shape(part: Part) -> Shape:
    return Shape(part.module, part.kind == "embedding")


def _without_values(factors: Factors) -> Factors:
    """Keep the rank alone of factors that are written."""
    return Factors(np.empty((factors.rank, 0), np.float32), np.empty((0, factors.rank), np.float32))
