"""The recipes for large models: their form, and the sizes that they tell, which come from shapes."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from mediator_cli import load_recipe
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.checkpoint.hub.find import is_hub_id

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(file for name in ("qwen2.5-7b", "llama-3.1-8b") for file in (ROOT / "recipes" / name).glob("*.yaml"))
NAMES = [f"{file.parent.name}/{file.stem}" for file in RECIPES]


@pytest.fixture(scope="module")
def sizes():
    spec = importlib.util.spec_from_file_location("sizes_script", ROOT / "scripts" / "sizes.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_recipes_for_each_family():
    assert NAMES == [
        "llama-3.1-8b/adapters", "llama-3.1-8b/mediator", "llama-3.1-8b/moe", "qwen2.5-7b/mediator",
        "qwen2.5-7b/static",
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_the_needs_that_a_recipe_tells_come_from_its_shapes(recipe, sizes, tmp_path):
    told = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("# Needs:")]
    assert told == [sizes.needs_line(recipe, tmp_path)]


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_names_repositories_and_commands_that_fit_it(recipe):
    loaded = load_recipe(recipe)
    assert all(is_hub_id(source) for source in (loaded.recipe.base, *(e.model for e in loaded.recipe.experts)))
    place = recipe.relative_to(ROOT).as_posix()
    assert loaded.text.count(f"mediator plan {place}") == loaded.text.count(f"mediator merge {place}") == 1
    assert ("hf auth login" in loaded.text) == loaded.recipe.base.startswith("meta-llama/")
    assert max(len(line) for line in loaded.text.splitlines()) <= 120


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_prompts_in_comments_can_be_made_fields(recipe, load):
    loaded = load(recipe.read_text(encoding="utf-8").replace("# prompts:", "prompts:"))
    prompts = {expert.prompts for expert in loaded.recipe.experts}
    # The mixture's prompts stand in the recipe itself.
    routes = loaded.recipe.assign.rule != "none" and loaded.recipe.kind == "mediator"
    assert prompts == ({f"{expert.name}.train.jsonl" for expert in loaded.recipe.experts} if routes else {None})


@pytest.mark.parametrize(
    ("source", "n_parameters", "n_tensors"),
    [("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, 339), ("meta-llama/Llama-3.1-8B", 8_030_261_248, 291)],
)
def test_the_shapes_have_the_parameters_that_the_models_are_known_to_have(
    source, n_parameters, n_tensors, sizes, tmp_path
):
    tensors = read_tensors(sizes.write_hollow(tmp_path / "model", sizes.SOURCES[source]))
    assert (sum(info.size for info in tensors.values()), len(tensors)) == (n_parameters, n_tensors)


def test_a_hollow_checkpoint_takes_no_room(sizes, tmp_path):
    file = sizes.write_hollow(tmp_path / "model", sizes.QWEN_7B) / "model.safetensors"
    assert file.stat().st_size > 15_000_000_000
    assert file.stat().st_blocks * 512 < 1_000_000


def test_the_script_writes_what_it_works_out(sizes, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes" / "llama-3.1-8b").mkdir(parents=True)
    original = RECIPES[NAMES.index("llama-3.1-8b/adapters")].read_text(encoding="utf-8")
    copy = tmp_path / "recipes" / "llama-3.1-8b" / "adapters.yaml"
    copy.write_text(re.sub("^# Needs:.*$", "# Needs:", original, flags=re.MULTILINE), encoding="utf-8")
    monkeypatch.setattr(sizes, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["sizes.py", "--write"])
    sizes.main()
    assert copy.read_text(encoding="utf-8") == original
    assert "adapters.yaml" in capsys.readouterr().out
