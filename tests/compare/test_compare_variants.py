"""What is compared: every control changes one thing, and the recipe takes every change."""

from collections import Counter

import pytest
from conftest import with_prompts

from mediator_cli import load_recipe, make_plan
from mediator_cli.compare.ablate import GROUPS, controls
from mediator_cli.compare.table import report_of
from mediator_cli.compare.variants import Variant, assignments, policies, references, with_changes
from mediator_cli.evaluate.score import RowScore

LAYERS = [f"model.layers.{n}" for n in range(3)]
SCORES = dict(zip(LAYERS, (0.1, 0.3, 0.2), strict=True))


def plan_of(shop, *changes, **fields):
    return make_plan(load_recipe(shop.recipe(**{"experts": with_prompts(), **fields}), changes))


@pytest.mark.parametrize("rule", [{"rule": "mean_std"}, {"rule": "all"}, {"rule": "listed", "units": ["*.1"]}])
def test_the_recipe_takes_every_change_and_all_names_differ(shop, rule):
    plan = plan_of(shop, assign=rule)
    found = controls(plan, SCORES | {"model.norm": 0.0, "model.embed_tokens": 0.9}, 2)
    wanted = {"reference": 2, "static": 6, "mediator": 3, "assignment": 5, "density": 6, "values": 3}
    assert Counter(v.group for v in found) == wanted | {"dense expert": 2, "policy": 5, "combination": 4}
    assert len({v.name for v in found}) == len(found)
    assert {v.group for v in found} - {"reference"} == set(GROUPS)
    for variant in found:
        changed = plan_of(shop, *variant.changes, assign=rule)
        assert (changed.router is None) <= (variant.answer != "router")
    assert {v.changes[0] for v in found if v.group == "static"} == {"assign.rule=none"}


def test_as_many_layers_as_the_recipe_routes_are_chosen_by_conflict(shop):
    plan = plan_of(shop, assign={"rule": "top_k", "k": 1})
    found = controls(plan, SCORES, 3, ("assignment",))[2:]
    listed = {v.name: plan_of(shop, *v.changes).listed for v in found[1:]}
    assert listed["1 layers of lowest conflict"] == (LAYERS[0],)
    assert listed["1 layers of highest conflict"] == (LAYERS[1],)
    assert all(len(units) == 1 for units in listed.values())
    assert plan_of(shop, *found[0].changes).candidates == tuple(LAYERS)
    assert controls(plan, SCORES, 3, ("assignment",))[2:] == found


def test_draws_depend_on_the_seed_alone():
    scores = {f"model.layers.{n}": n / 40 for n in range(40)}
    first, again, other = (list(assignments(scores, 20, 3, seed))[3:] for seed in (0, 0, 1))
    assert first == again != other
    assert len({variant.changes for variant in first}) == 3


@pytest.mark.parametrize("n_routed", [0, 3])
def test_nothing_is_chosen_among_no_layers_or_all(n_routed):
    assert [v.name for v in assignments(SCORES, n_routed, 2, 0)] == ["all layers routed"]


def test_half_of_the_layers_are_chosen_where_the_recipe_routes_all(shop):
    names = [v.name for v in controls(plan_of(shop, assign={"rule": "all"}), SCORES, 1, ("assignment",))[2:]]
    assert names[1:3] == ["1 layers of lowest conflict", "1 layers of highest conflict"]


def test_smaller_units_are_called_what_they_are(shop):
    plan = plan_of(shop, conflict={"unit": "block"}, assign={"rule": "top_k", "k": 2})
    found = controls(plan, dict.fromkeys(plan.units, 0.5), 1, ("assignment",))[3:]
    assert [v.name for v in found] == [
        "2 blocks of lowest conflict", "2 blocks of highest conflict", "2 random blocks, draw 1",
    ]  # fmt: skip


def test_without_a_router_nothing_waits_for_one(shop):
    found = controls(plan_of(shop, experts=[{"name": n, "model": f"./{n}"} for n in "ab"]), SCORES, 1)
    assert {v.answer for v in found} == {"oracle", "dense"}
    assert "policy" not in {v.group for v in found}


def test_references_cross_experts_and_tasks_when_asked():
    assert [v.answer for v in references(["a", "b"])] == ["dense", "oracle"]
    crossed = list(references(["a", "b"], crossed=True))[2:]
    assert [(v.model, v.answer) for v in crossed] == [("experts", "a"), ("experts", "b")]


def test_policies_fit_the_number_of_experts():
    assert [v.policy.k for v in policies(1) if v.policy.rule == "top_k"] == [1]
    assert [v.policy.k for v in policies(5) if v.policy.rule == "top_k"] == [2]


def test_changes_for_all_come_before_those_of_a_bundle():
    base, bundle = Variant("x", "base", "base"), Variant("x", "routed", changes=("extract.density=1",))
    assert with_changes([base, bundle], ("seed=3",)) == [
        base, Variant("x", "routed", changes=("seed=3", "extract.density=1")),
    ]  # fmt: skip


def test_a_report_counts_differences_from_the_reference():
    from mediator_cli.compare.run import Outcome

    def outcome(name, exact):
        scores = {"a": tuple(RowScore(right, None, -1.0, 3) for right in exact)}
        return Outcome(Variant("x", name), scores, 7, 0.5)

    report = report_of([outcome("first", [True, False]), outcome("second", [True, True])], "second")
    assert [(m.name, m.accuracy, m.n_bytes, m.seconds_per_answer) for m in report.models] == [
        ("second", 1.0, 7, 0.5), ("first", 0.5, 7, 0.5),
    ]  # fmt: skip
    assert [(d.model, d.task, d.difference) for d in report.differences] == [("first", "a", -0.5)]
