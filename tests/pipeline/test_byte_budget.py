"""`byte_budget`: the written sparse experts fit, the most conflicted units come first, and the plan says so."""

import json

import pytest
import torch
from conftest import fine_tune, shapes, write_checkpoint

from mediator_cli import Settings, load_recipe, make_plan
from mediator_cli.pipeline.assign import sparse_sizes
from mediator_cli.pipeline.conflicts import preview_assignment
from mediator_cli.pipeline.estimate import describe_plan
from mediator_cli.pipeline.survey import analyze_conflicts

LAYERS = [f"model.layers.{n}" for n in range(3)]


def budget(n_bytes, **fields):
    return {"assign": {"rule": "byte_budget", "bytes": n_bytes, **fields}}


def plan_of(workshop, **fields):
    return make_plan(load_recipe(workshop.recipe(**fields)))


def routed_of(out):
    assignment = json.loads((out / "routing_manifest.json").read_text())["assignment"]
    return [unit for unit, decision in assignment.items() if decision == "route"]


def written(out):
    folder = out / "experts"
    return sum(file.stat().st_size for file in folder.iterdir()) if folder.exists() else 0


@pytest.fixture
def graded(workshop):
    """Experts that disagree more from layer to layer: layer 1 most, then 2, then 0."""
    signs = {0: 0.9, 1: 0.1, 2: 0.5}
    a = workshop.experts["a"]
    b = fine_tune(workshop.base, 5)
    for number, share in signs.items():
        for name in shapes():
            if f".layers.{number}." in name:
                same = torch.rand(a[name].shape, generator=torch.Generator().manual_seed(number)) < share
                base = workshop.base[name].float()
                delta = a[name].float() - base
                b[name] = (base + torch.where(same, delta, -delta)).bfloat16()
    write_checkpoint(workshop.folder / "b", b)
    return workshop


def test_the_most_conflicted_units_that_fit_are_routed(graded):
    sizes = sparse_sizes(plan_of(graded, **budget(10**9)), overrides=True)
    one = sizes.units[LAYERS[0]]
    assert sizes.units[LAYERS[1]] == sizes.units[LAYERS[2]] == one
    for n_bytes, expected in [
        (sizes.files + one - 1, []),
        (sizes.files + one, [LAYERS[1]]),
        (sizes.files + 2 * one, [LAYERS[1], LAYERS[2]]),
        (10**9, LAYERS),
    ]:
        out = graded.merge(f"out{n_bytes}", **budget(n_bytes))
        assert routed_of(out) == expected
        assert written(out) <= n_bytes


@pytest.mark.parametrize("unit", ["layer", "block", "tensor"])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.8])
@pytest.mark.parametrize(
    "extract",
    [
        {"density": 0.05},
        {"density": 0.3, "values": "int8"},
        {"density": 0.3, "select": "random", "values": "bf16"},
        {"density": 0.2, "over": "model", "values": "fp16"},
        {"density": 1, "values": "bf16"},
    ],
)
def test_what_is_written_is_never_more_than_was_given(workshop, unit, share, extract):
    fields = {"extract": extract, "conflict": {"unit": unit}, "output": {"dtype": "float32"}}
    sizes = sparse_sizes(plan_of(workshop, **fields, **budget("1GB", candidates="all")), overrides=True)
    n_bytes = sizes.files + int(share * sum(sizes.units.values()))
    out = workshop.merge("out", **fields, **budget(n_bytes, candidates="all"))
    assert written(out) <= n_bytes
    routed = routed_of(out)
    assert written(out) <= sum(sizes.units[unit] for unit in routed) + sizes.files
    left = n_bytes - sizes.files - sum(sizes.units[unit] for unit in routed)
    assert all(sizes.units[unit] > left for unit in sizes.units if unit not in routed)


def test_a_budget_is_a_size_in_words_and_the_preview_and_the_plan_know_it(graded):
    plan = plan_of(graded, **budget("0.03 MB"))
    report = analyze_conflicts(plan)
    preview = preview_assignment(plan, report)
    decisions = dict(zip(preview.table.rows, preview.decisions, strict=True))
    out = graded.merge("out", **budget("0.03 MB"))
    assert [layer for layer in LAYERS if decisions[layer] == "route"] == routed_of(out) == [LAYERS[1]]
    described = describe_plan(plan, None, Settings())
    assert described.assignment == "route of 3 candidates: by score while the sparse experts fit in 0.03 MB (sign)"
    low, high = described.sparse_bytes
    assert low <= written(out) <= high <= 30_000


@pytest.mark.parametrize(("n_bytes", "low", "high"), [(100, 0, 0), ("1GB", 3, 3)])
def test_the_plan_says_when_nothing_or_all_fits(workshop, n_bytes, low, high):
    layer = sparse_sizes(plan_of(workshop, **budget(1))).units[LAYERS[0]]
    found = describe_plan(plan_of(workshop, **budget(n_bytes)), None, Settings()).sparse_bytes
    assert found == (low * layer, high * layer)


@pytest.mark.parametrize(
    ("assign", "message"),
    [
        ({"rule": "byte_budget"}, "rule 'byte_budget' needs bytes"),
        ({"rule": "byte_budget", "bytes": "5 apples"}, "'5 apples' is not a size"),
        ({"rule": "byte_budget", "bytes": 0}, "not a size of at least one byte"),
        ({"rule": "byte_budget", "bytes": 1, "k": 2}, "'byte_budget' takes no k"),
        ({"rule": "top_k", "k": 1, "bytes": 2}, "'top_k' takes no bytes"),
    ],
)
def test_a_budget_of_wrong_form_is_refused(workshop, refused, assign, message):
    workshop.recipe(assign=assign)
    field = "assign.bytes" if "size" in message else "assign"
    refused(f"recipe.yaml:4 {field}", message, "schema")


def test_a_budget_needs_experts_to_compare(workshop, refused):
    workshop.recipe(experts=[{"name": "a", "model": "./a"}], **budget(1000))
    refused("recipe.yaml:4 assign.rule", "rule byte_budget compares experts, the recipe has one", "all or listed")
