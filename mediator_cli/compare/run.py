"""Build each variant of a recipe, score it on rows, and keep what was found."""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.hub.collections import collection_lister
from mediator_cli.checkpoint.hub.find import ONLINE
from mediator_cli.compare.key import model_key
from mediator_cli.compare.store import open_store, row_key, save
from mediator_cli.errors import CheckpointError, MediatorError, Problem
from mediator_cli.evaluate.models import Candidate, find_candidates, load_candidate
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.pipeline.download import download_weights
from mediator_cli.pipeline.merge import merge
from mediator_cli.pipeline.settings import Settings
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mediator_cli.bundle.router_record import PolicyRecord
    from mediator_cli.compare.store import Store
    from mediator_cli.compare.variants import Variant
    from mediator_cli.evaluate.score import RowScore
    from mediator_cli.evaluate.tasks import Row, Task
    from mediator_cli.plan.model import Plan
    from mediator_cli.runtime.combine import Combine

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what, and where results are kept; `say` is told what happens.

    `combine` says how several experts answer, None = as the recipe's router does.
    """

    recipe: Path
    tasks: tuple[Task, ...]
    work: Path
    changes: tuple[str, ...] = ()
    conflicts: Path | None = None
    settings: Settings = field(default_factory=Settings)
    say: Callable[[str], None] = lambda text: None
    combine: Combine | None = None


@dataclass(frozen=True)
class Outcome:
    """What one variant did: scores by task, bytes on disk, and seconds for an answer where rows were timed."""

    variant: Variant
    scores: Mapping[str, tuple[RowScore, ...]]
    n_bytes: int
    seconds: float


def compare(job: Comparison, variants: Sequence[Variant]) -> Iterator[Outcome]:
    """Score variants one by one, those of one bundle together; rows scored before are not scored again.

    Raises MediatorError with the variants that cannot be made or answered, before any is made.
    """
    groups = [[variants[at] for at in group] for group in _by_model(variants)]
    made = _plan_all(job, groups)
    n_done = 0
    for model, group in zip(made, groups, strict=True):
        yield from _score_group(model, group, n_done, len(variants))
        n_done += len(group)


def _by_model(variants: Sequence[Variant]) -> Iterable[list[int]]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for at, variant in enumerate(variants):
        groups.setdefault((variant.model, variant.changes), []).append(at)
    return groups.values()


def _plan_all(job: Comparison, groups: Sequence[Sequence[Variant]]) -> list[Made]:
    made: list[Made] = []
    problems: list[Problem] = []
    for group in groups:
        try:
            changes = (*job.changes, *group[0].changes)
            plan = make_plan(load_recipe(job.recipe, changes, collection_lister(ONLINE)))
        except MediatorError as error:
            problems += error.problems
            continue
        made.append(Made(job, plan, group[0], any(variant.answer == "router" for variant in group)))
        problems += _unanswerable(made[-1], group)
    if problems:
        raise CheckpointError(list(dict.fromkeys(problems)))
    for model in made:
        download_weights(model.plan, job.settings.progress)
    return made


def _unanswerable(made: Made, group: Sequence[Variant]) -> Iterator[Problem]:
    experts = [expert.name for expert in made.plan.experts]
    for variant in group:
        if variant.answer == "router" and made.plan.router is None:
            hint = "give every expert prompts and route some layers"
            yield Problem(variant.name, "the recipe fits no router", hint)
        unknown = [task.name for task in made.job.tasks if task.name not in experts]
        if variant.answer == "oracle" and unknown:
            message = f"no expert is named like the task '{unknown[0]}'"
            yield Problem(variant.name, message, f"the experts are {', '.join(experts)}")


def _score_group(made: Made, group: Sequence[Variant], n_done: int, n_all: int) -> Iterator[Outcome]:
    try:
        scores = []
        for at, variant in enumerate(group, n_done + 1):
            made.job.say(f"{at} of {n_all}: {variant.group}: {variant.name}")
            scores.append({task.name: tuple(_task_scores(made, variant, task)) for task in made.job.tasks})
        # Variants of one model share its timed rows, so their seconds are known when all are scored.
        yield from (_outcome(made, *pair) for pair in zip(group, scores, strict=True))
    finally:
        made.discard()


@dataclass
class Made:
    """A model that is built and opened only when a row has to be scored, and its stores."""

    job: Comparison
    plan: Plan
    variant: Variant
    needs_router: bool
    opened: dict[str, Loaded] = field(default_factory=dict)
    is_built: bool = False

    @cached_property
    def key(self) -> str:
        """Name the model by all that its scores depend on."""
        return model_key(self.plan, self.variant.model)

    @property
    def folder(self) -> Path:
        """Where the bundle is built."""
        return self.job.work / "bundles" / f"{self.key}{'-routed' if self.needs_router else ''}"

    def build(self) -> Path:
        """Merge the bundle, once; return its folder."""
        if not self.is_built:
            # What stands there was left by a process that was killed: it may be half deleted, or its router old.
            shutil.rmtree(self.folder, ignore_errors=True)
            plan = self.plan if self.needs_router else _without_prompts(self.plan)
            conflicts = self.job.conflicts if plan.loaded.recipe.assign.rule != "none" else None
            merge(plan, self.folder, conflicts, self.job.settings)
            self.is_built = True
        return self.folder

    def open(self, name: str) -> Loaded:
        """Open base, an expert's own model, or the bundle; only one is held at a time."""
        if name not in self.opened:
            self.close()
            self.opened[name] = self._load(name)
        return self.opened[name]

    def close(self) -> None:
        """Let go of the model that is held, with its memory."""
        if self.opened:
            self.opened.clear()
            gc.collect()

    def _load(self, name: str) -> Loaded:
        base = self.plan.base.path
        if self.variant.model == "bundle":
            return load_candidate(Candidate("", self.build(), "bundle"))
        folder = base
        if self.variant.model == "experts":
            folder = next(expert.source.path for expert in self.plan.experts if expert.name == name)
        (candidate,) = find_candidates([str(folder)], [], base)
        return load_candidate(candidate)

    def store(self, name: str = "") -> Store:
        """Open the scores of the model."""
        return open_store(self.job.work / "scores" / f"{self.key}{'-' + name if name else ''}.json")

    def discard(self) -> None:
        """Close the model and delete its bundle; its scores and its size stay known."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.is_built = False

    def n_bytes(self) -> int:
        """Count the bytes of the bundle's dense and sparse experts; known also after it is deleted."""
        file = self.job.work / "facts" / f"{self.key}.json"
        if not file.is_file():
            sizes = read_manifest(self.build()).sizes
            save(file, {"n_bytes": sizes.dense + sizes.sparse})
        return int(read_json(file)["n_bytes"])


def _without_prompts(plan: Plan) -> Plan:
    return replace(plan, experts=tuple(replace(expert, prompts=None) for expert in plan.experts), router=None)


def _outcome(made: Made, variant: Variant, scores: Mapping[str, tuple[RowScore, ...]]) -> Outcome:
    n_bytes = made.n_bytes() if variant.model == "bundle" else _source_bytes(made, variant)
    stores = [made.store(name) for name in _names(made, variant)]
    timed = sum(store.n_timed for store in stores)
    return Outcome(variant, scores, n_bytes, sum(store.seconds for store in stores) / timed if timed else float("nan"))


def _names(made: Made, variant: Variant) -> list[str]:
    if variant.model != "experts":
        return [""]
    experts = [expert.name for expert in made.plan.experts]
    return experts if variant.answer == "oracle" else [variant.answer]


def _source_bytes(made: Made, variant: Variant) -> int:
    """Count the bytes of the tensors that answer: of base or experts, an adapter's base once."""
    names = _names(made, variant)
    experts = [expert for expert in made.plan.experts if expert.name in names]
    parts = [expert.tensors for expert in experts]
    if not experts or any(expert.kind == "lora" for expert in experts):
        parts.append(made.plan.base.tensors)
    return sum(info.n_bytes for tensors in parts for info in tensors.values())


def _task_scores(made: Made, variant: Variant, task: Task) -> Iterator[RowScore]:
    experts = [expert.name for expert in made.plan.experts]
    name = task.name if variant.answer == "oracle" else variant.answer
    if variant.model == "experts":
        yield from _scored(made, name, [(None, row) for row in task.rows])
    elif variant.model == "base":
        yield from _scored(made, "", [(None, row) for row in task.rows])
    elif variant.answer == "router":
        routed = list(zip(_routed(made, task, variant.policy), task.rows, strict=True))
        yield from _scored(made, "", routed, _combination(made, variant))
    else:
        mixture = {name: 1.0} if name in experts else {}
        yield from _scored(made, "", [(mixture, row) for row in task.rows])


def _combination(made: Made, variant: Variant) -> Combine:
    """Say how several experts answer: as the variant says, or the comparison, or the recipe's router."""
    router = made.plan.router
    planned: Combine = router.policy.combine if router is not None else "parameters"
    return variant.combine or made.job.combine or planned


def _scored(
    made: Made,
    name: str,
    wanted: Sequence[tuple[Mapping[str, float] | None, Row]],
    combine: Combine = "parameters",
) -> Iterator[RowScore]:
    store = made.store(name)
    groups: dict[str, tuple[Mapping[str, float] | None, list[Row]]] = {}
    for mixture, row in wanted:
        groups.setdefault(_mixture_key(mixture, combine), (mixture, []))[1].append(row)
    for key, (mixture, rows) in groups.items():
        missing = list({row_key(row): row for row in store.missing(key, rows)}.values())
        if missing:
            model, tokenizer = made.open(name)
            _set_combination(model, combine)
            started = time.monotonic()
            found = score_rows(model, tokenizer, missing, ScoreSettings(mixture=_asked(mixture)))
            store.put(key, missing, found, time.monotonic() - started)
    yield from (store.get(_mixture_key(mixture, combine), row) for mixture, row in wanted)


def _set_combination(model: PreTrainedModel, combine: Combine) -> None:
    from mediator_cli.runtime.model import RoutedModel

    if isinstance(model, RoutedModel):
        model.combine = combine


def _asked(mixture: Mapping[str, float] | None) -> str | Mapping[str, float] | None:
    return "dense" if mixture is not None and not mixture else mixture


def _mixture_key(mixture: Mapping[str, float] | None, combine: Combine) -> str:
    """Name who answers; where one model does, it is the same however several would be combined."""
    key = json.dumps(sorted(mixture.items()) if mixture is not None else None)
    is_one = mixture is None or not mixture or (len(mixture) == 1 and set(mixture.values()) == {1.0})
    return key if is_one or combine == "parameters" else f"{combine} {key}"


def _routed(made: Made, task: Task, policy: PolicyRecord | None) -> list[Mapping[str, float]]:
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.runtime.policy import mix
    from mediator_cli.runtime.tokens import prompt_tokens

    model, tokenizer = made.open("")
    if not isinstance(model, RoutedModel):
        raise TypeError(type(model).__name__)
    routing = model.route([prompt.ids for prompt in prompt_tokens(tokenizer, [row.prompt for row in task.rows])])
    weights = routing.weights
    if policy is not None:
        weights = mix(routing.probabilities, routing.is_outside, policy, routing.experts)
    return [{n: float(w) for n, w in zip(routing.experts, row, strict=True) if w} for row in weights]
