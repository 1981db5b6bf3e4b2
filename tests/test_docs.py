"""What is documented is executed: README, recipes, generated pages."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from conftest import fine_tune, random_tensors, write_adapter, write_checkpoint
from tiny_tokens import FILMS, SUMS, task_prompts, word_tokenizer, write_prompts

from mediator_cli import load_recipe, make_plan, merge
from mediator_cli.checkpoint.header import read_header
from mediator_cli.cli.app import main
from mediator_cli.compare.ablate import GROUPS
from mediator_cli.methods import registry
from mediator_cli.recipe.compare import load_compare
from mediator_cli.recipe.heterogeneous import is_heterogeneous_recipe, load_heterogeneous
from mediator_cli.recipe.router import POLICY_FIELDS

SERVING = "Serve it, export it, share it"
TALES = ("and", "the", "is", "a", "of")
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
    for folder, tensors in (("base", base), ("maths", fine_tune(base, 1))):
        write_checkpoint(tmp_path / folder, tensors)
        (tmp_path / folder / "chat_template.jinja").unlink()
        word_tokenizer().save_pretrained(tmp_path / folder)
    write_adapter(tmp_path / "sarcasm-lora", 2)
    for name in ("maths", "sarcasm"):
        write_adapter(tmp_path / "adapters" / name, 3)
    for name, words in (("maths", SUMS), ("sarcasm", FILMS)):
        prompts = task_prompts(words)
        write_prompts(tmp_path / f"{name}.train.jsonl", prompts[:-4])
        rows = [{"prompt": prompt, "answer": words[0], "choices": list(words[:2])} for prompt in prompts[-4:]]
        (tmp_path / f"{name}.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(blocks(section("README.md", "One recipe from start to finish"), "yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def readme_bundle(readme_folder):
    return merge(make_plan(load_recipe(readme_folder / "recipe.yaml")), readme_folder / "bundle")


def commands(title: str) -> list[str]:
    return [line for line in blocks(section("README.md", title), "bash")[0].splitlines() if line.startswith("mediator")]


def printed(code: str, page: str, capsys) -> tuple[str, dict]:
    names: dict = {}
    capsys.readouterr()
    exec(compile(code, page, "exec"), names)
    return capsys.readouterr().out, names


def run(line: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0, line


def test_the_readme_recipe_runs_from_start_to_finish(readme_folder, monkeypatch, capsys):
    lines = commands("One recipe from start to finish")
    assert len(lines) == 9
    for line in lines:
        run(line, monkeypatch)
    assert "is valid: 2 experts" in capsys.readouterr().out
    manifests = {
        name: json.loads((readme_folder / name / "routing_manifest.json").read_text())
        for name in ("bundle", "by-conflict", "static")
    }
    n_routed = {name: list(m["assignment"].values()).count("route") for name, m in manifests.items()}
    assert n_routed["static"] == 0 < n_routed["by-conflict"] < n_routed["bundle"] == 3
    assert manifests["bundle"]["router"]["experts"] == ["maths", "sarcasm"]
    assert manifests["static"]["router"] is None


def test_the_readme_python_example_gives_a_mixture(readme_folder):
    code = blocks(section("README.md", "One recipe from start to finish"), "python")[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["weight"].shape == (12, 8)
    assert (readme_folder / "from-python" / "routing_manifest.json").is_file()


def test_the_readme_commands_answer(readme_bundle, monkeypatch, capsys):
    lines = commands("Answer with a bundle")
    assert {line.split()[1] for line in lines} == {"route", "generate", "chat", "fit-router"}
    for line in lines:
        monkeypatch.setattr(sys, "stdin", io.StringIO("two apples\n/quit\n"))
        run(line, monkeypatch)
    shown = capsys.readouterr()
    assert "uncertainty" in shown.out
    assert "maths 0.30 + sarcasm 0.70" in shown.err
    manifest = json.loads((readme_bundle / "routing_manifest.json").read_text())
    assert manifest["router"]["policy"]["rule"] == "posterior"


def test_the_readme_python_example_answers(readme_bundle, capsys):
    text, names = printed(blocks(section("README.md", "Answer with a bundle"), "python")[0], "README.md", capsys)
    assert names["routing"].experts == ("maths", "sarcasm")
    assert "uncertainty" in text
    n_prompt = names["inputs"]["input_ids"].shape[1]
    assert names["logits"].shape == (1, n_prompt, 20)
    assert names["answer"].shape[1] > n_prompt
    assert names["chosen"].shape[1] > n_prompt


@pytest.mark.slow
def test_the_readme_commands_measure(readme_bundle, readme_folder, monkeypatch, capsys):
    static = make_plan(load_recipe(readme_folder / "recipe.yaml", ("assign.rule=none",)))
    merge(static, readme_folder / "static")
    lines = commands("Is it worth it?")
    assert [line.split()[1] for line in lines] == ["evaluate", "evaluate", "ablate"]
    for line in lines:
        # All groups of an ablation build too many bundles for a test.
        few = " --limit 1 --group static --group policy" if "ablate" in line else ""
        run(line.partition("#")[0] + few, monkeypatch)
    shown = capsys.readouterr().out
    assert all(f"{name} against base on the mean over tasks" in shown for name in ("static", "bundle::oracle"))
    table = (readme_folder / "ablation.md").read_text()
    assert all(f"| {name} |" in table for name in ("base", "oracle experts", "static linear", "policy uniform"))
    assert (readme_folder / "results.md").is_file()


def test_the_examples_of_the_run_time_page_print_what_it_says(readme_bundle, capsys):
    page = "mediator_cli/runtime/README.md"
    text = (ROOT / page).read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == len(blocks(text, "python")) >= 2
    for code, expected in examples:
        assert printed(code, page, capsys)[0] == expected


def test_the_policies_of_the_run_time_page_are_those_there_are():
    table = section("mediator_cli/runtime/README.md", "Policies")
    named = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert tuple(named) == tuple(POLICY_FIELDS)


def test_the_arrays_of_a_router_stand_in_the_page_of_the_format(readme_bundle, monkeypatch):
    run("mediator fit-router bundle --classifier ridge", monkeypatch)
    stored = {info.name: info for info in read_header(readme_bundle / "router.safetensors").tensors}
    sizes = {"T": 2, "n": 8, "k": stored["outside.directions"].shape[0]}
    table = section("mediator_cli/bundle/README.md", "The router")
    said = {}
    for name, dtype, shape in re.findall(r"^\| `(\w+\.\w+)` \| (F32|F64) \| \[(.*?)\] \|", table, flags=re.MULTILINE):
        entries = shape.replace("·", "*").replace("/", "//").split(", ")
        said[name] = (dtype, tuple(eval(entry, sizes) for entry in entries))
    assert said == {name: (info.dtype, info.shape) for name, info in stored.items()}


def test_the_example_of_the_evaluation_page_is_read_and_scored(readme_bundle, readme_folder, capsys):
    page = "mediator_cli/evaluate/README.md"
    text = (ROOT / page).read_text(encoding="utf-8")
    (readme_folder / "maths.test.jsonl").write_text(blocks(text, "json")[0])
    _, names = printed(blocks(text, "python")[0], page, capsys)
    (task,) = names["tasks"]
    assert (task.name, len(task.rows)) == ("maths", 3)
    assert [model.name for model in names["report"].models] == ["base", "bundle", "bundle::maths"]


def test_the_groups_of_an_ablation_stand_in_the_evaluation_page():
    table = section("mediator_cli/evaluate/README.md", "Ablation")
    assert tuple(re.findall(r"^\| `([\w ]+)` \|", table, flags=re.MULTILINE)) == GROUPS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_valid_form_and_a_schema_line(recipe):
    is_heterogeneous = is_heterogeneous_recipe(recipe)
    is_comparison = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("kind") == "compare"
    if is_comparison and not (recipe.parent / "../../demo/tradeoffs").is_dir():
        pytest.skip("its folders of adapters and rows are made by make tradeoffs-adapters")
    loaded = (load_heterogeneous if is_heterogeneous else load_compare if is_comparison else load_recipe)(recipe)
    first = loaded.text.splitlines()[0]
    schema = first.removeprefix("# yaml-language-server: $schema=")
    kind = "heterogeneous" if is_heterogeneous else "compare" if is_comparison else "recipe"
    wanted = f"{kind}.schema.json"
    assert (recipe.parent / schema).resolve() == ROOT / "recipes" / wanted
    assert all(word in loaded.text for word in ("# Purpose:", "# Needs:", "# Run:"))


@pytest.mark.parametrize("snippet", blocks((ROOT / "recipes" / "README.md").read_text(encoding="utf-8"), "yaml"))
def test_the_ways_to_route_of_the_recipes_page_are_valid(snippet, readme_folder):
    whole = yaml.safe_load((readme_folder / "recipe.yaml").read_text()) | yaml.safe_load(snippet)
    (readme_folder / "recipe.yaml").write_text(yaml.safe_dump(whole))
    plan = make_plan(load_recipe(readme_folder / "recipe.yaml"))
    assert plan.router is not None or plan.inputs


def test_every_test_that_the_page_of_checkpoints_names_exists():
    table = section("mediator_cli/checkpoint/README.md", "What goes wrong elsewhere")
    named = set(re.findall(r"`(test_\w+)`", table))
    there = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)}  # fmt: skip # noqa: E501
    assert len(named) > 20
    assert named <= there, named - there


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.slow
def test_the_readme_commands_compare_a_library_of_adapters(readme_folder, monkeypatch, capsys):
    recipe = blocks(section("README.md", "A library of adapters"), "yaml")[0]
    (readme_folder / "compare.yaml").write_text(recipe.replace("train: 200, valid: 20, test: 20", "test: 2"))
    write_adapter(readme_folder / "tales-lora", 4)
    write_prompts(readme_folder / "tales.train.jsonl", task_prompts(TALES))
    data = readme_folder / "data"
    data.mkdir()
    for name, words in (("maths", SUMS), ("sarcasm", FILMS), ("unseen", TALES)):
        rows = [{"prompt": prompt, "answer": words[0]} for prompt in task_prompts(words)]
        for split in ("train", "valid", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (data / f"{name}.{split}.jsonl").write_text(lines)
    lines = commands("A library of adapters")
    assert [line.split()[1] for line in lines] == ["compare", "compare", "generate", "add-expert", "remove-expert"]
    for line in lines:
        run(line, monkeypatch)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("merge_uniform", "route_arrow", "held out"))
    assert (readme_folder / "compared.html").is_file()
    manifest = json.loads((readme_folder / "library" / "routing_manifest.json").read_text())
    assert [expert["name"] for expert in manifest["experts"]] == ["maths", "sarcasm"]
    assert [change["change"] for change in manifest["history"]] == ["added", "removed"]


def test_the_readme_commands_export_and_push(readme_folder, readme_bundle, monkeypatch, capsys):
    lines = [line for line in blocks(section("README.md", SERVING), "bash")[2].splitlines() if line]
    assert [line.split()[1] for line in lines] == ["export"] * 5 + ["push"]
    for line in lines:
        run(line, monkeypatch)
    assert read_header(readme_folder / "maths-model" / "model.safetensors").tensors
    adapters = sorted(
        file.parent.name for file in (readme_folder / "bundle-adapters").rglob("adapter_model.safetensors")
    )
    assert adapters == ["maths", "sarcasm"]
    assert (readme_folder / "for-vllm" / "serve.sh").is_file()
    for line in blocks(section("mediator_cli/export/README.md", "Commands"), "sh")[0].splitlines():
        run(line, monkeypatch)
    assert sorted(path.name for path in (readme_folder / "exported").iterdir()) == ["dense", "lora", "shira"]
    assert "our-team/apples" in capsys.readouterr().out


def test_the_request_of_the_readme_is_answered(readme_bundle):
    from fastapi.testclient import TestClient

    from mediator_cli.runtime.open import open_bundle
    from mediator_cli.runtime.prompts import load_tokenizer
    from mediator_cli.serve.app import make_app
    from mediator_cli.serve.engine.engine import Limits
    from mediator_cli.serve.opened import start_serving

    serve, curl = blocks(section("README.md", SERVING), "bash")[:2]
    assert serve.startswith("mediator serve bundle ")
    url, body = re.search(r"(http://\S+) .*?-d '(.*?)'", curl, flags=re.DOTALL).groups()
    serving = start_serving(readme_bundle, open_bundle(readme_bundle), load_tokenizer(readme_bundle), Limits())
    try:
        told = TestClient(make_app(serving.engine, serving.served)).post(
            url.removeprefix("http://127.0.0.1:8000"), json=json.loads(body)
        )
    finally:
        serving.engine.close()
    assert told.status_code == 200
    assert told.json()["choices"][0]["message"]["content"]
    assert told.headers["x-mediator-mixture"] == "maths=1"


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
    np = names["np"]
    deltas = np.array([[1, -3], [2, 1]], np.float32)
    merged = names["largest"](deltas, np.ones(2))
    assert (merged.tolist(), merged.dtype) == ([2.0, -3.0], np.float32)
    assert registry.get_method("largest").identity_at_one
