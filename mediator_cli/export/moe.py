"""A bundle as one Mixture of Experts: its experts written out, then merged by a recipe of kind moe."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.checkpoint.layout import layers_of, place_of
from mediator_cli.checkpoint.write import write_error
from mediator_cli.engine.publish import check_output
from mediator_cli.errors import BundleError, CheckpointError, Problem, RecipeError
from mediator_cli.export.dense import write_dense
from mediator_cli.export.folder import check_experts, chosen_experts, folder_bytes
from mediator_cli.export.origin import routed_tensors
from mediator_cli.pipeline.merge import merge
from mediator_cli.pipeline.settings import Settings
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import parse_partly

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mediator_cli.bundle.manifest import Manifest, SourceRecord
    from mediator_cli.bundle.read import Bundle
    from mediator_cli.export.settings import Run
    from mediator_cli.plan.model import Plan

ARCHITECTURES = ("auto", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared")
_RECIPE = "export-moe.yaml"
_BLOCK = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MoeJob:
    """What MoE: its architecture, experts a token, and files of prompts by expert where the bundle notes none."""

    architecture: str = "auto"
    experts: tuple[str, ...] = ()
    experts_per_token: int = 2
    gates: str = "ridge"
    prompts: Mapping[str, Path] = field(default_factory=dict)


class MoeExport(BaseModel):
    """What was written, and what of the bundle it does not carry."""

    model_config = ConfigDict(frozen=True)

    format: str = "moe"
    folder: str
    bundle: str
    architecture: str
    experts: tuple[str, ...]
    experts_per_token: int
    layers: tuple[int, ...]
    n_parameters: int
    n_active: int
    agreement: dict[str, float]
    bytes: int
    notices: tuple[str, ...]


def export_moe(bundle: Bundle, target: Path, job: MoeJob, run: Run) -> MoeExport:
    """Write a Mixture of Experts of the bundle's experts, whole or not at all; the experts written out go in any case.

    All that is no feed-forward block is the dense expert's. Raises MediatorError for what the user can mend.
    """
    check_experts(bundle)
    names = chosen_experts(bundle, job.experts)
    target = target.absolute()
    check_output(target, run.mode)
    prompts = _find_prompts(bundle, names, job)
    notices = tuple(_lost(bundle))
    for notice in notices:
        run.notify(notice)
    with _scratch(target) as scratch:
        for name in names:
            (scratch / name).mkdir()
            write_dense(bundle, scratch / name, {name: 1.0}, replace(run, notify=lambda notice: None))
        plan = _plan(bundle, scratch, names, prompts, job)
        settings = Settings(run.overwrite, progress=run.progress, notify=run.notify)
        merge(plan, target, settings=settings)
    return _report(bundle, target, read_manifest(target), notices)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Give an empty folder beside the output, which goes in the end."""
    folder = target.parent / f".{target.name}.experts"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise write_error(folder, error) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _plan(bundle: Bundle, scratch: Path, names: tuple[str, ...], prompts: Mapping[str, Path], job: MoeJob) -> Plan:
    experts = [
        {"name": name, "model": f"./{name}", **({"prompts": str(prompts[name])} if name in prompts else {})}
        for name in names
    ]
    fields = {
        "version": 1,
        "kind": "moe",
        "base": os.path.relpath(bundle.path, scratch),
        "experts": experts,
        "assign": _assigned(bundle),
        "average": {"method": "linear"},
        "moe": {
            "format": job.architecture,
            "experts_per_token": min(job.experts_per_token, len(names)),
            "shared_from": "base",
            "gates": {"method": job.gates},
        },
    }
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()) + "\n"
    try:
        return make_plan(parse_partly(scratch / _RECIPE, text), Access(offline=True))
    except (RecipeError, CheckpointError) as error:
        raise BundleError([_mended(problem) for problem in error.problems]) from None


def _mended(problem: Problem) -> Problem:
    """Leave out the line of a recipe that the user did not write."""
    head, _, rest = problem.place.partition(" ")
    return replace(problem, place=(rest or "--to moe") if _RECIPE in head else problem.place)


def _assigned(bundle: Bundle) -> dict[str, object]:
    """Give experts to the layers whose feed-forward block is routed."""
    routed = {place_of(name).layer for name in routed_tensors(bundle) if place_of(name).kind in _BLOCK}
    if not routed:
        message = "routes no feed-forward block, and those are all that the experts of an MoE have of their own"
        raise BundleError(Problem(str(bundle.path), message, "--to lora, or --to dense --expert NAME"))
    if routed == set(layers_of(bundle.tensors)):
        return {"rule": "all"}
    return {"rule": "listed", "units": sorted(layer for layer in routed if layer)}


def _find_prompts(bundle: Bundle, names: tuple[str, ...], job: MoeJob) -> dict[str, Path]:
    """Find a file of prompts for each expert; raise BundleError where one is missing and the gates need it."""
    if job.gates in ("random", "uniform_random"):
        return {}
    found: dict[str, Path] = {}
    problems = []
    for name in names:
        record = next(source for source in bundle.manifest.experts if source.name == name)
        file = job.prompts[name].absolute() if name in job.prompts else _noted(bundle, record)
        if file is not None and file.is_file():
            found[name] = file
        else:
            written = str(file or (record.prompts.name if record.prompts else ""))
            message = f"{written} is not here" if written else "the bundle notes no prompts of its task"
            hint = f"--prompts {name}=FILE, JSON lines with a `prompt` each, or --gates random"
            problems.append(Problem(f"expert {name}", message, hint))
    if problems:
        raise BundleError(problems)
    return found


def _noted(bundle: Bundle, record: SourceRecord) -> Path | None:
    """Find the prompts that the bundle was merged with: at their path from here or from the bundle, unchanged."""
    noted = record.prompts
    if noted is None:
        return None
    for start in (Path.cwd(), bundle.path, bundle.path.parent):
        file = start / noted.name
        if file.is_file() and digest_file(file) == noted.sha256:
            return file.absolute()
    return None


def _lost(bundle: Bundle) -> Iterator[str]:
    yield "gates in each layer choose experts for each token; the bundle's router, which reads the prompt, stays behind"
    routed = _changed(bundle)
    other = [name for name in routed if place_of(name).kind not in _BLOCK]
    if other:
        yield (
            f"{len(other)} of {len(routed)} tensors that the experts change are no feed-forward blocks (attention, "
            "norms, …): they stay the dense expert's"
        )


def _changed(bundle: Bundle) -> set[str]:
    """Name the tensors of which some expert keeps anything."""
    specs = [item for expert in bundle.experts.values() for item in expert.tensors.items()]
    return {name for name, spec in specs if spec.n_kept or spec.is_gated or spec.is_low_rank}


def _report(bundle: Bundle, target: Path, manifest: Manifest, notices: tuple[str, ...]) -> MoeExport:
    record = manifest.moe
    if record is None:
        raise RuntimeError("the merge made no MoE")
    return MoeExport(
        folder=str(target),
        bundle=bundle.manifest.digest,
        architecture=record.format,
        experts=record.experts,
        experts_per_token=record.experts_per_token,
        layers=record.layers,
        n_parameters=record.n_parameters,
        n_active=record.n_active,
        agreement=dict(record.gates.agreement),
        bytes=folder_bytes(target),
        notices=(*notices, *manifest.notices),
    )
