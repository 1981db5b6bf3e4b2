"""The bar of a merge comes to its end when the work does: what is told of on the way is what was announced."""

import pytest

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.pipeline import merge as merging

ALL = {"assign": {"rule": "all"}}
CASES = {
    "statistics of tensors": {"average": {"method": "ties"}, "assign": {"rule": "none"}},
    "routed": {"average": {"method": "iso_c"}, **ALL, "extract": {"density": 0.3}},
    "the base's own values": {"average": {"method": "widen"}, **ALL, "extract": {"density": 0.3, "dense": "base"}},
    "limits over the model": {**ALL, "extract": {"density": 0.3, "over": "model"}},
    "scales over the model": {**ALL, "extract": {"mode": "emr", "dense": "base"}},
}


@pytest.fixture
def told(monkeypatch):
    """What a merge announces, and what it tells of until it is done, in elements."""
    found = {"announced": 0, "steps": []}

    def counter(progress, stage, total, per_item=1):
        found["announced"] = total // per_item
        return found["steps"].append

    monkeypatch.setattr(merging, "counter", counter)
    return found


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_merge_tells_of_as_much_as_it_announced(workshop, told, fields):
    plan = make_plan(load_recipe(workshop.recipe(**fields)))
    merge(plan, workshop.folder / "out", settings=Settings(workers=1))
    *steps, rest = told["steps"]
    assert rest == told["announced"]
    # A sample of tensors as small as these is all of them, and counts as a pass over a model's limits as well.
    passes = 1 + (fields.get("extract", {}).get("over") == "model") / 5
    assert 0.97 <= sum(steps) / told["announced"] <= 1.03 * passes
