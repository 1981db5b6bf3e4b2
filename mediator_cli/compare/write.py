"""A fitted strategy as a bundle: the base with what is folded into it, low-rank experts, and who decides."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.digest import digest_tensors, file_digest, sparse_digests
from mediator_cli.bundle.factors import write_factors
from mediator_cli.bundle.manifest import EXPERTS_FOLDER, MANIFEST, ROUTER, to_json
from mediator_cli.bundle.record import FileRecord, WeightFile
from mediator_cli.bundle.retouch import retouch
from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord
from mediator_cli.bundle.sparse_file import open_sparse_file, sparse_file_name
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.checkpoint.source import weight_files
from mediator_cli.checkpoint.write import write_error
from mediator_cli.compare.write_records import Described, Parts, card_of, manifest_of
from mediator_cli.engine.publish import check_output, publish
from mediator_cli.errors import OutputError, Problem
from mediator_cli.kernels.factors import Factors
from mediator_cli.pipeline.record import SparseFiles
from mediator_cli.pipeline.side_files import write_side_files
from mediator_cli.runtime.gates import Gates
from mediator_cli.runtime.gates_file import write_gates
from mediator_cli.runtime.held import folded, mixed_matrices
from mediator_cli.runtime.router import Router, router_arrays, write_router
from mediator_cli.strategies.strategy import ByTask, Fixed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.compare.entries import Entry
    from mediator_cli.compare.strategies_run import Contest
    from mediator_cli.engine.publish import Mode
    from mediator_cli.recipe.compare import LoadedCompare
    from mediator_cli.strategies.library import Change
    from mediator_cli.strategies.strategy import Fitted

INDEX = "model.safetensors.index.json"


def check_writable(entry: Entry, fitted: Fitted) -> None:
    """Raise OutputError for what no bundle can hold: mixtures that only the name of a task tells."""
    if isinstance(fitted.decision, ByTask):
        message = f"{entry.label} is told the task of each prompt, which no user does"
        raise OutputError(Problem(entry.label, message, "write another strategy"))


def write_strategy(
    contest: Contest, loaded: LoadedCompare, entry: Entry, fitted: Fitted, target: Path, *, mode: Mode = "new",
    told: str = "",
) -> Path:  # fmt: skip
    """Write a fitted strategy as a bundle, which appears whole or not at all; give its folder.

    `told` is what its model card says of the contest. Raises OutputError for what cannot be written.
    """
    check_writable(entry, fitted)
    check_output(target, mode)
    fitted = lean(fitted)
    key = {"the strategy": entry.label, "the results": contest.file_of(entry).name}
    with publish(target, mode, key) as building:
        folder = building.folder
        try:
            _write_dense(contest, fitted, folder)
            parts = _write_parts(contest, fitted, folder)
            (folder / "README.md").write_text(card_of(contest, loaded, entry, fitted, target.name, told), "utf-8")
            manifest = manifest_of(contest, loaded, entry, fitted, parts, _described(folder, parts))
            (folder / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
        except OSError as error:
            raise write_error(folder, error) from None
    return target


def lean(fitted: Fitted) -> Fitted:
    """Leave out experts that never answer, and gates of matrices that no expert changes."""
    if isinstance(fitted.decision, Fixed):
        weights = {name: float(weight) for name, weight in fitted.decision.weights.items() if weight}
        kept = {name: change for name, change in fitted.experts.items() if name in weights}
        return replace(fitted, experts=kept, decision=Fixed(weights))
    if isinstance(fitted.decision, Gates) and fitted.decision.rule.at == "module":
        changed = {tensor for change in fitted.experts.values() for tensor in change}
        own = {name: gate for name, gate in fitted.decision.by_name.items() if name in changed}
        return replace(fitted, decision=replace(fitted.decision, by_name=own))
    return fitted


def _write_dense(contest: Contest, fitted: Fitted, folder: Path) -> None:
    """Copy the base, and give the tensors that something is folded into their new values."""
    plan = contest.sources.plan
    for file in weight_files(plan.base.tensors):
        shutil.copyfile(file, folder / file.name)
    if (plan.base.path / INDEX).is_file():
        shutil.copyfile(plan.base.path / INDEX, folder / INDEX)
    write_side_files(plan, folder)
    if not fitted.folded:
        return
    model = contest.bench.model
    names = dict.fromkeys(name for change in fitted.folded for name in change)
    with folded(model, fitted.folded):
        parameters = mixed_matrices(model)
        # What the model holds is what answered, rounded as it is in memory.
        retouch(folder, folder, {name: parameters[name].detach().float().cpu().numpy() for name in names})


def _write_parts(contest: Contest, fitted: Fitted, folder: Path) -> Parts:
    sparse = {}
    if fitted.experts:
        (folder / EXPERTS_FOLDER).mkdir()
    for name, change in fitted.experts.items():
        file = sparse_file_name(name, 1, 1)
        write_factors(folder / file, name, _factors(contest, name, change))
        sparse[name] = _sparse_files(folder, file)
    gates = write_gates(folder, fitted.decision) if isinstance(fitted.decision, Gates) else None
    return Parts(sparse, _write_router(fitted, folder), gates)


def _factors(contest: Contest, name: str, change: Change) -> dict[str, Factors]:
    """Give the factors of an expert, as its adapter stores them where nothing was done to them."""
    library, stored = contest.bench.library.experts.get(name, {}), contest.sources.factors.get(name, {})
    found = {}
    for tensor, delta in change.items():
        if tensor in stored and library.get(tensor) is delta:
            found[tensor] = stored[tensor]
        else:
            a, b = (np.ascontiguousarray(each.detach().cpu().numpy(), np.float32) for each in (delta.a, delta.b))
            found[tensor] = Factors(a, b)
    return found


def _sparse_files(folder: Path, name: str) -> SparseFiles:
    sparse = open_sparse_file(folder / name)
    arrays = digest_tensors(sparse.arrays)
    return SparseFiles((_weight_file(folder, name, arrays),), sparse_digests(sparse, arrays))


def _weight_file(folder: Path, name: str, digests: Mapping[str, str]) -> WeightFile:
    file = folder / name
    return WeightFile(name=name, bytes=file.stat().st_size, xxh3=file_digest(file, digests))


def _write_router(fitted: Fitted, folder: Path) -> RouterRecord | None:
    """Write the arrays of a router and describe it; a fixed mixture is a router that reads nothing."""
    decision = fitted.decision
    if isinstance(decision, Fixed):
        return blind_router(fitted) if fitted.experts else None
    if not isinstance(decision, Router):
        return None
    policy = decision.record.policy.model_copy(update={"combine": fitted.combine})
    file = None
    if decision.classifier is not None and decision.outside_model is not None:
        write_router(folder / ROUTER, router_arrays(decision.classifier, decision.outside_model, decision.sums))
        file = _file_record(folder, folder / ROUTER)
    return decision.record.model_copy(update={"policy": policy, "file": file})


def blind_router(fitted: Fitted) -> RouterRecord:
    """Describe a router that gives every prompt the same mixture."""
    weights = dict(fitted.decision.weights) if isinstance(fitted.decision, Fixed) else {}
    policy = PolicyRecord(rule="fixed", weights=weights, outside="ignore", combine=fitted.combine)
    return RouterRecord(
        features="none", classifier="none", experts=tuple(fitted.experts), size=1, temperature=1.0,
        outside_above=None, policy=policy, report=None, file=None,
    )  # fmt: skip


def _described(folder: Path, parts: Parts) -> Described:
    """Digest all that was written, the manifest not."""
    tensors = read_tensors(folder)
    digests = digest_tensors(tensors)
    by_file: dict[str, dict[str, str]] = {}
    for name, info in tensors.items():
        by_file.setdefault(info.file.name, {})[name] = digests[name]
    files = {file: _weight_file(folder, file, own) for file, own in by_file.items()}
    known = {folder / name for name in (*files, ROUTER, MANIFEST)}
    known |= {folder / file.name for each in parts.sparse.values() for file in each.files}
    known |= {folder / parts.gates.file.name} if parts.gates is not None else set()
    others = sorted(file for file in folder.rglob("*") if file.is_file() and file not in known)
    return Described(
        {name: files[info.file.name] for name, info in tensors.items()},
        digests,
        {name: (info.dtype, info.shape, info.n_bytes) for name, info in tensors.items()},
        tuple(_file_record(folder, file) for file in others),
    )


def _file_record(folder: Path, file: Path) -> FileRecord:
    return FileRecord(name=file.relative_to(folder).as_posix(), bytes=file.stat().st_size, sha256=digest_file(file))
