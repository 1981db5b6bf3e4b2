"""Is the routed model worth it? python -m scripts.quality, after make demo; about an hour on 2 cores.

Everything was chosen on validation rows (scripts.quality.validate); this reports on test rows, once. Scores of rows
are kept in demo/quality, so a run that was stopped goes on. Tables land in demo/quality/*.md and *.json.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.compare.ablate import conflict_scores
from mediator_cli.compare.run import Comparison, Outcome, compare
from mediator_cli.compare.table import report_of
from mediator_cli.compare.variants import Variant, assignments, policies, references, static_merges
from mediator_cli.evaluate.report import as_json, markdown
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.evaluate.tasks import Row, Task
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_recipe
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import load_tokenizer
from scripts.demo.wordings import WORDINGS
from scripts.quality.choices import CHOSEN_STATIC, HALF_OF_LAYERS
from scripts.quality.data import VERSIONS, foreign_tasks, mixed_rows, version
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
    # Top 2 and posterior give every row a mixture of its own, which takes long and is like argmax where it is sure.
    few = [variant for variant in every if variant.name not in ("policy top 2", "policy posterior")]
    outcomes = list(compare(foreign, [base, *few, Variant("policy", "dense expert alone", answer="dense")]))
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


def mixed(job: Comparison, console: Console) -> None:
    """Ask two questions of different tasks at once: the right choice of each part, by who answers."""
    folder = CHECKOUT / "demo/bundle"
    model, tokenizer = open_bundle(folder), load_tokenizer(folder)
    chat = [{"role": "user", "content": "TEXT"}]
    template = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    parts = mixed_rows(job.tasks, template, 0)
    lines = []
    for name, decide in MIXERS.items():
        shares = []
        for part in parts:
            ids = [tokenizer.encode(row.prompt, add_special_tokens=False) for row in part.rows]
            weights = decide(model.route(ids).probabilities, [model.expert_names.index(str(r.id)) for r in part.rows])
            shares.append(100 * share_right(model, tokenizer, part, weights))
        lines.append(f"| {name} | {shares[0]:.1f} | {shares[1]:.1f} | {sum(shares) / 2:.1f} |")
    text = "| who answers | first part | second part | mean |\n|---|---:|---:|---:|\n" + "\n".join(lines)
    (WORK / "mixed.md").write_text(text + "\n", encoding="utf-8")
    console.print(f"\n== two questions at once, right choices in per cent\n{text}", markup=False)


def share_right(model: RoutedModel, tokenizer: PreTrainedTokenizerBase, part: Task, weights: np.ndarray) -> float:
    """Score rows grouped by mixture; return the share whose answer is the most probable choice."""
    groups: dict[tuple[float, ...], list[Row]] = {}
    for row, mixture in zip(part.rows, weights.tolist(), strict=True):
        groups.setdefault(tuple(mixture), []).append(row)
    right = 0
    for mixture, rows in groups.items():
        settings = ScoreSettings(raw=True, mixture=dict(zip(model.expert_names, mixture, strict=True)))
        right += sum(bool(score.chosen_right) for score in score_rows(model, tokenizer, rows, settings))
    return right / len(part.rows)


def likeliest(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Share the weight between the `count` likeliest experts."""
    order = np.argsort(-probabilities, axis=1)[:, :count]
    weights = np.zeros_like(probabilities)
    np.put_along_axis(weights, order, 1 / count, axis=1)
    return weights


MIXERS = {
    "the part's own expert": lambda p, own: np.eye(p.shape[1])[own],
    "the likeliest expert": lambda p, own: likeliest(p, 1),
    "the two likeliest, half each": lambda p, own: likeliest(p, 2),
    "the two likeliest, whole each": lambda p, own: 2 * likeliest(p, 2),
    "all, a quarter each": lambda p, own: likeliest(p, p.shape[1]),
    "the dense expert": lambda p, own: np.zeros_like(p),
}

PARTS = {
    "main": main_table,
    "versions": versions,
    "policy": policy,
    "layers": layers,
    "extraction": extraction,
    "mixed": mixed,
}

if __name__ == "__main__":
    main()
