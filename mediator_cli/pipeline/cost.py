"""What a merge does, as amounts of few kinds of steps: the part of a forecast that no machine has a say in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.engine.matrices import view_of
from mediator_cli.engine.statistics import group_by_method
from mediator_cli.pipeline.conflicts import conflict_passes, denoise_name
from mediator_cli.plan.factors import keeps_factors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.engine.statistics import Group
    from mediator_cli.plan.model import ExpertSource, Plan, ResolvedExtract, TensorPlan

Kind = Literal["conflict", "statistics", "average", "matrix", "copy", "extract", "pass", "read", "adapter", "digest"]
Stage = Literal["start", "survey", "merge", "digest", "publish"]
STAGES: tuple[Stage, ...] = ("start", "survey", "merge", "digest", "publish")
USUAL = "BF16"
"""The dtype on which steps are measured; what other dtypes take more is a task of its own."""


@dataclass(frozen=True)
class Step:
    """One kind of work: `what` names all that changes its cost, over n experts; `subject` is what it is done by.

    `read`, `adapter`, `pass`: slabs of one source, of base + adapter, of n deltas. `statistics`, `average`, `copy`:
    what finds a method's facts over the model, and what writes dense tensors. `matrix` is what a method does with
    whole matrices: it counts entries times the shorter side. `digest` counts bytes, all other steps elements.
    """

    kind: Kind
    what: str
    n: int = 1
    subject: Any = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """A text that is the same for the same work."""
        return f"{self.kind} {self.what} n={self.n}"


@dataclass(frozen=True)
class Task:
    """How much of a step a stage does: elements, and the tensors in which they lie; below zero for what is shared.

    The tensors of a `matrix` step are counted by their entries.
    """

    stage: Stage
    step: Step
    elements: float
    tensors: float = 0


def read_step(dtype: str) -> Step:
    """Give the step that reads one source of a dtype."""
    return Step("read", dtype)


DIGEST = Step("digest", "bytes")


def list_tasks(plan: Plan, routed: float) -> tuple[Task, ...]:
    """List all that a merge does where `routed` elements of each expert become sparse experts."""
    return (*_survey(plan), *_average(plan), *_extract(plan, routed), *_digests(plan))


def list_steps(plan: Plan) -> tuple[Step, ...]:
    """List the different steps that any merge of a plan may take, each once."""
    return tuple(dict.fromkeys(task.step for task in list_tasks(plan, _routable(plan))))


def _routable(plan: Plan) -> int:
    return sum(tensor.size for tensor in plan.tensors if tensor.can_be_routed)


def measures_conflict(plan: Plan) -> bool:
    """Whether a merge of a plan measures conflict, unless a report is given.

    Of adapters that are kept as they are only for a rule that asks for scores: their deltas are made for nothing else.
    """
    rule = plan.loaded.recipe.assign.rule
    if keeps_factors(plan.loaded) and rule in ("all", "listed"):
        return False
    return rule != "none" and len(plan.experts) > 1


def _survey(plan: Plan) -> Iterator[Task]:
    """Measure conflict and find facts over the model; passes that both need are made once."""
    n, passes = len(plan.experts), _conflict_passes(plan)
    if passes:
        yield from _conflict(plan, passes)
    for group in _over_model(plan):
        step = Step("statistics", group.method.key, n, group.method)
        yield Task("survey", step, _size(group.tensors), len(group.tensors))
        yield from _matrices("survey", group, n, group.whole_passes())
        yield from _other_rows(plan, "survey", group.passes() * _size(group.tensors))
    if shared := _shared(plan):
        yield Task("survey", Step("pass", "delta", n), -shared)
        yield from _other_rows(plan, "survey", -shared)


def _over_model(plan: Plan) -> list[Group]:
    return [group for group in group_by_method(plan.tensors) if group.spans_model]


def _conflict_passes(plan: Plan) -> int:
    return conflict_passes(plan.loaded.recipe.conflict.denoise) if measures_conflict(plan) else 0


def _shared(plan: Plan) -> int:
    """Count the elements that conflict and facts over the model read in common, all passes together."""
    passes = _conflict_passes(plan)
    groups = [group for group in _over_model(plan) if group.method.space == "delta"]
    return sum(min(passes, group.passes()) * _size(group.tensors) for group in groups)


def survey_passes(plan: Plan) -> float:
    """Count how often all sources are read before the first tensor is merged."""
    ranked = sum(group.passes() * _size(group.tensors) for group in _over_model(plan))
    return conflict_share(plan) + (ranked - _shared(plan)) / max(1, _size(plan.tensors))


def conflict_share(plan: Plan) -> float:
    """Count how often all sources are read to measure conflict."""
    return _conflict_passes(plan) * _size(_merged(plan)) / max(1, _size(plan.tensors))


def merge_passes(plan: Plan) -> float:
    """Count how often all sources are read to write the dense tensors."""
    groups = [group for group in group_by_method(plan.tensors) if not group.spans_model]
    ranked = sum(group.passes() * _size(group.tensors) for group in groups)
    return 1 + ranked / max(1, _size(plan.tensors))


def _merged(plan: Plan) -> list[TensorPlan]:
    return [tensor for tensor in plan.tensors if tensor.average is not None and tensor.size]


def _conflict(plan: Plan, passes: int) -> Iterator[Task]:
    denoise = plan.loaded.recipe.conflict.denoise
    merged = _merged(plan)
    step = Step("conflict", denoise_name(denoise).split()[0], len(plan.experts), denoise)
    yield Task("survey", step, _size(merged), len(merged))
    yield from _other_rows(plan, "survey", passes * _size(merged))


def _average(plan: Plan) -> Iterator[Task]:
    """Write the dense tensors, with what a method has to know of each before."""
    for group in group_by_method(plan.tensors):
        n = len(group.tensors[0].weights)
        step, size = Step("average", group.method.key, n, group.method), _size(group.tensors)
        yield Task("merge", step, size, len(group.tensors))
        yield from _matrices("merge", group, n, 1 if group.spans_model else 1 + group.whole_passes())
        passes = 1 if group.spans_model else 1 + group.passes()
        yield from _other_rows(plan, "merge", passes * size)
    copied = [tensor for tensor in plan.tensors if tensor.average is None]
    if copied:
        yield Task("merge", Step("copy", USUAL), _size(copied), len(copied))
    for dtype in dict.fromkeys(tensor.dtype for tensor in plan.tensors if tensor.dtype in FLOAT_DTYPES):
        if dtype != USUAL:
            size = _size([tensor for tensor in plan.tensors if tensor.dtype == dtype])
            yield Task("merge", Step("copy", dtype), size)
            yield Task("merge", Step("copy", USUAL), -size)


def _matrices(stage: Stage, group: Group, n: int, times: int) -> Iterator[Task]:
    """Count what a method does with whole matrices; singular values take entries times the shorter side."""
    whole = [tensor for tensor in group.tensors if view_of(tensor) != "elements"]
    if whole and times:
        step = Step("matrix", group.method.key, n, group.method)
        work = sum(tensor.size * min(tensor.shape[-2:]) for tensor in whole)
        yield Task(stage, step, times * work, times * _size(whole))


def _extract(plan: Plan, routed: float) -> Iterator[Task]:
    """Extract sparse experts, the routed amount shared among tensors by their size; copied factors take no time."""
    members = [tensor for tensor in plan.tensors if tensor.can_be_routed and tensor.size]
    share, n = routed / max(1, _size(members)), len(plan.experts)
    for extract in dict.fromkeys(tensor.extract for tensor in members if tensor.extract.mode != "factors"):
        some = [tensor for tensor in members if tensor.extract == extract]
        amount = share * n * _size(some)
        yield Task("merge", Step("extract", _words(extract), 1, extract), amount, share * n * len(some))
        yield from _other_experts(plan, "merge", _passes_of(extract) * share * _size(some))


def extract_passes(plan: Plan) -> float:
    """Count how often each expert, and the dense tensors with it, are read to extract it: a mean over what may be."""
    members = [tensor for tensor in plan.tensors if tensor.can_be_routed]
    return sum(_passes_of(tensor.extract) * tensor.size for tensor in members) / max(1, _size(members))


def _passes_of(extract: ResolvedExtract) -> int:
    if extract.mode == "factors":
        return 0
    if extract.mode != "sparse":
        return 1 + (extract.mode in ("emr", "basis"))
    ranks = extract.density != 1 and extract.select != "random"
    return 2 + ranks + 3 * (extract.values == "int8") + (extract.over == "model")


def _words(extract: ResolvedExtract) -> str:
    if extract.mode != "sparse":
        return f"{extract.mode} of {extract.n_shared} arrays as {extract.values}"
    return f"{extract.select} {extract.density:g} over {extract.over} as {extract.values}"


def _digests(plan: Plan) -> Iterator[Task]:
    """Digest the sources as they pass by for the first time."""
    late = passed_over(plan)
    yield Task("survey" if survey_passes(plan) else "merge", DIGEST, sum(source_bytes(plan).values()) - late)
    yield Task("digest", DIGEST, late)


def passed_over(plan: Plan) -> int:
    """Count the bytes of sources that no stage reads in whole blocks: what adapters are made of."""
    return sum(source_bytes(plan)[expert.name] for expert in plan.experts if expert.kind == "lora")


def source_bytes(plan: Plan) -> dict[str, int]:
    """Count the bytes of base and experts as they are stored, by name; with an expert's, its second moments."""
    sources = {"base": plan.base.tensors.values(), **{expert.name: expert.infos for expert in plan.experts}}
    return {name: sum(info.n_bytes for info in infos) for name, infos in sources.items()}


def _other_rows(plan: Plan, stage: Stage, elements: float) -> Iterator[Task]:
    """Add what it takes to read base and experts so many times where they are not stored in the usual dtype."""
    yield from _differences(stage, _rows(plan.base.tensors.values()), elements)
    yield from _other_experts(plan, stage, elements)


def _other_experts(plan: Plan, stage: Stage, elements: float) -> Iterator[Task]:
    for expert in plan.experts:
        yield from _differences(stage, _expert_rows(plan, expert), elements)


def _differences(stage: Stage, shares: dict[Step, float], elements: float) -> Iterator[Task]:
    if set(shares) != {read_step(USUAL)}:
        yield from (Task(stage, step, share * elements) for step, share in shares.items())
        yield Task(stage, read_step(USUAL), -elements)


def _rows(infos: Iterable[TensorInfo]) -> dict[Step, float]:
    """Share the elements of one source among the steps that read them."""
    sizes: Counter[str] = Counter()
    for info in infos:
        sizes[info.dtype if info.dtype in FLOAT_DTYPES else USUAL] += info.size
    total = max(1, sum(sizes.values()))
    return {read_step(dtype): size / total for dtype, size in sizes.items()} or {read_step(USUAL): 1.0}


def _expert_rows(plan: Plan, expert: ExpertSource) -> dict[Step, float]:
    if not isinstance(expert.source, Adapter):
        return _rows(expert.source.tensors.values())
    total = max(1, sum(info.size for info in plan.base.tensors.values()))
    shares = dict(_rows(plan.base.tensors.values()))
    for change in expert.source.changes.values():
        for product in change.products:
            step = Step("adapter", f"rank {product.left.shape[1]}", 1, product.left.shape[1])
            shares[step] = shares.get(step, 0.0) + product.n_rows * product.n_columns / total
    return shares


def _size(tensors: Sequence[TensorPlan]) -> int:
    return sum(tensor.size for tensor in tensors)
