"""The controls of one recipe, and what has to be known to lay them out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.bundle.manifest import to_json
from mediator_cli.compare.variants import assignments, extractions, policies, references, routed, static_merges
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.pipeline.conflicts import scores_by_measure
from mediator_cli.pipeline.merge import analyze_conflicts
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_recipe
from mediator_cli.stages.assign import assign_units

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mediator_cli.compare.run import Comparison
    from mediator_cli.compare.variants import Variant
    from mediator_cli.plan.model import Plan

REFERENCE = "oracle experts"
GROUPS = ("static", "mediator", "assignment", "density", "values", "dense expert", "policy")
STATIC = {
    "as in the recipe": (),
    "linear": ("average.method=linear",),
    "task_arithmetic": ("average.method=task_arithmetic", "average.lambda=0.4"),
    "ties": ("average.method=ties",),
    "dare_linear": ("average.method=dare_linear",),
    "dare_ties": ("average.method=dare_ties",),
}


def prepare(job: Comparison) -> tuple[Comparison, Plan]:
    """Check that the tasks are named like the experts, and measure conflict unless a report is at hand.

    Raises CheckpointError naming tasks without an expert and recipes that route nothing.
    """
    plan = make_plan(load_recipe(job.recipe, job.changes))
    problems = list(_problems(job, plan))
    if problems:
        raise CheckpointError(problems)
    if job.conflicts is not None:
        return job, plan
    file = job.work / "conflicts.json"
    if not file.is_file():
        job.say("measure conflict")
        job.work.mkdir(parents=True, exist_ok=True)
        file.write_text(to_json(analyze_conflicts(plan, job.settings)), encoding="utf-8")
    return replace(job, conflicts=file), plan


def _problems(job: Comparison, plan: Plan) -> Iterator[Problem]:
    experts = [expert.name for expert in plan.experts]
    for task in job.tasks:
        if task.name not in experts:
            hint = f"a task is named by its file, up to the first dot; the experts are {', '.join(experts)}"
            yield Problem("--tasks", f"no expert is named like the task '{task.name}'", hint)
    if plan.loaded.recipe.assign.rule == "none":
        yield Problem(plan.loaded.place("assign"), "the recipe routes nothing", "there is nothing to ablate")
    if len(experts) < 2:
        yield Problem(plan.loaded.place("experts"), "there is one expert", "ablation compares ways to merge several")


def controls(plan: Plan, scores: Mapping[str, float], draws: int, groups: Sequence[str] = GROUPS) -> list[Variant]:
    """List the variants of the chosen groups, base and oracle experts first; `scores` are conflict by unit."""
    recipe = plan.loaded.recipe
    assignment = assign_units(recipe.assign, plan.units, plan.candidates, plan.listed, scores)
    layers = {unit: scores[unit] for unit in plan.candidates if unit in scores}
    n_routed = sum(assignment[unit] == "route" for unit in layers)
    makers: dict[str, Callable[[], Iterator[Variant]]] = {
        "static": lambda: static_merges(STATIC),
        "mediator": routed,
        "assignment": lambda: assignments(layers, n_routed, draws, recipe.seed),
        "extraction": extractions,
        "policy": lambda: policies(len(plan.experts)),
    }
    found = list(references([expert.name for expert in plan.experts]))
    for make in makers.values():
        found += [variant for variant in make() if variant.group in groups]
    return [v for v in found if v.answer != "router" or plan.router is not None]


def conflict_scores(job: Comparison, plan: Plan) -> dict[str, float]:
    """Read the conflict of each unit from the job's report."""
    from mediator_cli.bundle.manifest import ConflictReport, read_record

    if job.conflicts is None:
        return {}
    report = read_record(job.conflicts, ConflictReport, "conflict report")
    return dict(scores_by_measure(plan, report))
