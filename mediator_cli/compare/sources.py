"""From a recipe to a library: base and experts opened, checked, and their factors read; no model is loaded yet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.factors import as_delta
from mediator_cli.checkpoint.adapter.factors import not_factors, read_factors
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.digest import Digests
from mediator_cli.compare.bases import other_bases
from mediator_cli.errors import CheckpointError, Problem, some_names
from mediator_cli.pipeline.download import download, download_weights, far_files_of
from mediator_cli.pipeline.extract_lora import nearest_factors
from mediator_cli.pipeline.sources import source_files
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import LoadedRecipe
from mediator_cli.recipe.schema import Recipe
from mediator_cli.strategies.library import Library

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mediator_cli.bundle.record import SourceFile
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.kernels.factors import Factors
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan
    from mediator_cli.recipe.compare import LoadedCompare


@dataclass(frozen=True, eq=False)
class Sources:
    """Base and experts of a comparison: the plan that opened them, the factors, and the digests of all files.

    `notices` are worth knowing and stop nothing.
    """

    plan: Plan
    factors: Mapping[str, Mapping[str, Factors]]
    files: Mapping[str, tuple[SourceFile, ...]]
    digest: str
    notices: tuple[str, ...]

    def library(self) -> Library:
        """Give the factors as what strategies work on."""
        experts = {name: {t: as_delta(each) for t, each in own.items()} for name, own in self.factors.items()}
        shapes = {tensor: each.shape for own in self.factors.values() for tensor, each in own.items()}
        scalings = {name: {t: each.scaling for t, each in own.items()} for name, own in self.factors.items()}
        return Library(self.plan.base.path, experts, shapes, scalings)


def plan_sources(loaded: LoadedCompare, access: Access) -> Plan:
    """Open base and experts and fit them together, from headers alone.

    Raises MediatorError with all problems: what is missing, does not fit, or is no plain adapter.
    """
    plan = make_plan(_as_merge(loaded), access)
    if problems := list(_unfit(loaded, plan)):
        raise CheckpointError(problems)
    return plan


def _as_merge(loaded: LoadedCompare) -> LoadedRecipe:
    """Give a recipe that merges the same experts: what fits together there does here."""
    data = {
        "version": 1,
        "base": loaded.recipe.base,
        "experts": [{"name": each.name, "model": each.model} for each in loaded.recipe.experts],
        "assign": {"rule": "none"},
        "average": {"method": "task_arithmetic"},
        "seed": loaded.recipe.seed,
    }
    recipe = Recipe.model_validate(data)
    return LoadedRecipe(recipe, loaded.path, loaded.text, loaded.lines, loaded.changes, written=loaded.written)


def _unfit(loaded: LoadedCompare, plan: Plan) -> Iterator[Problem]:
    for index, (spec, expert) in enumerate(zip(loaded.recipe.experts, plan.experts, strict=True)):
        place = loaded.place("experts", index, "model")
        if isinstance(expert.source, Adapter):
            for problem in not_factors(expert.source):
                yield replace(problem, place=f"{place}: {problem.place}")
        elif spec.rank is None:
            hint = "add `rank: 16` to it: then its nearest adapter of that rank stands for it"
            yield Problem(place, f"{expert.name} is a full checkpoint, and strategies work on adapters", hint)


def open_sources(loaded: LoadedCompare, plan: Plan, run: Settings) -> Sources:
    """Read the factors of all experts, and compare the base with those that adapters say they were trained on.

    Full checkpoints are taken as their nearest adapters. Raises CheckpointError with all problems.
    """
    _fetch(plan, run)
    files = source_files(plan, Digests(), run)
    problems = list(other_bases(loaded, plan, files["base"], run))
    factors: dict[str, Mapping[str, Factors]] = {}
    notices: list[str] = []
    for index, (spec, expert) in enumerate(zip(loaded.recipe.experts, plan.experts, strict=True)):
        try:
            if isinstance(expert.source, Adapter):
                factors[expert.name] = read_factors(expert.source)
            else:
                factors[expert.name], kept = nearest_factors(plan, index, spec.rank or 0, run)
                said = f"{expert.name} is a full checkpoint, taken as its nearest adapter of rank {spec.rank}"
                notices.append(f"{said}, which holds {kept:.1%} of its change")
        except CheckpointError as error:
            place = loaded.place("experts", index, "model")
            problems += [replace(each, place=f"{place}: {each.place}".rstrip(": ")) for each in error.problems]
    if problems:
        raise CheckpointError(problems)
    digests = {name: digest_factors(own) for name, own in factors.items()}
    notices += _twins(digests)
    whole = hashlib.sha256("".join(f"{n} {d}\n" for n, d in digests.items()).encode()).hexdigest()
    return Sources(plan, factors, files, whole, (*plan.notices, *notices))


def _fetch(plan: Plan, run: Settings) -> None:
    download(tuple(file for files in far_files_of(plan).values() for file in files), run.progress)
    download_weights(plan, run.progress)


def digest_factors(factors: Mapping[str, Factors]) -> str:
    """Digest what an expert adds: names, factors and scalings."""
    found = hashlib.sha256()
    for name in sorted(factors):
        own = factors[name]
        found.update(f"{name} {own.a.shape} {own.b.shape} {own.scaling!r}\n".encode())
        found.update(np.ascontiguousarray(own.a).tobytes())
        found.update(np.ascontiguousarray(own.b).tobytes())
    return found.hexdigest()


def _twins(digests: Mapping[str, str]) -> Iterator[str]:
    """Tell of experts that are the same adapter."""
    alike: dict[str, list[str]] = {}
    for name, digest in digests.items():
        alike.setdefault(digest, []).append(name)
    for names in alike.values():
        if len(names) > 1:
            yield f"{some_names(names, len(names))} are the same adapter: it counts {len(names)} times"
