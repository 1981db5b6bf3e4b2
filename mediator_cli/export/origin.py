"""What an expert of a bundle differs from the dense expert in: of the model it came from where that is at hand."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.digest import Digests
from mediator_cli.checkpoint.hub.find import Access, is_hub_id
from mediator_cli.engine.streams import open_streams, pieces
from mediator_cli.errors import BundleError, CheckpointError, MediatorError, OutputError, Problem, did_you_mean
from mediator_cli.pipeline.change.newcomer import recorded_recipe
from mediator_cli.pipeline.settings import Settings
from mediator_cli.pipeline.sources import changed_sources, source_files
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import parse_partly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mediator_cli.bundle.manifest import SourceRecord
    from mediator_cli.bundle.read import Bundle
    from mediator_cli.export.settings import Run
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.plan.model import Plan

Kind = Literal["source", "stored", "factors"]
BASE = "base"
_SLAB = 16 * BLOCK
_TOLD = {
    "source": "expert - dense of the model that it came from, nothing pruned",
    "stored": "the sparse delta as the bundle stores it",
    "factors": "the low-rank factors as the bundle stores them",
}


@dataclass(frozen=True)
class Origin:
    """Where an expert's delta is read: `read` gives that of a tensor, float32 in its shape; `note` says why so."""

    expert: str
    kind: Kind
    note: str
    read: Callable[[str], Floats]
    factors: Callable[[str], tuple[Floats, Floats] | None] = lambda name: None

    @property
    def told(self) -> str:
        """Say what the delta is."""
        return _TOLD[self.kind]


def check_sources(bundle: Bundle, given: Mapping[str, Path]) -> None:
    """Raise BundleError for sources of nobody, or that are not there."""
    known = [BASE, *(source.name for source in bundle.manifest.experts)]
    problems = [Problem("--source", f"no expert '{n}'", did_you_mean(n, known)) for n in given if n not in known]
    problems += [
        Problem(f"--source {name}={path}", "no such folder", "check the path")
        for name, path in given.items()
        if not path.is_dir()
    ]
    if problems:
        raise BundleError(problems)


@contextmanager
def open_origin(bundle: Bundle, expert: str, given: Mapping[str, Path], run: Run) -> Iterator[Origin]:
    """Open what gives an expert's delta, without pruning where its source is at hand and as it was when merged.

    `given` says by name where sources lie now. Raises CheckpointError where a source that is given does not fit.
    """
    if _is_low_rank(bundle, expert):
        yield Origin(expert, "factors", "", partial(stored_delta, bundle, expert), _factors(bundle, expert))
        return
    plan = _plan(bundle, expert, given, run)
    if isinstance(plan, str):
        yield Origin(expert, "stored", plan, partial(stored_delta, bundle, expert))
        return
    with open_streams(plan) as streams:

        def read(name: str) -> Floats:
            info = bundle.tensors[name]
            values = np.empty(info.size, np.float32)
            for piece in pieces(name, info.size, _SLAB):
                values[piece.start : piece.stop] = streams.tensors(piece).rows[0]
            values -= bundle.dense(name).float().reshape(-1).numpy()
            return _finite(bundle, name, values.reshape(info.shape))

        yield Origin(expert, "source", "", read)


def _is_low_rank(bundle: Bundle, expert: str) -> bool:
    sparse = bundle.experts.get(expert)
    return sparse is not None and any(spec.is_low_rank for spec in sparse.tensors.values())


def stored_delta(bundle: Bundle, expert: str, name: str) -> Floats:
    """Give what an expert as the bundle stores it differs in, rounding included: float32 in the tensor's shape."""
    return _finite(bundle, name, (bundle.expert(expert, name).float() - bundle.dense(name).float()).numpy())


def _finite(bundle: Bundle, name: str, values: Floats) -> Floats:
    if not np.isfinite(values).all():
        hint = "`mediator verify` says whether it is damaged; else look for a broken expert"
        raise BundleError(Problem(f"{bundle.path}: {name}", "has numbers that are not finite", hint))
    return values


def _factors(bundle: Bundle, expert: str) -> Callable[[str], tuple[Floats, Floats] | None]:
    def read(name: str) -> tuple[Floats, Floats] | None:
        sparse = bundle.experts[expert]
        delta = bundle.delta(expert, name) if name in sparse.tensors else None
        return (delta.a.numpy(), delta.b.numpy()) if isinstance(delta, FactorDelta) else None

    return read


def _plan(bundle: Bundle, expert: str, given: Mapping[str, Path], run: Run) -> Plan | str:
    """Fit an expert's source to the bundle's tensors; a text says why that is not possible."""
    record = next(source for source in bundle.manifest.experts if source.name == expert)
    try:
        if recorded_recipe(bundle.path, bundle.manifest).align is not None:
            return "the sources were aligned before they were merged"
    except BundleError as error:
        return error.problems[0].message
    source = _place(bundle, record, given)
    base = str(bundle.path.absolute()) if record.kind == "full" else _place(bundle, bundle.manifest.base, given)
    missing = [path for path, found in ((record.path, source), (bundle.manifest.base.path, base)) if found is None]
    if missing or source is None or base is None:
        return f"{missing[0]} is not here"
    try:
        return _fitted(bundle, record, source, base, run)
    except MediatorError as error:
        if expert in given:
            raise CheckpointError([_at(f"--source {expert}", problem) for problem in error.problems]) from None
        problem = error.problems[0]
        return f"{source} {problem.message}" if not isinstance(error, OutputError) else problem.message


def _at(place: str, problem: Problem) -> Problem:
    return Problem(place, problem.message, problem.hint or "give the model that the bundle was merged from")


def _place(bundle: Bundle, record: SourceRecord, given: Mapping[str, Path]) -> str | None:
    """Find where a source lies: as given, at its path from here or from the bundle, else in the Hub's cache."""
    if record.name in given:
        return str(given[record.name].absolute())
    for path in (Path(record.path), bundle.path / record.path, bundle.path.parent / record.path):
        if path.is_dir():
            return str(path.absolute())
    if is_hub_id(record.path):
        return record.path if "@" in record.path or not record.revision else f"{record.path}@{record.revision}"
    return None


def _fitted(bundle: Bundle, record: SourceRecord, source: str, base: str, run: Run) -> Plan:
    fields = {
        "version": 1,
        "base": base,
        "experts": [{"name": record.name, "model": source}],
        "assign": {"rule": "none"},
        "average": {"method": "linear"},
    }
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())
    # From the cache alone: an export asks the Hub for nothing.
    plan = make_plan(parse_partly(Path.cwd() / "export", text), Access(offline=True))
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    other = [n for n in routed_tensors(bundle) if shapes.get(n) != bundle.tensors[n].shape]
    if other:
        raise CheckpointError(Problem(source, f"lays {other[0]} out in another way than the bundle"))
    found = source_files(plan, Digests(), Settings(workers=1, progress=run.progress))
    wanted = {record.name: record.files}
    if record.kind == "lora":
        wanted["base"] = bundle.manifest.base.files
    if changed := changed_sources(wanted, found):
        which = source if record.name in changed else base
        raise CheckpointError(Problem(which, "is not the model that the bundle was merged from: its files differ"))
    return plan


def routed_tensors(bundle: Bundle) -> list[str]:
    """List the tensors that some expert adds to, in the dense expert's order."""
    held = {name for expert in bundle.experts.values() for name in expert.tensors}
    return [name for name in bundle.tensors if name in held]
