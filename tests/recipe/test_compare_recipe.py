"""Recipes of kind compare: experts and tasks named together, strategies with parameters, and what is refused where."""

import json

import jsonschema
import pytest
import yaml

from mediator_cli.errors import RecipeError
from mediator_cli.recipe.compare import compare_schema, load_compare
from mediator_cli.recipe.load import load_recipe

HEAD = "version: 1\nkind: compare\nbase: ./base\nexperts: [{name: a, model: ./a}, {name: b, model: ./b, rank: 4}]\n"
TASKS = "tasks: {a: {test: a.jsonl, valid: v.jsonl}, other: {test: o.jsonl, expert: b}}\n"


@pytest.fixture
def load(tmp_path):
    def from_text(text, *changes):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return load_compare(file, changes)

    return from_text


def told(load, text, *changes):
    with pytest.raises(RecipeError) as caught:
        load(text, *changes)
    return [(p.place.rpartition("recipe.yaml")[2], p.message, p.hint) for p in caught.value.problems]


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("b.test", "b.valid", "b.train", "a.test", "a.valid"):
        (folder / f"{name}.jsonl").write_text("")
    (folder / "notes.txt").write_text("")
    return folder


def test_strategies_are_names_or_names_with_parameters(load):
    recipe = load(HEAD + TASKS + "strategies: [base, {name: x, scale: 2, label: two}, {name: x}]").recipe
    assert [(each.shown, each.name, each.parameters) for each in recipe.strategies] == [
        ("base", "base", {}),
        ("two", "x", {"scale": 2}),
        ("x", "x", {}),
    ]
    assert (recipe.rows.train, recipe.rows.valid, recipe.rows.test) == (200, 40, 100)
    assert recipe.selection is None
    assert recipe.tasks["other"].expert == "b"
    assert recipe.tasks["a"].expert is None


def test_a_folder_of_rows_is_a_mapping_of_its_tasks_and_points_to_its_line(load, rows):
    loaded = load(HEAD + "tasks:\n  from: data/")
    assert list(loaded.recipe.tasks) == ["a", "b"]
    assert loaded.recipe.tasks["a"].model_dump() == {
        "train": None, "valid": "data/a.valid.jsonl", "test": "data/a.test.jsonl", "expert": None,
    }  # fmt: skip
    assert loaded.recipe.tasks["b"].train == "data/b.train.jsonl"
    assert loaded.place("tasks", "b", "test").endswith("recipe.yaml:6 tasks.from")
    assert loaded.place("experts", 1, "rank").endswith("recipe.yaml:4 experts[1].rank")
    assert loaded.folder == loaded.path.parent / "recipe-results"


def test_a_folder_of_adapters_passes_its_rank_on(load, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}")
    text = (
        "version: 1\nkind: compare\nbase: b\n" + TASKS.replace(", expert: b", "") + "experts: {from: adapters, rank: 3}"
    )
    recipe = load(text).recipe
    assert [(each.name, each.model, each.rank) for each in recipe.experts] == [
        ("one", "./adapters/one", 3),
        ("two", "./adapters/two", 3),
    ]


def test_a_task_without_test_rows_is_told(load, rows):
    (rows / "c.valid.jsonl").write_text("")
    assert [(place, message) for place, message, _ in told(load, HEAD + "tasks: {from: data}")] == [
        (f":5 tasks.from: {rows}", "no test rows for c")
    ]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("tasks: {from: nowhere}", "no such folder"),
        ("tasks: {from: 3}", "should be a text"),
        ("tasks: {from: data, match: x}", "unknown key 'match'"),
        ("tasks: {}", "dictionary should have at least 1 item after validation, not 0"),
        ("tasks: {a: {valid: x}}", "is required"),
        ("", "is required"),
    ],
)
def test_bad_tasks_are_refused(load, rows, tasks, message):
    (found,) = told(load, HEAD + tasks)
    assert found[1] == message


def test_all_problems_are_told_at_once_with_their_lines(load):
    text = HEAD + TASKS + "rows: {test: 0}\nstrategies: [a, a]\nselection: {selectors: [best]}\nsead: 1\n"
    found = told(load, text)
    assert [place for place, _, _ in found] == [
        ":6 rows.test", ":7 strategies", ":8 selection.selectors[0]", ":9 sead",
    ]  # fmt: skip
    assert "a stands there twice" in found[1][1]
    assert found[3][2] == "did you mean 'seed'?"
    assert found[0][2] == "see `mediator schema compare`"


def test_recipes_of_other_kinds_send_each_other_to_the_right_command(load, tmp_path):
    assert told(load, "version: 1\nbase: x\nexperts: []")[0][2] == "write `kind: compare`, with base, experts and tasks"
    file = tmp_path / "recipe.yaml"
    file.write_text(HEAD + TASKS)
    with pytest.raises(RecipeError, match="only `mediator compare` takes"):
        load_recipe(file)


def test_changes_of_the_command_line_win(load):
    loaded = load(HEAD + TASKS, "rows.test=7", "strategies=[base]", "seed=3")
    assert (loaded.recipe.rows.test, loaded.recipe.seed, loaded.recipe.strategies[0].name) == (7, 3, "base")
    assert loaded.changes == ("rows.test=7", "strategies=[base]", "seed=3")


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (HEAD + TASKS + "strategies: [base, {name: x, k: 1}]", True),
        ("version: 1\nkind: compare\nbase: b\nexperts: {from: x, rank: 2}\ntasks: {from: y}", True),
        (HEAD + "tasks: {a: {valid: x}}", False),
        (HEAD + TASKS + "rows: {test: 0}", False),
        (HEAD + TASKS + "seeds: 3", False),
        ("version: 1\nkind: compare\nbase: b\nexperts: {rank: 2}\ntasks: {from: y}", False),
    ],
)
def test_the_schema_for_editors_says_the_same(text, fits):
    checker = jsonschema.Draft202012Validator(json.loads(json.dumps(compare_schema())))
    assert checker.is_valid(yaml.safe_load(text)) is fits
