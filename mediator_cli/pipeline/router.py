"""Fit the router of a bundle: while it is merged, or anew when it is finished."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.card import CARD, router_card, with_block
from mediator_cli.bundle.manifest import ROUTER, read_manifest, with_router
from mediator_cli.bundle.record import FileRecord
from mediator_cli.bundle.replace import replace_files
from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.source import side_files
from mediator_cli.errors import BundleError, Problem, RecipeError, did_you_mean
from mediator_cli.plan.prompts import read_prompts
from mediator_cli.runtime.ask import text_ids
from mediator_cli.runtime.dense_features import folder_reader
from mediator_cli.runtime.features import FeatureSpec, spec_of
from mediator_cli.runtime.fit import FitSettings, choose_prompts, fit_router
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import load_tokenizer, prompt_reader
from mediator_cli.runtime.router import read_router, write_router
from mediator_cli.runtime.tokens import prompt_tokens
from mediator_cli.runtime.unfitted import measured, unmeasured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.bundle.manifest import Manifest, SourceRecord
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.plan.model import Plan
    from mediator_cli.recipe.router import RouterSpec
    from mediator_cli.runtime.fit import FittedRouter
    from mediator_cli.runtime.router import Routing


@dataclass(frozen=True)
class RouterJob:
    """What a router is fitted on, read and checked before anything is merged; no prompts where it needs none."""

    experts: tuple[str, ...]
    prompts: Mapping[str, Sequence[str]]
    settings: FitSettings


def prepare_router(plan: Plan) -> RouterJob | None:
    """Read the prompts of a plan; None where no router is wanted.

    Raises RecipeError when no router can be fitted on them, BundleError when the tokenizer does not work.
    """
    if plan.router is None:
        return None
    prompts = {expert.name: read_prompts(expert.prompts) for expert in plan.experts if expert.prompts is not None}
    settings = fit_settings(plan.router)
    if len(prompts) < len(plan.experts):
        prompts = {}
    try:
        if prompts:
            choose_prompts(prompts, settings)
    except BundleError as error:
        place = plan.loaded.place("experts")
        raise RecipeError([Problem(f"{place}: {p.place}", p.message, p.hint) for p in error.problems]) from None
    load_tokenizer(plan.tokenizer_folder if side_files(plan.tokenizer_folder) else plan.base.path)
    return RouterJob(tuple(expert.name for expert in plan.experts), prompts, settings)


def fit_settings(spec: RouterSpec) -> FitSettings:
    """Give the settings that a recipe's `router` asks for."""
    return FitSettings(
        features=FeatureSpec(spec.features, spec.layer, spec.reads, spec.first_token),
        classifier=spec.classifier,
        calibrate=spec.calibrate,
        held_out=spec.held_out,
        max_prompts=spec.max_prompts,
        outside_quantile=spec.outside_quantile,
        policy=PolicyRecord(**spec.policy.model_dump()),
        form=spec.form or ("inverse" if spec.features == "perplexity" and spec.classifier == "none" else None),
        temperature=spec.temperature,
    )


def add_router(folder: Path, job: RouterJob) -> tuple[RouterRecord | None, tuple[str, ...]]:
    """Fit a router on the dense expert in a folder and write its file; return its record and what is worth knowing.

    Experts can be asked only when their bundle is finished: `ask_experts` does that, and until then a router that is
    fitted to what they say is missing.
    """
    if job.settings.features.asks:
        bare = job.settings.classifier == "none"
        return unmeasured(job.settings, job.experts).record(None) if bare else None, ()
    fitted = fit_job(folder, job)
    write_router(folder / ROUTER, fitted.arrays)
    return fitted.record(_file_record(folder / ROUTER)), fitted.notices


def ask_experts(folder: Path, job: RouterJob) -> None:
    """Fit or measure a router that asks the experts, on a bundle whose manifest is written; nothing for another job."""
    if job.settings.features.asks and job.prompts:
        old = read_manifest(folder)
        fitted = fit_job(folder, job)
        put_router(folder, old.model_copy(update={"notices": (*old.notices, *fitted.notices)}), fitted)


def fit_job(folder: Path, job: RouterJob) -> FittedRouter:
    """Fit a router on a finished folder; raise BundleError where the prompts do not do."""
    if job.settings.classifier == "none" and not job.prompts:
        return unmeasured(job.settings, job.experts)
    tokenizer = load_tokenizer(folder)
    reader = folder_reader(folder, tokenizer, job.settings.features)
    encode = partial(text_ids, prompt_reader(tokenizer), job.settings.features)
    make = measured if job.settings.classifier == "none" else fit_router
    return make(reader, encode, job.prompts, job.settings)


def _file_record(file: Path) -> FileRecord:
    return FileRecord(name=file.name, bytes=file.stat().st_size, sha256=digest_file(file))


def refit_router(folder: Path, files: Mapping[str, Path], spec: RouterSpec) -> tuple[Manifest, tuple[str, ...]]:
    """Fit the router of a finished bundle anew and put it in the old one's place; return manifest and notices.

    `files` are prompts by expert; for the others those that the manifest notes are used. Raises BundleError when there
    are none, or when the bundle routes nothing.
    """
    old = read_manifest(folder)
    if old.gates is not None:
        message = f"its experts are chosen by gates ({old.gates.method}), which a router would have no say in"
        raise BundleError(Problem(str(folder), message, "write a bundle of another strategy: mediator compare --write"))
    sources = _with_prompts(folder, old, files)
    _check_policy(spec, [source.name for source in sources])
    is_needless = spec.classifier == "none" and any(source.prompts is None for source in sources)
    paths = {} if is_needless else {source.name: find_prompts(folder, source) for source in sources}
    prompts = {name: read_prompts(path) for name, path in paths.items()}
    fitted = fit_job(folder, RouterJob(tuple(source.name for source in sources), prompts, fit_settings(spec)))
    return put_router(folder, old.model_copy(update={"experts": sources}), fitted), fitted.notices


def put_router(folder: Path, manifest: Manifest, fitted: FittedRouter) -> Manifest:
    """Put a router into a finished bundle, in the place of another if it has one."""
    before = manifest.router.file.name if manifest.router and manifest.router.file else ROUTER
    if not fitted.arrays:
        record = fitted.record(None)
        new = replace_files(folder, with_router(manifest, record), _card(folder, record))
        # The manifest names it no more.
        (folder / before).unlink(missing_ok=True)
        return new
    with TemporaryDirectory(prefix="mediator-") as scratch:
        file = Path(scratch) / ROUTER
        write_router(file, fitted.arrays)
        record, data = fitted.record(_file_record(file)), file.read_bytes()
    new = replace_files(folder, with_router(manifest, record), {ROUTER: data, **_card(folder, record)})
    if before != ROUTER:
        (folder / before).unlink(missing_ok=True)
    return new


def _with_prompts(folder: Path, manifest: Manifest, files: Mapping[str, Path]) -> tuple[SourceRecord, ...]:
    """Note the prompts given beside those noted already."""
    names = [expert.name for expert in manifest.experts]
    if unknown := [name for name in files if name not in names]:
        raise BundleError([Problem("--prompts", f"no expert '{name}'", did_you_mean(name, names)) for name in unknown])
    if not manifest.sparse:
        message = "no unit is routed, so there is nothing to choose between"
        raise BundleError(Problem(str(folder), message, "merge again with another assign.rule"))
    return tuple(
        expert.model_copy(update={"prompts": prompts_record(files[expert.name])}) if expert.name in files else expert
        for expert in manifest.experts
    )


def prompts_record(file: Path) -> FileRecord:
    """Note a file of prompts, by its path as it was given."""
    digest = digest_file(file)
    return FileRecord(name=str(file), bytes=file.stat().st_size, sha256=digest)


def find_prompts(folder: Path, source: SourceRecord) -> Path:
    """Find the prompts that a manifest notes: the same bytes at that path from here, or from the bundle."""
    hint = f"give --prompts {source.name}=FILE"
    if source.prompts is None:
        raise BundleError(Problem(str(folder), f"notes no prompts of {source.name}", hint))
    name = source.prompts.name
    for path in (Path(name), folder / name):
        if path.is_file() and digest_file(path) == source.prompts.sha256:
            return path
    raise BundleError(Problem(name, f"the prompts that {source.name} was noted with are not there", hint))


def _check_policy(spec: RouterSpec, experts: Sequence[str]) -> None:
    if spec.policy.k is not None and spec.policy.k > len(experts):
        message = f"{spec.policy.k} experts are to be mixed, the bundle has {len(experts)}"
        raise BundleError(Problem("--policy k", message, f"give {len(experts)} or less"))
    for name in spec.policy.weights or {}:
        if name not in experts:
            raise BundleError(Problem("--policy weights", f"no expert '{name}'", did_you_mean(name, experts)))


def _card(folder: Path, record: RouterRecord) -> dict[str, bytes]:
    """Write the router's part of the model card anew; nothing where the bundle has no card."""
    if not (folder / CARD).is_file():
        return {}
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    return {CARD: with_block(text, "router", router_card(record)).encode()}


def route_texts(folder: Path, texts: Sequence[str]) -> tuple[RouterRecord | None, Routing]:
    """Route prompts by the router of a bundle, reading no more of the bundle than that needs.

    Gates choose inside the model, so that the whole of it is opened for them: what they choose on average, and no
    record. Raises BundleError when the bundle has neither, or a prompt is empty.
    """
    manifest = read_manifest(folder)
    if manifest.gates is not None:
        prompts = prompt_tokens(load_tokenizer(folder), texts)
        return None, open_bundle(folder).route([prompt.ids for prompt in prompts])
    router = read_router(folder, manifest)
    if router is None:
        hint = "fit one with `mediator fit-router`"
        raise BundleError(Problem(str(folder), "the bundle has no router", hint))
    if router.record.features == "none":
        return router.record, router.route(np.zeros((len(texts), 0)))
    tokenizer, spec = load_tokenizer(folder), spec_of(router.record)
    features, reader = folder_reader(folder, tokenizer, spec), prompt_reader(tokenizer)
    return router.record, router.route(features.read([text_ids(reader, spec, text) for text in texts]))
