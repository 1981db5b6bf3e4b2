"""Build each variant of a recipe, score it on rows, and keep what was found."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.compare.store import open_store
from mediator_cli.evaluate.models import Candidate, find_candidates, load_candidate
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.pipeline.merge import Settings, merge
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mediator_cli.bundle.manifest import PolicyRecord
    from mediator_cli.compare.store import Store
    from mediator_cli.compare.variants import Variant
    from mediator_cli.evaluate.score import RowScore
    from mediator_cli.evaluate.tasks import Row, Task
    from mediator_cli.plan.model import Plan

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what, and where results are kept; `say` is told what happens."""

    recipe: Path
    tasks: tuple[Task, ...]
    work: Path
    changes: tuple[str, ...] = ()
    conflicts: Path | None = None
    settings: Settings = field(default_factory=Settings)
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Outcome:
    """What one variant did: scores by task, bytes on disk, and seconds for an answer where rows were timed."""

    variant: Variant
    scores: Mapping[str, tuple[RowScore, ...]]
    n_bytes: int
    seconds: float


def compare(job: Comparison, variants: Sequence[Variant]) -> Iterator[Outcome]:
    """Score variants one by one, those of one bundle together; rows scored before are not scored again."""
    done: dict[int, Outcome] = {}
    for group in _by_model(variants):
        for index, outcome in _score_group(job, [(at, variants[at]) for at in group]):
            done[index] = outcome
        yield from (done[at] for at in group)


def _by_model(variants: Sequence[Variant]) -> Iterable[list[int]]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for at, variant in enumerate(variants):
        groups.setdefault((variant.model, variant.changes), []).append(at)
    return groups.values()


def _score_group(job: Comparison, members: Sequence[tuple[int, Variant]]) -> Iterator[tuple[int, Outcome]]:
    first = members[0][1]
    plan = make_plan(load_recipe(job.recipe, (*job.changes, *first.changes)))
    needs_router = any(variant.answer == "router" for _, variant in members)
    made = Made(job, plan, first, needs_router)
    try:
        for at, variant in members:
            job.say(f"{variant.group}: {variant.name}")
            yield at, _score(made, variant)
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

    @property
    def key(self) -> str:
        """Name the model by recipe, changes and sources."""
        sources = [self.plan.base.path, *(expert.source.path for expert in self.plan.experts)]
        files = [
            (f.name, f.stat().st_size, f.stat().st_mtime_ns) for s in sources for f in sorted(s.glob("*.safetensors"))
        ]
        recipe = self.plan.loaded.recipe.model_dump_json(exclude={"output", "router"})
        text = json.dumps([self.variant.model, recipe if self.variant.model == "bundle" else "", files])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where the bundle is built."""
        return self.job.work / "bundles" / f"{self.key}{'-routed' if self.needs_router else ''}"

    def build(self) -> Path:
        """Merge the bundle unless it stands; return its folder."""
        if not self.folder.is_dir():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            plan = self.plan if self.needs_router else _without_prompts(self.plan)
            conflicts = self.job.conflicts if plan.loaded.recipe.assign.rule != "none" else None
            merge(plan, self.folder, conflicts, self.job.settings)
        return self.folder

    def open(self, name: str) -> Loaded:
        """Open base, an expert's own model, or the bundle; only one is held at a time."""
        if name not in self.opened:
            self.opened.clear()
            gc.collect()
            self.opened[name] = self._load(name)
        return self.opened[name]

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
        """Close the model and delete its bundle; its scores and facts stay."""
        self.opened.clear()
        gc.collect()
        shutil.rmtree(self.folder, ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """Return what stays known of a bundle after it is deleted: its size and, with a router, how rows are routed."""
        file = self.job.work / "facts" / f"{self.key}.json"
        if not file.is_file():
            manifest = read_manifest(self.build())
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"n_bytes": manifest.sizes.dense + manifest.sizes.sparse}), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _without_prompts(plan: Plan) -> Plan:
    return replace(plan, experts=tuple(replace(expert, prompts=None) for expert in plan.experts), router=None)


def _score(made: Made, variant: Variant) -> Outcome:
    scores = {task.name: tuple(_task_scores(made, variant, task)) for task in made.job.tasks}
    n_bytes = made.facts()["n_bytes"] if variant.model == "bundle" else _source_bytes(made.plan, variant)
    stores = [made.store(name) for name in _names(made, variant)]
    timed = sum(store.n_timed for store in stores)
    return Outcome(variant, scores, n_bytes, sum(store.seconds for store in stores) / timed if timed else float("nan"))


def _names(made: Made, variant: Variant) -> list[str]:
    if variant.model != "experts":
        return [""]
    experts = [expert.name for expert in made.plan.experts]
    return experts if variant.answer == "oracle" else [variant.answer]


def _source_bytes(plan: Plan, variant: Variant) -> int:
    one = sum(info.n_bytes for info in plan.base.tensors.values())
    return one if variant.model == "base" or variant.answer != "oracle" else one * len(plan.experts)


def _task_scores(made: Made, variant: Variant, task: Task) -> Iterator[RowScore]:
    experts = [expert.name for expert in made.plan.experts]
    name = task.name if variant.answer == "oracle" else variant.answer
    if variant.model == "experts":
        yield from _scored(made, name, [(None, row) for row in task.rows])
    elif variant.model == "base":
        yield from _scored(made, "", [(None, row) for row in task.rows])
    elif variant.answer == "router":
        yield from _scored(made, "", list(zip(_routed(made, task, variant.policy), task.rows, strict=True)))
    else:
        mixture = {name: 1.0} if name in experts else {}
        yield from _scored(made, "", [(mixture, row) for row in task.rows])


def _scored(made: Made, name: str, wanted: Sequence[tuple[Mapping[str, float] | None, Row]]) -> Iterator[RowScore]:
    store = made.store(name)
    groups: dict[str, tuple[Mapping[str, float] | None, list[Row]]] = {}
    for mixture, row in wanted:
        groups.setdefault(_mixture_key(mixture), (mixture, []))[1].append(row)
    for key, (mixture, rows) in groups.items():
        missing = list({id(row): row for row in store.missing(key, rows)}.values())
        if missing:
            model, tokenizer = made.open(name)
            started = time.monotonic()
            found = score_rows(model, tokenizer, missing, ScoreSettings(mixture=_asked(mixture)))
            store.put(key, missing, found, time.monotonic() - started)
    yield from (store.get(_mixture_key(mixture), row) for mixture, row in wanted)


def _asked(mixture: Mapping[str, float] | None) -> str | Mapping[str, float] | None:
    return "dense" if mixture is not None and not mixture else mixture


def _mixture_key(mixture: Mapping[str, float] | None) -> str:
    return json.dumps(sorted(mixture.items()) if mixture is not None else None)


def _routed(made: Made, task: Task, policy: PolicyRecord | None) -> list[Mapping[str, float]]:
    from mediator_cli.evaluate.tokens import prompt_tokens
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.runtime.policy import mix

    model, tokenizer = made.open("")
    if not isinstance(model, RoutedModel):
        raise TypeError(type(model).__name__)
    routing = model.route([prompt.ids for prompt in prompt_tokens(tokenizer, [row.prompt for row in task.rows])])
    weights = routing.weights
    if policy is not None:
        weights = mix(routing.probabilities, routing.is_outside, policy, routing.experts)
    return [{n: float(w) for n, w in zip(routing.experts, row, strict=True) if w} for row in weights]
