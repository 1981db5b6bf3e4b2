"""Form and meaning are reported together: faulty fields are set aside, the rest is checked."""

from __future__ import annotations

import pytest

from mediator_cli import load_recipe
from mediator_cli.errors import MediatorError, RecipeError
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_partly
from mediator_cli.recipe.prune import prune

DATA = {"version": 1, "base": "b", "experts": [{"name": "x", "model": "m", "weight": "heavy"}], "seed": -1}


def places(error: MediatorError) -> list[str]:
    return [problem.place.rsplit(":", 1)[1].split(": ")[0] for problem in error.problems]


def test_form_meaning_and_headers_are_reported_together_in_order_of_lines(workshop):
    path = workshop.recipe(
        experts=[{"name": "a/b", "model": "./a"}, {"name": "b", "model": "./nope"}],
        extract={"density": 3},
        average={"method": "tiess"},
        assign={"rule": "listed", "units": ["nothing"]},
        overrides=[{"match": "*.nothing", "average": {"method": "linear"}}],
    )
    with pytest.raises(MediatorError) as raised:
        make_plan(load_partly(path))
    text = str(raised.value)
    expected = ["'a/b' is not allowed", "no such folder", "less than or equal to 1", "unknown merge method 'tiess'"]
    found = [text.index(message) for message in [*expected, "'nothing' matches no unit", "matches no tensor"]]
    assert len(raised.value.problems) == 6
    assert found == sorted(found)


def test_a_recipe_with_faults_of_form_is_not_loaded(workshop):
    with pytest.raises(RecipeError, match="less than or equal to 1"):
        load_recipe(workshop.recipe(extract={"density": 3}))


def test_a_plan_is_never_made_from_what_is_left_of_a_recipe(workshop):
    loaded = load_partly(workshop.recipe(seed=-1))
    assert loaded.recipe.seed == 0
    with pytest.raises(MediatorError, match="greater than or equal to 0"):
        make_plan(loaded)


def test_pruning_keeps_experts_in_their_places_and_the_input_as_it_was():
    data = {**DATA, "experts": [{"name": "a/b", "model": "m"}, {"name": "y", "model": "n"}]}
    kept = prune(data, [("experts", 0, "name")])
    assert [expert["name"] for expert in kept["experts"]] == ["expert-0", "y"]
    assert data["experts"][0]["name"] == "a/b"


def test_pruning_removes_leaves_and_whole_sections():
    kept = prune({**DATA, "extract": {"density": 3, "values": "int8"}}, [("extract", "density"), ("seed",)])
    assert kept["extract"] == {"values": "int8"}
    assert "seed" not in kept
    assert "weight" in kept["experts"][0]


def test_a_faulty_assignment_becomes_one_that_raises_no_other_problem():
    assert prune({**DATA, "assign": {"rule": "top_k"}}, [("assign",)])["assign"] == {"rule": "none"}


@pytest.mark.parametrize("fault", [(), ("base",), ("experts", 0, "model"), ("experts", 7)])
def test_nothing_is_left_where_the_sources_are_unclear(fault):
    data = {**DATA, "experts": ["not a mapping"]} if fault == ("experts", 7) else DATA
    assert prune(data, [fault]) is None


def test_equal_names_get_stand_ins():
    data = {**DATA, "experts": [{"name": "x", "model": "m"}, {"name": "X", "model": "n"}]}
    assert [e["name"] for e in prune(data, [("experts",)])["experts"]] == ["expert-0", "expert-1"]
