"""Is the routed model worth it? python -m scripts.quality, after make demo; about an hour on 2 cores.

Everything was chosen on validation rows (scripts.quality.validate); this reports on test rows, once. Scores of rows
are kept in demo/quality, so a run that was stopped goes on. Tables land in demo/quality/*.md and *.json.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.console import Console

from mediator_cli.bundle.manifest import PolicyRecord
from mediator_cli.compare.ablate import conflict_scores
from mediator_cli.compare.run import Comparison, Outcome, compare
from mediator_cli.compare.table import report_of
from mediator_cli.compare.variants import Variant, assignments, policies, references, static_merges
from mediator_cli.evaluate.report import as_json, markdown
from mediator_cli.evaluate.tasks import Task
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_recipe
from scripts.demo.wordings import WORDINGS
from scripts.quality.choices import CHOSEN_STATIC, HALF_OF_LAYERS
from scripts.quality.data import VERSIONS, foreign_tasks, version
from scripts.quality.validate import CHECKOUT, DATA, RECIPE, WORK

REFERENCE = "oracle experts"
DRAWS = 5
DENSITIES = ((1.0, 1), (0.5, 1), (0.2, 1.5), (0.1, 2), (0.05, 3), (0.02, 5), (0.01, 8))
RESCALES = (1, 1.5, 2, 3, 4, 6)
BEST_STATIC = "task_arithmetic"


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m scripts.quality", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    arguments = parser.parse_args()
    from mediator_cli.cli.opening import quiet_transformers

    quiet_transformers()
    console = Console(soft_wrap=True, highlight=False)
    job = Comparison(
        RECIPE,
        version(DATA, "test"),
        WORK,
        conflicts=CHECKOUT / "demo/conflicts.json",
        say=lambda text: console.print(text, markup=False),
    )
    for part in arguments.parts or PARTS:
        PARTS[part](job, console)


def table(job: Comparison, console: Console, name: str, variants: Iterable[Variant]) -> None:
    """Score variants and write their table, the oracle experts as the reference."""
    wanted = list(variants)
    if not any(variant.name == REFERENCE for variant in wanted):
        wanted = [Variant("reference", REFERENCE, "experts"), *wanted]
    save(list(compare(job, wanted)), console, name)


def save(outcomes: Sequence[Outcome], console: Console, name: str) -> None:
    """Write a table as Markdown and JSON and print it."""
    report = report_of(outcomes, REFERENCE)
    (WORK / f"{name}.md").write_text(markdown(report), encoding="utf-8")
    (WORK / f"{name}.json").write_text(json.dumps(as_json(report), indent=1), encoding="utf-8")
    console.print(f"\n== {name}\n{markdown(report)}", markup=False)


def main_table(job: Comparison, console: Console) -> None:
    """References, static merges with their best parameters, and the recipe."""
    routed = [
        Variant("mediator", "Mediator, router", answer="router"),
        Variant("mediator", "Mediator, oracle routing"),
        Variant("mediator", "Mediator, dense expert alone", answer="dense"),
    ]
    table(job, console, "main", [*references(list(WORDINGS), crossed=True), *static_merges(CHOSEN_STATIC), *routed])


def layers(job: Comparison, console: Console) -> None:
    """Which layers are routed, the right expert given: at the recipe's density and at equal bytes."""
    plan = make_plan(load_recipe(job.recipe, ("assign.rule=mean_std",)))
    scores = conflict_scores(job, plan)
    per_layer = {unit: scores[unit] for unit in plan.candidates}
    n_routed = sum(score > sum(per_layer.values()) / len(per_layer) for score in per_layer.values())
    same = list(assignments(per_layer, n_routed, DRAWS, seed=0))
    share = len(per_layer) / n_routed
    more = ("extract.density=" + str(round(0.05 * share, 4)), "extract.rescale=2.5")
    equal = [replace(v, name=f"{v.name}, same bytes", changes=(*v.changes, *more)) for v in same[1:4]]
    table(job, console, "layers", [*same, *equal, *modules()])


def modules() -> Iterable[Variant]:
    """Spend the bytes on attention or on the MLPs alone: the others keep next to nothing."""
    for name, kept, others, density in (("MLPs", "mlp", "self_attn", 0.0665), ("attention", "self_attn", "mlp", 0.2)):
        overrides = (
            f"[{{match: '*.{others}.*', extract: {{density: 0.000001}}}}, "
            f"{{match: '*.{kept}.*', extract: {{density: {density}}}}}]"
        )
        yield Variant("assignment", f"only {name}, same bytes", changes=(f"overrides={overrides}",))


def extraction(job: Comparison, console: Console) -> None:
    """Density, stored values, rescaling and the dense expert, the right expert given."""
    variants = [
        Variant(
            "density",
            f"density {density:g} × {scale:g}",
            changes=(f"extract.density={density}", f"extract.rescale={scale}"),
        )
        for density, scale in DENSITIES
    ]
    variants += [Variant("rescale", f"rescale {x:g}", changes=(f"extract.rescale={x}",)) for x in RESCALES]
    variants += [Variant("values", f"values {v}", changes=(f"extract.values={v}",)) for v in ("bf16", "int8", "sign")]
    variants += [
        Variant("values", f"values {v}, rescale 1", changes=(f"extract.values={v}", "extract.rescale=1"))
        for v in ("bf16", "sign")
    ]
    variants += [
        Variant("dense", "dense base", changes=("extract.dense=base",)),
        Variant("dense", "dense average", changes=("extract.dense=average",)),
        Variant("dense", "dense TIES", changes=("average.method=ties", "average.density=0.2", "average.lambda=0.7")),
        Variant("dense", "dense task arithmetic", changes=("average.method=task_arithmetic", "average.lambda=0.4")),
        Variant("dense", "embeddings routed too", changes=("assign.rule=all", "assign.candidates=all")),
        Variant(
            "paper",
            "as told of the paper: conflicted layers, density 0.1, bf16",
            changes=(*HALF_OF_LAYERS, "extract.density=0.1", "extract.values=bf16", "extract.rescale=1"),
        ),
    ]
    table(job, console, "extraction", variants)


def versions(job: Comparison, console: Console) -> None:
    """Templates and bare texts beside the paraphrased instructions."""
    for name in VERSIONS[1:]:
        own = replace(job, tasks=version(DATA, name))
        variants = [
            Variant("reference", "base", "base", answer="dense"),
            *(v for v in static_merges(CHOSEN_STATIC) if BEST_STATIC in str(v.changes)),
            Variant("mediator", "Mediator, router", answer="router"),
            Variant("mediator", "Mediator, oracle routing"),
        ]
        table(own, console, name, variants)


def policy(job: Comparison, console: Console) -> None:
    """Every policy on the experts' own tasks, and on tasks that no expert knows."""
    every = list(policies(len(WORDINGS)))
    every += [
        Variant("policy", f"policy uncertainty, sure {sure:g}", answer="router", policy=PolicyRecord(sure=sure))
        for sure in (0.02, 0.3, 0.5)
    ]
    every.append(
        Variant("policy", "policy uncertainty, outside ignored", answer="router", policy=PolicyRecord(outside="ignore"))
    )
    table(job, console, "policies", every)
    foreign = replace(job, tasks=foreign_tasks(0))
    base = Variant("reference", "base", "base", answer="dense")
    outcomes = list(compare(foreign, [base, *every, Variant("policy", "dense expert alone", answer="dense")]))
    lines = [choice_line(outcome.variant.name, outcome, foreign.tasks) for outcome in outcomes]
    text = "| policy | " + " | ".join(task.name for task in foreign.tasks) + " |\n|---|---:|---:|\n" + "\n".join(lines)
    (WORK / "foreign.md").write_text(text + "\n", encoding="utf-8")
    console.print(f"\n== foreign tasks, right choices in per cent\n{text}", markup=False)


def choice_line(name: str, outcome: Outcome, tasks: Sequence[Task]) -> str:
    """Write a row of choice accuracies."""
    shares = [
        100 * sum(bool(score.chosen_right) for score in outcome.scores[task.name]) / len(task.rows) for task in tasks
    ]
    return f"| {name} | " + " | ".join(f"{share:.1f}" for share in shares) + " |"


PARTS = {
    "main": main_table,
    "versions": versions,
    "policy": policy,
    "layers": layers,
    "extraction": extraction,
}

if __name__ == "__main__":
    main()
