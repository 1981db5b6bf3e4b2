"""The controls of one recipe, and what has to be known to lay them out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.bundle.conflict_report import ConflictReport
from mediator_cli.bundle.manifest import read_record, to_json
from mediator_cli.checkpoint.hub.collections import collection_lister
from mediator_cli.checkpoint.hub.find import ONLINE
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.compare.key import conflict_key
from mediator_cli.compare.store import save_text
from mediator_cli.compare.variants import (
    assignments,
    combinations,
    extractions,
    policies,
    references,
    routed,
    static_merges,
)
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.pipeline.assign import assign_plan
from mediator_cli.pipeline.conflicts import scores_by_measure
from mediator_cli.pipeline.download import download_weights
from mediator_cli.pipeline.survey import analyze_conflicts
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mediator_cli.compare.run import Comparison
    from mediator_cli.compare.variants import Variant
    from mediator_cli.plan.model import Plan

REFERENCE = "oracle experts"
GROUPS = ("static", "mediator", "assignment", "density", "values", "dense expert", "policy", "combination")
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

    Raises CheckpointError naming tasks without an expert and recipes that route nothing, before anything is merged.
    """
    plan = make_plan(load_recipe(job.recipe, job.changes, collection_lister(ONLINE)))
    problems = list(_problems(job, plan))
    if problems:
        raise CheckpointError(problems)
    # What is named by its sources' files would get another name if they came later.
    download_weights(plan, job.settings.progress)
    if job.conflicts is None:
        file = job.work / f"conflicts-{conflict_key(plan)}.json"
        if not file.is_file():
            job.say("measure conflict")
            save_text(file, to_json(analyze_conflicts(plan, job.settings)))
        job = replace(job, conflicts=file)
    if "route" not in assign_plan(plan, conflict_scores(job, plan)).values():
        hint = "choose another rule, or a lower threshold; `mediator analyze-conflicts` shows the scores"
        raise CheckpointError(Problem(plan.loaded.place("assign"), "the recipe routes no unit", hint))
    return job, plan


def _problems(job: Comparison, plan: Plan) -> Iterator[Problem]:
    experts = [expert.name for expert in plan.experts]
    if not job.tasks:
        yield Problem("--tasks", "there is nothing to answer", "give rows for the experts' tasks: --tasks FILE")
    for task in job.tasks:
        if task.name not in experts:
            hint = f"a task is named by its file, up to the first dot; the experts are {', '.join(experts)}"
            yield Problem("--tasks", f"no expert is named like the task '{task.name}'", hint)
    if plan.loaded.recipe.assign.rule == "none":
        yield Problem(plan.loaded.place("assign", "rule"), "the recipe routes nothing", "there is nothing to ablate")
    if len(experts) < 2:
        yield Problem(plan.loaded.place("experts"), "there is one expert", "ablation compares ways to merge several")


def controls(plan: Plan, scores: Mapping[str, float], draws: int, groups: Sequence[str] = GROUPS) -> list[Variant]:
    """List the variants of the chosen groups, base and oracle experts first; `scores` are conflict by unit."""
    recipe = plan.loaded.recipe
    assignment = assign_plan(plan, scores)
    units = [unit for unit in plan.units if place_of(f"{unit}.weight").layer is not None]
    layers = {unit: scores[unit] for unit in units if unit in scores}
    n_routed = sum(assignment[unit] == "route" for unit in layers)
    # Where the recipe routes all, which layers come first is seen on half of them.
    n_chosen = n_routed if n_routed < len(layers) else len(layers) // 2
    makers: dict[str, Callable[[], Iterator[Variant]]] = {
        "static": lambda: static_merges(STATIC),
        "mediator": routed,
        "assignment": lambda: assignments(layers, n_chosen, draws, recipe.seed, f"{recipe.conflict.unit}s"),
        "extraction": extractions,
        "policy": lambda: policies(len(plan.experts)),
        "combination": lambda: combinations(len(plan.experts)),
    }
    found = list(references([expert.name for expert in plan.experts]))
    for make in makers.values():
        found += [variant for variant in make() if variant.group in groups]
    return [v for v in found if v.answer != "router" or plan.router is not None]


def conflict_scores(job: Comparison, plan: Plan) -> dict[str, float]:
    """Read the conflict of each unit from the job's report."""
    if job.conflicts is None:
        return {}
    report = read_record(job.conflicts, ConflictReport, "conflict report")
    return dict(scores_by_measure(plan, report))
