"""Look at a base and its experts, and choose a recipe for them that merges as it is.

Every draft is planned before it is written, so what is wrong with a source is said as `validate` would say it, and
the numbers in its comments are those of `mediator plan`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.hub.find import ONLINE, is_hub_id
from mediator_cli.checkpoint.remote.url import is_url
from mediator_cli.errors import MediatorError, OutputError, Problem, RecipeError, did_you_mean
from mediator_cli.pipeline.draft.folders import names_in_folders
from mediator_cli.pipeline.draft.names import expert_names
from mediator_cli.pipeline.estimate import DifferenceReport, describe_plan
from mediator_cli.pipeline.routable import check_routing
from mediator_cli.plan.make import make_plan
from mediator_cli.plan.overrides import resolve_extract
from mediator_cli.plan.tokens.tensors import vocabulary_size
from mediator_cli.recipe.extract import ExtractSpec
from mediator_cli.recipe.load import parse_partly

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import ExpertSource, Plan
    from mediator_cli.recipe.extract import ValueCodec

DENSITIES: tuple[tuple[float, ValueCodec], ...] = ((0.2, "sign"), (1.0, "bf16"))
"""Densities beside the default whose price a draft tells: larger sparse experts, and every expert bit for bit."""


@dataclass(frozen=True)
class Asked:
    """What `init` was told: sources and prompt files as written, where the recipe goes.

    `folders` are those that the experts were found in, "" for one that was named by itself; see `each_expert`.
    """

    base: str
    experts: tuple[str, ...]
    recipe: Path
    prompts: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class DraftExpert:
    """One expert as the recipe will name it, or in `folder`, if the recipe names that instead."""

    name: str
    model: str
    prompts: str | None = None
    folder: str = ""


@dataclass(frozen=True)
class Choices:
    """The fields of a draft; `why_none` says what stands in the way of routing, empty where nothing does."""

    base: str
    experts: tuple[DraftExpert, ...]
    tokenizer: str = "base"
    why_none: str = ""
    output: str = "./bundle"

    @property
    def rule(self) -> Literal["none", "all"]:
        """Which rule of assignment the draft has."""
        return "none" if self.why_none else "all"

    def fields(self) -> dict[str, object]:
        """Give the recipe that these choices make."""
        experts = [
            {"name": e.name, "model": e.model} | ({"prompts": e.prompts} if e.prompts else {}) for e in self.experts
        ]
        assign = {"rule": "none"} if self.why_none else {"rule": "all", "candidates": "layers"}
        return {
            "version": 1, "base": self.base, "experts": experts, "assign": assign, "average": {"method": "linear"},
            "tokenizer": self.tokenizer, "output": {"path": self.output},
        }  # fmt: skip


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class SourceFacts(_Facts):
    """What headers and config say about one source; `rank` is an adapter's."""

    name: str
    source: str
    kind: Literal["full", "lora"]
    rank: int | None
    model_type: str | None
    n_tensors: int
    n_bytes: int
    dtype: str
    n_tokens: int | None


class Price(_Facts):
    """Bytes of all sparse experts together at one density."""

    density: float
    values: str
    sparse_bytes: int


class DraftReport(_Facts):
    """What was found, what was chosen, and what it costs; sizes in bytes."""

    recipe: str
    base: SourceFacts
    experts: tuple[SourceFacts, ...]
    n_layers: int
    rule: str
    why_none: str
    tokenizer: str
    download_bytes: int
    read_bytes: int
    dense_bytes: int
    sparse_bytes: int
    peak_memory: int
    prices: tuple[Price, ...]
    differences: tuple[DifferenceReport, ...]
    notices: tuple[str, ...]
    missing_prompts: tuple[str, ...]


def check_target(recipe: Path, *, force: bool) -> None:
    """Raise OutputError where a draft may not be written; never touches the disk."""
    if not recipe.absolute().parent.is_dir():
        raise OutputError(Problem(str(recipe), "no such folder", "create it first, or choose another place with -o"))
    if recipe.is_dir():
        raise OutputError(Problem(str(recipe), "is a folder", "give the name of a file with -o"))
    if recipe.exists() and not force:
        raise OutputError(Problem(str(recipe), "exists already", "overwrite it with --force, or choose another -o"))


def draft(asked: Asked, settings: Settings, access: Access = ONLINE) -> tuple[Choices, DraftReport]:
    """Look at all sources and choose; raises MediatorError with every problem of all of them."""
    choices = first_choices(asked)
    plan = _plan(asked, choices, access)
    if plan.vocabulary and (united := _united(asked, choices, access)):
        choices, plan = united
    try:
        plan = check_routing(plan)
    except RecipeError as error:
        choices = replace(choices, why_none=error.problems[0].message)
        plan = _plan(asked, choices, access)
    return choices, _report(asked, choices, plan, settings)


def _united(asked: Asked, choices: Choices, access: Access) -> tuple[Choices, Plan] | None:
    """Choose the union of all tokens where it has more than the base's and can be had."""
    union = replace(choices, tokenizer="union")
    try:
        plan = _plan(asked, union, access)
    except RecipeError:
        return None
    return (union, plan) if plan.union is not None else None


def first_choices(asked: Asked) -> Choices:
    """Choose what needs no look at the sources: names and paths."""
    names = expert_names(_place(asked.base), [_place(source) for source in asked.experts])
    folders = asked.folders or ("",) * len(names)
    if own := names_in_folders(names, asked.experts, folders):
        names = own
    prompts = _prompts(asked, names)
    # A folder gives all its experts the same fields.
    single = {folder for name, folder in zip(names, folders, strict=True) if name in prompts or not own}
    experts = (
        DraftExpert(name, _written(asked, source), prompts.get(name), _folder(asked, folder, single))
        for name, source, folder in zip(names, asked.experts, folders, strict=True)
    )
    return Choices(_written(asked, asked.base), tuple(experts))


def _folder(asked: Asked, folder: str, single: set[str]) -> str:
    return _written(asked, folder) if folder and folder not in single else ""


def _is_hub_id(source: str) -> bool:
    return not Path(source).exists() and is_hub_id(source)


def _place(source: str) -> PurePath:
    """Give the path that an expert is named after; a source without a name of its own has its full path."""
    if _is_hub_id(source):
        return PurePath(source.split("@")[0])
    path = _anchored(source) if PurePath(source).name in ("", "..") else PurePath(source)
    return path.with_suffix("") if path.suffix == ".gguf" else path


def _written(asked: Asked, source: str) -> str:
    """Write a source as the recipe must: Hub ids and full paths as given, others from the recipe's folder."""
    if is_url(source):
        return source
    if not _is_hub_id(source):
        return source if Path(source).is_absolute() else _from_recipe(asked.recipe, source)
    if (folder := asked.recipe.parent / source).exists():
        message = f"is on the Hub, but {folder} beside the recipe would be taken"
        raise RecipeError(Problem(source, message, "choose another place for the recipe with -o"))
    return source


def _from_recipe(recipe: Path, path: str) -> str:
    relative = os.path.relpath(_anchored(path), recipe.absolute().parent.resolve())
    return relative if relative.startswith("..") else f"./{relative}"


def _anchored(path: str) -> Path:
    """Give the full path, with links followed in folders: `..` behind a linked one leads elsewhere than it reads."""
    plain = Path(path)
    return plain.resolve() if plain.name in ("", "..") else plain.parent.resolve() / plain.name


def _prompts(asked: Asked, names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for text in asked.prompts:
        name, separator, file = text.partition("=")
        place = f"--prompts {text}"
        if not separator or not file:
            problems.append(Problem(place, "is not NAME=FILE", f"write for example --prompts {names[0]}=train.jsonl"))
        elif name not in names:
            problems.append(Problem(place, f"no expert is called '{name}'", did_you_mean(name, names)))
        elif name in found:
            problems.append(Problem(place, f"{name} has prompts already", "put all into one file"))
        else:
            found[name] = file if Path(file).is_absolute() else _from_recipe(asked.recipe, file)
    if problems:
        raise RecipeError(problems)
    return found


def _plan(asked: Asked, choices: Choices, access: Access) -> Plan:
    try:
        return make_plan(parse_partly(asked.recipe, yaml.safe_dump(choices.fields())), access)
    except MediatorError as error:
        raise RecipeError([_as_asked(asked, problem) for problem in error.problems]) from None


def _as_asked(asked: Asked, problem: Problem) -> Problem:
    """Name the source as the user did, for there is no recipe yet that a line could be in."""
    found = re.match(re.escape(str(asked.recipe)) + r":\d+ ?([\w.\[\]]*)(?:: (.*))?$", problem.place, re.DOTALL)
    if found is None:
        return problem
    field, rest = found[1], found[2]
    number = re.match(r"experts\[(\d+)\]", field)
    word = asked.base if field == "base" else asked.experts[int(number[1])] if number else field
    is_missing = problem.message == "no such folder"
    hint = "check the path, or name a repository of the Hub: org/name" if is_missing else problem.hint
    return Problem(word if is_missing else rest or word, problem.message, hint)


def _report(asked: Asked, choices: Choices, plan: Plan, settings: Settings) -> DraftReport:
    costs = describe_plan(plan, None, settings)
    sources = zip(plan.experts, asked.experts, strict=True)
    return DraftReport(
        recipe=str(asked.recipe),
        base=_source_facts("base", asked.base, plan.base.tensors, plan.base.config),
        experts=tuple(_expert_facts(expert, source) for expert, source in sources),
        n_layers=costs.n_layers,
        rule=choices.rule,
        why_none=choices.why_none,
        tokenizer=choices.tokenizer,
        download_bytes=sum(costs.download_bytes.values()),
        read_bytes=sum(costs.read_bytes.values()),
        dense_bytes=costs.dense_bytes,
        sparse_bytes=costs.sparse_bytes[1],
        peak_memory=costs.peak_memory,
        prices=() if choices.why_none else tuple(_price(plan, settings, *which) for which in DENSITIES),
        differences=costs.differences,
        notices=plan.notices,
        missing_prompts=tuple(expert.name for expert in choices.experts if expert.prompts is None),
    )


def _price(plan: Plan, settings: Settings, density: float, values: ValueCodec) -> Price:
    extract = resolve_extract(ExtractSpec(density=density, values=values))
    other = replace(plan, tensors=tuple(replace(tensor, extract=extract) for tensor in plan.tensors))
    return Price(density=density, values=values, sparse_bytes=describe_plan(other, None, settings).sparse_bytes[1])


def _expert_facts(expert: ExpertSource, source: str) -> SourceFacts:
    if expert.kind == "full":
        config = getattr(expert.source, "config", {})
        return _source_facts(expert.name, source, expert.tensors, config)
    rank = read_json(expert.source.path / "adapter_config.json").get("r")
    facts = _source_facts(expert.name, source, expert.tensors, {})
    return facts.model_copy(update={"kind": "lora", "rank": rank if isinstance(rank, int) else None})


def _source_facts(
    name: str, source: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, object]
) -> SourceFacts:
    weights: Counter[str] = Counter()
    for info in tensors.values():
        weights[info.dtype] += info.n_bytes
    model_type = config.get("model_type")
    return SourceFacts(
        name=name,
        source=source,
        kind="full",
        rank=None,
        model_type=model_type if isinstance(model_type, str) else None,
        n_tensors=len(tensors),
        n_bytes=sum(weights.values()),
        dtype=weights.most_common(1)[0][0] if weights else "",
        n_tokens=vocabulary_size(config),
    )
