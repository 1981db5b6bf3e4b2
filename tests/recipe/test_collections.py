"""Experts named together: folders and collections of the Hub, where they stand in the file, and what is refused."""

import json

import jsonschema
import pytest
from conftest import write_adapter, write_checkpoint
from loopback_hub import joined

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.checkpoint.hub.collections import collection_lister
from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.errors import RecipeError
from mediator_cli.pipeline.record import recipe_digest
from mediator_cli.plan.make import make_plan
from mediator_cli.plan.schema import recipe_schema
from mediator_cli.recipe.collections import ExpertsFrom, expand_experts
from mediator_cli.recipe.load import load_recipe
from mediator_cli.recipe.schema import ExpertSpec

HEAD = "version: 1\nbase: ./base\n"
SLUG = "org/adapters-0123456789ab"


@pytest.fixture
def library(tmp_path):
    """Adapters task2, task10 and Task3, a full model, and much that is no expert."""
    for name in ("task10", "task2", "Task3", ".hidden"):
        folder = tmp_path / "library" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "library" / "full").mkdir()
    (tmp_path / "library" / "full" / "config.json").write_text("{}")
    (tmp_path / "library" / "logs").mkdir()
    (tmp_path / "library" / "README.md").write_text("config.json")
    return tmp_path / "library"


def told(load, text, *changes):
    with pytest.raises(RecipeError) as caught:
        load(HEAD + text, *changes)
    return [(problem.place.rpartition("recipe.yaml")[2], problem.message) for problem in caught.value.problems]


def test_a_folder_is_a_list_of_its_subfolders(load, library):
    recipe = load(HEAD + "experts: {from: library, weight: 0.5, prompts: 'rows/{name}.jsonl'}").recipe
    assert [expert.name for expert in recipe.experts] == ["Task3", "full", "task2", "task10"]
    assert recipe.experts[3] == ExpertSpec(
        name="task10", model="./library/task10", weight=0.5, prompts="rows/task10.jsonl"
    )


def test_folders_stand_among_other_experts_and_fields_have_the_lines_of_the_file(load, library, tmp_path):
    text = "experts:\n- name: first\n  model: ./a\n- match: task*\n  from: ./library/\n  weight: [1, 2]\n"
    text += "- {name: z, model: ./z}\n"
    loaded = load(HEAD + text)
    assert [expert.model for expert in loaded.recipe.experts] == ["./a", "./library/task2", "./library/task10", "./z"]
    place = {
        ("experts", 0, "model"): "5 experts[0].model",
        ("experts", 2): "6 experts[1]",
        ("experts", 2, "model"): "7 experts[1].from",
        ("experts", 2, "weight"): "8 experts[1].weight",
        ("experts", 3, "name"): "9 experts[2].name",
    }
    assert {field: loaded.place(*field) for field in place} == {
        field: f"{tmp_path}/recipe.yaml:{where}" for field, where in place.items()
    }


def test_the_command_line_changes_what_is_named_together(load, library):
    text = HEAD + "experts:\n- {from: ./library, match: task2}\n"
    assert load(text, "experts[0].match=t*", "experts[0].weight=3").recipe.experts[1].weight == 3
    assert len(load(text, "experts={from: ./library}").recipe.experts) == 4


def test_what_a_recipe_asks_for_is_another_where_the_folder_has_changed(load, library):
    text = HEAD + "experts: {from: library}"
    first = recipe_digest(load(text))
    assert recipe_digest(load(text)) == first
    (library / "full" / "config.json").unlink()
    assert recipe_digest(load(text)) != first


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("experts: {from: ./nowhere}", "experts.from: ", "no such folder"),
        ("experts: {from: library/logs}", "experts.from: ", "no subfolder holds an adapter_config.json"),
        ("experts: {from: library/task2}", "experts.from: ", "is one expert by itself"),
        ("experts: {from: 3}", "experts.from", "should be a text"),
        ("experts: {from: library, match: x*}", "experts.match", "'x*' matches none of 4 experts"),
        ("experts: {from: library, name: a}", "experts.name", "`name` does not go with `from`"),
        ("experts: {from: library, prompts: a.jsonl}", "experts.prompts", "all 4 experts would have the same prompts"),
        ("experts: {from: library, wieght: 2}", "experts.wieght", "unknown key 'wieght'"),
        ("experts: {from: library, weight: a}", "experts.weight", "input should be a valid number (got 'a')"),
        (
            "experts: [{from: library}, {name: TASK2, model: x}]",
            "experts[1].name",
            "two experts are called 'TASK2': ./library/task2 and x",
        ),
        ("experts: {from: 'collection:nothing'}", "experts.from", "'nothing' is no collection of the Hub"),
        ("experts: {from: 'collection:a/b'}", "experts.from", "the Hub is not asked where a recipe is read this way"),
    ],
)
def test_what_is_refused_is_told_once_with_its_line(load, library, text, place, message):
    ((where, what),) = told(load, text)
    assert where.startswith(f":3 {place}")
    assert message in what


def test_names_that_cannot_be_are_told_with_all_else(load, library):
    for name in ("base", "v1.2"):
        (library / name).mkdir()
        (library / name / "config.json").write_text("{}")
    assert told(load, "experts: {from: library}\nseed: -1") == [
        (":3 experts.from", "no expert may be called 'base', which means something else"),
        (":3 experts.from", "'v1.2' is no name of an expert: letters, digits, - and _, at most 64"),
        (":4 seed", "input should be greater than or equal to 0 (got -1)"),
    ]
    assert told(load, "experts: {from: library}", "experts[0].weight=2")[0][1].endswith("have no numbers")


def test_other_fields_go_to_each_expert_with_its_name_filled_in(library, tmp_path):
    raw = {"from": "library", "match": "task*", "rows": {"train": ["{name}.a", "x"], "n": 3}}
    given = expand_experts(raw, tmp_path, lambda *_: "", differing=())
    rows = {"train": ["task10.a", "x"], "n": 3}
    assert given.experts[1] == {"name": "task10", "model": "./library/task10", "rows": rows}
    assert given.written["experts", 1, "model"] == ("experts", "from")


def test_what_is_no_list_is_left_to_the_schema(tmp_path):
    for raw in (None, 3, {"name": "a"}, [{"name": "a", "model": "b"}, 3]):
        given = expand_experts(raw, tmp_path, str)
        assert given.experts is raw
        assert not given.written


def test_the_schema_knows_both_forms():
    fields = {field.alias or name for name, field in ExpertsFrom.model_fields.items()}
    assert fields - {"from", "match"} == {*ExpertSpec.model_fields} - {"name", "model"}
    schema = recipe_schema()
    for experts, is_valid in (
        ({"from": "x"}, True),
        ([{"from": "x", "match": "a*"}, {"name": "a", "model": "b"}], True),
        ({"name": "a", "model": "b"}, False),
        ([{"from": "x", "model": "b"}], False),
        ("x", False),
    ):
        found = jsonschema.Draft202012Validator(schema).is_valid({"version": 1, "base": "b", "experts": experts})
        assert found == is_valid, experts


@pytest.mark.parametrize(
    "fields",
    [
        {"assign": {"rule": "none"}, "output": {"dtype": "float32"}},
        {"average": {"method": "lora_linear"}},
        {"kind": "moe", "moe": {"format": "mixtral", "gates": {"method": "random"}}},
    ],
)
def test_a_folder_is_planned_and_merged_as_the_list_is(workshop, fields):
    for seed, name in enumerate(("one", "two")):
        write_adapter(workshop.folder / "both" / name, seed)
    written = [{"name": name, "model": f"./both/{name}"} for name in ("one", "two")]
    plans = [
        make_plan(load_recipe(workshop.recipe(f"{n}.yaml", experts=experts, **fields)))
        for n, experts in enumerate((written, {"from": "./both"}))
    ]
    assert plans[0].experts == plans[1].experts
    assert plans[0].tensors == plans[1].tensors
    assert plans[0].modules == plans[1].modules


def test_a_manifest_holds_the_written_form_and_the_sources_that_it_meant(workshop):
    write_checkpoint(workshop.folder / "both" / "one", workshop.experts["a"])
    write_checkpoint(workshop.folder / "both" / "two", workshop.experts["b"])
    made = read_manifest(workshop.merge(experts={"from": "./both"}, assign={"rule": "none"}))
    assert '{"from": "./both"}' in made.recipe.text
    assert [(each.name, each.path) for each in made.experts] == [("one", "./both/one"), ("two", "./both/two")]
    assert made.digest == read_manifest(workshop.merge("list", assign={"rule": "none"})).digest


def test_a_prompts_file_that_one_expert_lacks_is_named(workshop, refused):
    for seed, name in enumerate(("one", "two")):
        write_adapter(workshop.folder / "both" / name, seed)
    (workshop.folder / "one.jsonl").write_text(json.dumps({"prompt": "a"}))
    workshop.recipe(experts={"from": "./both", "prompts": "{name}.jsonl"}, assign={"rule": "all"})
    refused("recipe.yaml:3 experts.prompts", f"no such file: {workshop.folder}/two.jsonl", "check the path")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with joined(monkeypatch, tmp_path / "cache") as made:
        made.collections[SLUG] = [("dataset", "org/rows"), ("model", "org/v1.10"), ("model", "org/v1.2")]
        yield made


def test_a_collection_is_its_models_and_is_known_offline_afterwards(hub, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{HEAD}experts:\n- from: collection:{SLUG}\n")
    with pytest.raises(RecipeError, match="was not listed on this machine"):
        load_recipe(recipe, (), collection_lister(Access(offline=True)))
    for offline in (False, True):
        experts = load_recipe(recipe, (), collection_lister(Access(offline))).recipe.experts
        assert [(e.name, e.model) for e in experts] == [("v1-2", "org/v1.2"), ("v1-10", "org/v1.10")]
    assert len([request for request in hub.requests if "collections" in request.path]) == 1


@pytest.mark.parametrize(
    ("slug", "fault", "message"),
    [
        ("org/other-0123456789ab", None, "no such collection on the Hub"),
        (SLUG, ("collections", 503, {}), "the Hub answers with error 503"),
        (SLUG, "{}", "the answer is not one of the Hub's API"),
        (SLUG, "[nonsense", "the Hub's answer makes no sense"),
    ],
)
def test_a_collection_that_cannot_be_listed_is_told_with_its_line(hub, tmp_path, slug, fault, message):
    if isinstance(fault, tuple):
        hub.faults.append(fault)
    hub.nonsense = fault if isinstance(fault, str) else ""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{HEAD}experts: {{from: 'collection:{slug}'}}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, (), collection_lister(Access()))
    (problem,) = caught.value.problems
    assert problem.place.startswith(f"{recipe}:3 experts.from: {slug}")
    assert message in problem.message


def test_a_collection_of_data_sets_and_names_that_become_one_are_refused(hub, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{HEAD}experts: {{from: 'collection:{SLUG}'}}\n")
    for items, message in (
        ([("dataset", "org/rows")], "the collection holds no models"),
        ([("model", "org/a.b"), ("model", "other/a-b")], "two experts are called 'a-b': org/a.b and other/a-b"),
    ):
        hub.collections[SLUG] = items
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe, (), collection_lister(Access()))
