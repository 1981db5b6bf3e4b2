"""What is documented is executed: README, recipes, generated pages."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import fine_tune, random_tensors, write_adapter, write_checkpoint

from mediator_cli import load_recipe
from mediator_cli.cli.app import main
from mediator_cli.methods import registry

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def section(page: str, title: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def docs_script():
    spec = importlib.util.spec_from_file_location("docs_script", ROOT / "scripts" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def readme_folder(tmp_path, monkeypatch):
    base = random_tensors(0)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "maths", fine_tune(base, 1))
    write_adapter(tmp_path / "sarcasm-lora", 2)
    (tmp_path / "recipe.yaml").write_text(blocks(section("README.md", "One recipe from start to finish"), "yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0, line


def test_the_readme_recipe_runs_from_start_to_finish(readme_folder, monkeypatch, capsys):
    text = section("README.md", "One recipe from start to finish")
    lines = [line for line in blocks(text, "bash")[0].splitlines() if line.startswith("mediator")]
    assert len(lines) == 7
    for line in lines:
        run(line, monkeypatch)
    manifest = json.loads((readme_folder / "bundle" / "routing_manifest.json").read_text())
    assert set(manifest["assignment"].values()) == {"average"}
    assert "is valid: 2 experts" in capsys.readouterr().out


def test_the_readme_python_example_gives_a_mixture(readme_folder):
    code = blocks(section("README.md", "One recipe from start to finish"), "python")[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["weight"].shape == (12, 8)
    assert (readme_folder / "from-python" / "routing_manifest.json").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_valid_form_and_a_schema_line(recipe):
    loaded = load_recipe(recipe)
    first = loaded.text.splitlines()[0]
    schema = first.removeprefix("# yaml-language-server: $schema=")
    assert (recipe.parent / schema).resolve() == ROOT / "recipes" / "recipe.schema.json"
    assert all(word in loaded.text for word in ("# Purpose:", "# Needs:", "# Run:"))


def test_there_are_recipes():
    assert len(RECIPES) >= 3


def test_generated_pages_and_schemas_are_up_to_date():
    for file, text in docs_script().wanted().items():
        assert file.read_text(encoding="utf-8") == text, f"{file}: run `make docs`"


def test_every_room_of_the_package_stands_in_the_file_tree():
    tree = section("README.md", "Files")
    rooms = [p.name for p in (ROOT / "mediator_cli").iterdir() if p.is_dir() and (p / "__init__.py").exists()]
    assert rooms
    assert [room for room in rooms if f"{room}/" not in tree] == []


def test_every_make_target_named_in_the_readme_exists():
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(blocks((ROOT / "README.md").read_text(), "bash"))))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named
    assert named <= targets


def test_the_example_method_of_the_guide_works(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    code = blocks((ROOT / "mediator_cli" / "methods" / "README.md").read_text(encoding="utf-8"), "python")[0]
    names: dict = {}
    exec(compile(code, "methods/README.md", "exec"), names)
    torch = names["torch"]
    assert names["largest"](torch.tensor([[1.0, -3.0], [2.0, 1.0]]), torch.ones(2)).tolist() == [2.0, -3.0]
    assert registry.get_method("largest").identity_at_one
