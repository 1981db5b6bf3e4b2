"""The model that is to become an expert of a finished bundle: opened, and fitted to it. Headers only."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mediator_cli.bundle.manifest import bundle_file
from mediator_cli.bundle.sparse_file import open_sparse_file
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.digest import Digests
from mediator_cli.checkpoint.hub.find import ONLINE, Access, is_hub_id
from mediator_cli.checkpoint.layout import unit_of
from mediator_cli.checkpoint.source import find_location, is_adapter, open_checkpoint
from mediator_cli.errors import BundleError, CheckpointError, MediatorError, Problem, RecipeError, some_names
from mediator_cli.pipeline.download import download_weights, plan_with_unseen
from mediator_cli.pipeline.settings import Settings
from mediator_cli.pipeline.sources import changed_sources, source_files
from mediator_cli.plan.adapters import base_notices
from mediator_cli.recipe.average import AverageSpec
from mediator_cli.recipe.load import LoadedRecipe, parse_document
from mediator_cli.recipe.names import LEGAL_NAME, NAME_RULE, check_expert_names
from mediator_cli.recipe.schema import AssignSpec, ExpertSpec, Recipe, Unit
from mediator_cli.recipe.text import compose_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mediator_cli.bundle.manifest import Manifest, SourceRecord
    from mediator_cli.plan.model import Plan

_AGAIN = "merge again with all experts: mediator merge"


@dataclass(frozen=True)
class Newcomer:
    """What is asked for: a name, a model as a recipe names it, and for an adapter the base where it lies now."""

    name: str
    model: str
    base: str | None = None


def check_growing(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError where no expert can be added to a bundle, and say what to do instead."""
    if manifest.moe is not None:
        hint = f"{_AGAIN} RECIPE, with `kind: moe` and one expert more"
        raise BundleError(Problem(str(folder), "is a Mixture of Experts, whose gates and layers are of its size", hint))
    if not manifest.sparse:
        message = "no unit is routed, so an expert would have no place in it"
        raise BundleError(Problem(str(folder), message, f"{_AGAIN} RECIPE --set assign.rule=all"))
    if manifest.shared is not None:
        mode = manifest.extract.mode if manifest.extract is not None else "sparse"
        message = f"its experts share arrays that are made of all of them (extract.mode {mode})"
        raise BundleError(Problem(str(folder), message, f"{_AGAIN} RECIPE; modes sparse and sign can grow"))


def check_no_gates(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError where gates inside the model choose among the experts, and would have to know a newcomer."""
    if manifest.gates is not None:
        message = f"gates inside the model ({manifest.gates.method}) choose among its experts, and know no other"
        raise BundleError(
            Problem(
                str(folder), message, "write it again with the newcomer: mediator compare RECIPE --write STRATEGY DIR"
            )
        )


def check_name(name: str, manifest: Manifest) -> None:
    """Raise BundleError for a name that no expert may have, or that one has."""
    if not re.match(LEGAL_NAME, name):
        raise BundleError(Problem("--name", f"'{name}' is not allowed", f"use {NAME_RULE}"))
    try:
        check_expert_names([name])
        known = [source.name for source in manifest.experts]
        check_expert_names([*known, name])
    except ValueError as error:
        hint = "choose another, or take the old one out first: mediator remove-expert"
        raise BundleError(Problem("--name", str(error), hint)) from None


def recorded_recipe(folder: Path, manifest: Manifest) -> Recipe:
    """Read the recipe that a bundle keeps; raise BundleError where it does not say how experts are stored.

    Low-rank experts are stored as they are, whatever a recipe says, so theirs may be of any kind.
    """
    try:
        recipe = _parsed(folder, manifest)
    except RecipeError as error:
        if is_low_rank(folder, manifest):
            return _bare_recipe(manifest)
        message = f"the recipe that it was merged by cannot be read: {error.problems[0].message}"
        raise BundleError(Problem(str(folder), message, f"{_AGAIN} RECIPE")) from None
    if recipe.slices:
        message = "its layers are stacked from several models"
        raise BundleError(Problem(str(folder), message, f"{_AGAIN} RECIPE"))
    return recipe


def _parsed(folder: Path, manifest: Manifest) -> Recipe:
    record = manifest.recipe
    documents = compose_all(folder / record.name, record.text)
    data = dict(documents[0].data)
    if len(documents) == 1 and _names_a_folder(data.get("experts")):
        # What lies in that folder now is not what lay there then.
        data["experts"] = [{"name": source.name, "model": source.path} for source in manifest.experts]
    loaded = parse_document(documents[-1], data if len(documents) == 1 else documents[-1].data, record.changes)
    if loaded.problems:
        raise RecipeError(loaded.problems)
    return loaded.recipe


def _names_a_folder(experts: object) -> bool:
    entries = experts if isinstance(experts, list) else [experts]
    return any(isinstance(entry, dict) and "from" in entry for entry in entries)


def _bare_recipe(manifest: Manifest) -> Recipe:
    """Make a recipe of what the manifest says itself; units of assignment are told by their names."""
    kinds: tuple[Unit, ...] = ("layer", "block", "tensor")
    made = {kind: {unit_of(name, kind) for name in manifest.tensors} for kind in kinds}
    unit = next((kind for kind in kinds if set(manifest.assignment) <= made[kind]), "layer")
    experts = [{"name": source.name, "model": source.path} for source in manifest.experts]
    data = {"version": 1, "base": manifest.base.path, "experts": experts, "conflict": {"unit": unit}}
    return Recipe.model_validate(data)


def is_low_rank(folder: Path, manifest: Manifest) -> bool:
    """Whether the experts of a bundle are stored as pairs of small matrices, as adapters are."""
    files = [bundle_file(folder, file.name) for record in manifest.sparse for file in record.files]
    return any(spec.is_low_rank for file in files for spec in open_sparse_file(file).tensors.values())


def open_newcomer(
    folder: Path, manifest: Manifest, new: Newcomer, access: Access = ONLINE, run: Settings | None = None
) -> Plan:
    """Plan a newcomer alone, with the tensors of the bundle as they lie, each extracted as the bundle's recipe says.

    A full checkpoint is fitted to the bundle's own tensors; an adapter needs the base that it changes.
    Raises MediatorError for a model that does not fit.
    """
    run = run or Settings()
    old = recorded_recipe(folder, manifest)
    base = _base_of(folder, manifest, old, new, access)
    plan = plan_with_unseen_at(_loaded(old, base, new), access, run)
    if Path(base) != folder.absolute():
        _check_base(manifest, plan, run)
    told = set(base_notices(plan.loaded, plan.base, plan.experts))
    named = plan.loaded.recipe.model_copy(update={"base": manifest.base.path})
    notices = [notice for notice in plan.notices if notice not in told]
    notices += base_notices(replace(plan.loaded, recipe=named), plan.base, plan.experts)
    _check_adapters_base(manifest, plan, run)
    return replace(_as_stored(folder, manifest, plan), notices=tuple(notices))


def plan_with_unseen_at(loaded: LoadedRecipe, access: Access, run: Settings) -> Plan:
    """Make the plan and fetch what it needs; problems name the options of the command, not fields of a recipe."""
    try:
        plan = plan_with_unseen(loaded, access, run.progress)
        download_weights(plan, run.progress)
    except MediatorError as error:
        _raise_at(loaded, error)
    return plan


def _raise_at(loaded: LoadedRecipe, error: MediatorError) -> NoReturn:
    places = {loaded.place("experts", 0, "model"): "--model", loaded.place("base"): "--base"}
    problems = []
    for problem in error.problems:
        place = problem.place
        for written, option in places.items():
            place = place.replace(written, option)
        problems.append(replace(problem, place=place))
    kind = CheckpointError if isinstance(error, RecipeError) else type(error)
    raise kind(problems) from None


def _loaded(old: Recipe, base: str, new: Newcomer) -> LoadedRecipe:
    """Make a recipe of the newcomer alone; of the old one it keeps all that says how experts are stored."""
    overrides = tuple(
        each.model_copy(update={"average": None, "weights": None, "optional": True})
        for each in old.overrides
        if each.extract is not None
    )
    update: dict[str, Any] = {
        "base": base,
        "experts": (ExpertSpec(name=new.name, model=new.model),),
        "keep_base": old.keep_base,
        "align": None,
        "assign": AssignSpec(rule="all", candidates="all"),
        "average": AverageSpec(method="linear"),
        "overrides": overrides,
        "router": None,
        "tokenizer": "base",
        "tokens": {},
        "pad_tokens_to": None,
        "chat_template": None,
    }
    # Relative paths of the command start here.
    return LoadedRecipe(old.model_copy(update=update), Path.cwd() / "add-expert", "", {(): 0})


def _base_of(folder: Path, manifest: Manifest, old: Recipe, new: Newcomer, access: Access) -> str:
    """Choose what stands in for the base: the bundle itself, unless an adapter needs what it was trained on."""
    location = _location(new.model, access)
    if is_low_rank(folder, manifest):
        # Of the base only names and shapes are needed.
        return str(folder.absolute())
    if not is_adapter(location):
        if new.base is not None:
            message = "is for adapters; a full checkpoint is compared with the bundle itself"
            raise BundleError(Problem("--base", message, "leave it out"))
        return str(folder.absolute())
    if new.base is not None:
        return new.base
    routed_as_base = manifest.extract is not None and manifest.extract.dense == "base" and old.output.dtype == "base"
    if routed_as_base:
        # Where units are routed the bundle has the base's own tensors.
        return str(folder.absolute())
    return _recorded_base(folder, manifest)


def _location(model: str, access: Access) -> Path:
    try:
        return find_location(model, Path(model).absolute(), access).folder
    except CheckpointError as error:
        raise CheckpointError([replace(p, place=f"--model: {p.place}") for p in error.problems]) from None


def _recorded_base(folder: Path, manifest: Manifest) -> str:
    """Find the base that the bundle was merged from: at its path from here or from the bundle, else on the Hub."""
    record = manifest.base
    for path in (Path(record.path), folder / record.path):
        if path.is_dir():
            return str(path.absolute())
    if is_hub_id(record.path):
        return record.path if "@" in record.path or not record.revision else f"{record.path}@{record.revision}"
    message = f"an adapter is added to its base, and {record.path}, which the bundle notes, is not here"
    raise BundleError(Problem("--model", message, "give --base DIR"))


def _check_base(manifest: Manifest, plan: Plan, run: Settings) -> None:
    """Raise CheckpointError where the base's files are not those that the bundle was merged from."""
    alone = replace(plan, experts=())
    if changed_sources({"base": manifest.base.files}, source_files(alone, Digests(), run)):
        message = f"{plan.base.path} is not the base that the bundle was merged from: its weight files differ"
        raise CheckpointError(Problem("--base", message, f"give the base of then, {manifest.base.path}"))


def _check_adapters_base(manifest: Manifest, plan: Plan, run: Settings) -> None:
    """Raise CheckpointError for an adapter whose base lies here and has other numbers than the bundle's."""
    source = plan.experts[0].source
    if not isinstance(source, Adapter) or not source.base_name or not Path(source.base_name).is_dir():
        return
    try:
        own = open_checkpoint(Path(source.base_name).absolute())
    except CheckpointError:
        return
    alone = replace(plan, base=own, experts=())
    if changed_sources({"base": manifest.base.files}, source_files(alone, Digests(), run)):
        message = f"the adapter was trained on {source.base_name}, which is another model than the bundle's base"
        hint = f"train it on {manifest.base.path}, or add the merged model: PEFT's merge_and_unload"
        raise CheckpointError(Problem("--model", message, hint))


def _as_stored(folder: Path, manifest: Manifest, plan: Plan) -> Plan:
    """Give the plan's tensors the dtypes of the bundle; raise BundleError where their shapes are others."""
    made = {tensor.name: tensor for tensor in plan.tensors}
    problems = list(_misfits(folder, manifest, {name: tensor.shape for name, tensor in made.items()}))
    if problems:
        raise BundleError(problems)
    known = [tensor for tensor in plan.tensors if tensor.name in manifest.tensors]
    return replace(plan, tensors=tuple(replace(t, dtype=manifest.tensors[t.name].dtype) for t in known))


def _misfits(folder: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Problem]:
    hint = f"{_AGAIN} RECIPE"
    if missing := [name for name in manifest.tensors if name not in shapes]:
        yield Problem("--model", f"gives no tensor {some_names(missing)}, which the bundle has", hint)
    for name, record in manifest.tensors.items():
        if name in shapes and shapes[name] != record.shape:
            message = f"shape {list(shapes[name])}, the bundle has {list(record.shape)}: was its vocabulary joined?"
            yield Problem(f"{folder}: {name}", message, hint)
            return


def same_model(manifest: Manifest, source: SourceRecord) -> str | None:
    """Name an expert of the bundle that was made of the same files; None where there is none."""
    new = {"x": source.files}
    return next((old.name for old in manifest.experts if not changed_sources({"x": old.files}, new)), None)
