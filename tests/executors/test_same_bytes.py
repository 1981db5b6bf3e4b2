"""Any number of processes gives the bytes of one."""

import pytest
from conftest import all_files
from shared_merge import MEASURED, OVER_MODEL, SHARDED, STATIC, merge_together

EMR = {"assign": {"rule": "all"}, "extract": {"mode": "emr", "dense": "base"}}
RECIPES = {
    "ties over the model": STATIC,
    "conflict measured": MEASURED,
    "experts over the model": OVER_MODEL,
    "emr": EMR,
}


EACH = [pytest.param(each, id=name, marks=pytest.mark.slow if name == "emr" else ()) for name, each in RECIPES.items()]


@pytest.mark.parametrize("fields", EACH)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_gives_the_same_bytes(workshop, fields, world):
    expected = all_files(workshop.merge("recipe", **fields, **SHARDED))
    (workshop.folder / "recipe").rename(workshop.folder / "expected")
    assert merge_together(workshop.folder / "recipe.yaml", workshop.folder / "recipe", world) == [None] * world
    assert all_files(workshop.folder / "recipe") == expected
    assert len([name for name in expected if name.startswith("model-")]) > 3
    assert not list(workshop.folder.glob(".recipe*"))
