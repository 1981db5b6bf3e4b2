"""Carry out the batches of a plan: statistics, average, sparse experts, with each finished one in the journal."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.manifest import EXPERTS_FOLDER
from mediator_cli.bundle.sparse_file import SHARED, SparseTensor, sparse_file_name
from mediator_cli.bundle.sparse_writer import create_sparse_file, resume_sparse_file
from mediator_cli.checkpoint.digest import Digests, fold
from mediator_cli.checkpoint.read import open_files
from mediator_cli.checkpoint.write import create_file, place_tensors
from mediator_cli.engine.combine import DenseTensor, Target, digest_passed_over, write_dense
from mediator_cli.engine.extract.batch import Common, extract_batch
from mediator_cli.engine.extract.choose import common_limits
from mediator_cli.engine.extract.encode import Kept
from mediator_cli.engine.extract.gated import common_scales
from mediator_cli.engine.extract.item import Dense, Extraction
from mediator_cli.engine.matrices import parts_of
from mediator_cli.engine.pool import run_all
from mediator_cli.engine.statistics import find_statistics, group_by_method
from mediator_cli.engine.sweep import all_of, carry_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mediator_cli.bundle.sparse_writer import SparseFileWriter
    from mediator_cli.checkpoint.adapter.open import Adapter
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Handle
    from mediator_cli.engine.batches import Batch, Shard
    from mediator_cli.engine.journal import Journal
    from mediator_cli.engine.statistics import Found
    from mediator_cli.engine.streams import Budget, Streams
    from mediator_cli.engine.team import Team
    from mediator_cli.plan.model import TensorPlan


_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Work:
    """All that the batches share: what is merged how, what the survey found, and where results go.

    `routed` are the tensors of which experts keep deltas, `from_base` those whose dense values are the base's own.
    `adapters` are experts whose factors may be kept. `advance` is told of elements of each source that were read, of
    about `elements` in all.
    """

    streams: Streams
    shards: tuple[Shard, ...]
    found: Found
    routed: frozenset[str]
    from_base: frozenset[str]
    folder: Path
    journal: Journal
    seen: Digests
    budget: Budget
    elements: int
    advance: Callable[[int], None]
    team: Team
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @cached_property
    def placed(self) -> dict[str, TensorInfo]:
        """Where each dense tensor lies or will lie."""
        infos: dict[str, TensorInfo] = {}
        for shard in self.shards:
            infos |= place_tensors(self.folder / shard.name, shard.members, _METADATA)
        return infos

    @property
    def waits(self) -> bool:
        """Whether experts can only be extracted when all dense tensors are written."""
        every = (tensor for shard in self.shards for tensor in shard.tensors)
        routed = [tensor.extract for tensor in every if tensor.name in self.routed]
        return any(extract.over == "model" or extract.mode == "emr" for extract in routed)

    def kept_of(self, shard: Shard, expert: str) -> list[TensorPlan]:
        """Choose the tensors of a shard of which an expert, or for SHARED all experts together, keep something."""
        return [tensor for tensor in self.routed_of(shard.tensors) if self.is_kept(tensor, expert)]

    def is_kept(self, tensor: TensorPlan, expert: str) -> bool:
        """Whether an expert, or SHARED, keeps anything of a routed tensor: as factors, what its adapter changes."""
        if expert == SHARED:
            return bool(tensor.extract.n_shared and tensor.size)
        return tensor.extract.mode != "factors" or tensor.name in self.adapters[expert].changes

    def routed_of(self, tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
        """Choose the tensors of which experts keep deltas."""
        return [tensor for tensor in tensors if tensor.name in self.routed]


@dataclass(frozen=True)
class Written:
    """What stands on the disk: digests of dense tensors, and what each sparse expert keeps of its tensors."""

    dense: Mapping[str, str]
    kept: Mapping[str, Mapping[str, Kept]]


def carry_out_batches(work: Work) -> Written:
    """Write all dense shards and all sparse experts; what the journal has is not done again.

    What ends it early gets a note of how far it came, if a later merge can go on from there.
    """
    try:
        return _carry_out(work)
    except BaseException as error:
        if work.journal.steps:
            steps = _all_steps(work)
            n_done = sum(step in work.journal.steps for step in steps)
            error.add_note(f"kept: {n_done} of {len(steps)} steps are finished")
        raise


def _carry_out(work: Work) -> Written:
    mine = [shard for shard in work.shards if work.team.has_shard(shard.number, len(work.shards))]
    with _behind(work) as finished:
        for shard in mine:
            _write_shard(work, shard, finished)
    if work.waits:
        work.team.wait_for(work.journal, [_dense_step(batch) for shard in work.shards for batch in shard.batches])
        common = _common(work)
        with _behind(work) as finished:
            for shard in mine:
                _write_late(work, shard, common, finished)
    work.team.wait_for(work.journal, _all_steps(work))
    return _gathered(work)


def _dense_step(batch: Batch) -> str:
    return f"batch {batch.step}"


def _late_step(batch: Batch) -> str:
    return f"experts {batch.step}"


def _steps(work: Work, batch: Batch) -> list[str]:
    return [_dense_step(batch), *([_late_step(batch)] if work.waits else [])]


def _all_steps(work: Work) -> list[str]:
    return [step for shard in work.shards for batch in shard.batches for step in _steps(work, batch)]


def _write_shard(work: Work, shard: Shard, finished: _Finished) -> None:
    done = [batch for batch in shard.batches if _dense_step(batch) in work.journal.steps]
    with ExitStack() as stack:
        target = _open_target(work, shard, bool(done), stack)
        writers = {} if work.waits else _open_writers(work, shard, done, _dense_step, stack)
        # Files are closed only when nobody waits for the disk to have them, after an error too.
        stack.callback(finished.wait)
        for batch in shard.batches:
            if batch in done:
                work.advance(batch.size)
                continue
            _average(work, batch, target)
            stored = _extract(work, batch, writers, Common())
            digests = target.digests.of(target.file)
            dense = {tensor.name: digests[tensor.name] for tensor in batch.tensors if tensor.size}
            facts = {"dense": dense, "stored": stored, "seen": work.seen.take()}
            finished(_dense_step(batch), facts, [target.descriptor], list(writers.values()))
        finished.wait()
        for writer in writers.values():
            writer.finish()


def _write_late(work: Work, shard: Shard, common: Common, finished: _Finished) -> None:
    done = [batch for batch in shard.batches if _late_step(batch) in work.journal.steps]
    with ExitStack() as stack:
        writers = _open_writers(work, shard, done, _late_step, stack)
        stack.callback(finished.wait)
        for batch in shard.batches:
            if batch not in done:
                stored = _extract(work, batch, writers, common)
                finished(_late_step(batch), {"stored": stored, "seen": work.seen.take()}, [], list(writers.values()))
        finished.wait()
        for writer in writers.values():
            writer.finish()


def _average(work: Work, batch: Batch, target: Target) -> None:
    """Find what one tensor's method has to know of it, then write the dense tensors."""
    dense = {tensor.name: DenseTensor(tensor, tensor.name in work.from_base) for tensor in batch.tensors}
    merged = [tensor.plan for tensor in dense.values() if not tensor.from_base]
    groups = [group for group in group_by_method(merged) if not group.spans_model]
    searches = [find_statistics(work.streams, group, work.budget.slab) for group in groups]
    found = dict(work.found)
    for facts in carry_out(all_of(searches), work.budget.workers, work.advance):
        found |= facts
    parts = parts_of(batch.tensors, work.budget.slab, work.from_base)
    mean = batch.size / max(1, len(parts))
    run_all(
        lambda piece: write_dense(work.streams, dense[piece.tensor], piece, found.get(piece.tensor, {}), target),
        parts,
        work.budget.workers,
        lambda n: work.advance(round(n * mean)),
    )
    digest_passed_over(target, batch.tensors, work.budget.slab)


def _extract(
    work: Work, batch: Batch, writers: Mapping[str, SparseFileWriter], common: Common
) -> dict[str, dict[str, dict[str, Any]]]:
    """Append the routed tensors of a batch to the sparse experts; `common` is what was found over the model."""
    routed = work.routed_of(batch.tensors)
    if not routed or not writers:
        return {}
    with open_files(work.placed[tensor.name].file for tensor in routed) as descriptors:
        job = _extraction(work, descriptors)
        return extract_batch(job, routed, writers, common, work.budget.workers, _of_one_expert(work))


def _of_one_expert(work: Work) -> Callable[[int], None]:
    """Turn elements of one expert and of the dense model, read together, into elements of each source."""
    n_sources = len(work.streams.names) + 1
    return lambda n: work.advance(max(1, 2 * n // n_sources))


def _open_target(work: Work, shard: Shard, is_begun: bool, stack: ExitStack) -> Target:
    """Open the shard's file, whose header stands from the beginning."""
    file = work.folder / shard.name
    if is_begun:
        infos = place_tensors(file, shard.members, _METADATA)
    else:
        file.unlink(missing_ok=True)
        infos = create_file(file, shard.members, _METADATA)
    descriptor = os.open(file, os.O_RDWR)
    stack.callback(os.close, descriptor)
    return Target(file, descriptor, infos, Digests())


def sparse_files(work: Work, expert: str) -> dict[int, str]:
    """Name the files of a sparse expert, or of SHARED, by the number of the shard; where it keeps nothing is none."""
    numbers = [shard.number for shard in work.shards if work.kept_of(shard, expert)]
    return {number: sparse_file_name(expert, at, len(numbers)) for at, number in enumerate(numbers, 1)}


def _open_writers(
    work: Work, shard: Shard, done: Sequence[Batch], step: Callable[[Batch], str], stack: ExitStack
) -> dict[str, SparseFileWriter]:
    """Open the shard's file of every sparse expert, behind the batches that are done."""
    if not work.routed_of(shard.tensors):
        return {}
    (work.folder / EXPERTS_FOLDER).mkdir(exist_ok=True)
    writers: dict[str, SparseFileWriter] = {}
    for expert in (*work.streams.names, SHARED):
        files = sparse_files(work, expert)
        if shard.number not in files:
            continue
        kept = [tensor for tensor in work.kept_of(shard, expert) if tensor.size]
        names, dtypes = [tensor.name for tensor in kept], {tensor.name: tensor.dtype for tensor in kept}
        file = work.folder / files[shard.number]
        if done:
            stored: dict[str, Any] = {}
            for batch in done:
                stored |= work.journal.steps[step(batch)]["stored"].get(expert, {})
            specs = {name: SparseTensor.model_validate(facts["spec"]) for name, facts in stored.items()}
            n_index = {name: int(facts["n_index"]) for name, facts in stored.items()}
            dtypes |= {name: str(facts["dtype"]) for name, facts in stored.items() if "dtype" in facts}
            writer = resume_sparse_file(file, expert, names, specs, dtypes, n_index)
        else:
            file.unlink(missing_ok=True)
            writer = create_sparse_file(file, expert, names)
        writers[expert] = stack.enter_context(writer)
    return writers


def _extraction(work: Work, descriptors: Mapping[Path, Handle]) -> Extraction:
    experts = dict(zip(work.streams.names, work.streams.experts, strict=True))
    return Extraction(experts, Dense(descriptors, work.placed), work.budget.slab, work.streams.seed, work.adapters)


def _common(work: Work) -> Common:
    """Look at all deltas of an expert together, in the order of the plan, whatever the shards."""
    routed = [tensor for shard in work.shards for tensor in work.routed_of(shard.tensors) if tensor.size]
    order = {name: at for at, name in enumerate(work.streams.weights)}
    routed.sort(key=lambda tensor: order[tensor.name])
    ranked = [tensor for tensor in routed if tensor.extract.over == "model"]
    elected = [tensor for tensor in routed if tensor.extract.mode == "emr"]
    with open_files(info.file for info in work.placed.values()) as descriptors:
        job, advance = _extraction(work, descriptors), _of_one_expert(work)
        limits = common_limits(job, ranked, work.budget.workers, advance)
        n = len(work.streams.names)
        return Common(limits, common_scales(job, elected, work.budget.workers, lambda size: advance(n * size)))


@dataclass
class _Finished:
    """Hands finished batches to a thread that waits for the disk and then writes the journal; one at a time."""

    work: Work
    pool: ThreadPoolExecutor
    waiting: list[Future[None]] = field(default_factory=list)

    def __call__(
        self, step: str, facts: Mapping[str, Any], descriptors: Sequence[int], writers: Sequence[SparseFileWriter]
    ) -> None:
        self.wait()
        self.waiting.append(self.pool.submit(self._commit, step, facts, descriptors, writers))

    def _commit(
        self, step: str, facts: Mapping[str, Any], descriptors: Sequence[int], writers: Sequence[SparseFileWriter]
    ) -> None:
        for descriptor in descriptors:
            os.fdatasync(descriptor)
        for writer in writers:
            writer.sync()
        self.work.journal.write(step, facts)

    def wait(self) -> None:
        while self.waiting:
            self.waiting.pop().result()


@contextmanager
def _behind(work: Work) -> Iterator[_Finished]:
    with ThreadPoolExecutor(1) as pool:
        finished = _Finished(work, pool)
        yield finished
        finished.wait()


def _gathered(work: Work) -> Written:
    """Read from the journal what all processes wrote."""
    dense: dict[str, str] = {}
    kept: dict[str, dict[str, Kept]] = {name: {} for name in work.streams.names} if work.routed else {}
    batches = [batch for shard in work.shards for batch in shard.batches]
    for facts in (work.journal.steps[step] for batch in batches for step in _steps(work, batch)):
        dense |= facts.get("dense", {})
        for path, tensor, digest in facts["seen"]:
            work.seen.add(Path(path), tensor, digest)
        for expert, each in facts["stored"].items():
            if expert == SHARED:
                continue
            kept[expert] |= {name: Kept(**stored["kept"]) for name, stored in each.items()}
    empty = [tensor for batch in batches for tensor in batch.tensors if not tensor.size]
    dense |= dict.fromkeys((tensor.name for tensor in empty), fold(()))
    for expert, own in kept.items():
        own |= {t.name: Kept(0, 0, 0.0, 0.0) for t in work.routed_of(empty) if work.is_kept(t, expert)}
    return Written(dense, {expert: own for expert, own in kept.items() if own})
