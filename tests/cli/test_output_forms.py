"""What the commands print: JSON for programs, plain text in pipes, nothing when quiet."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from mediator_cli import read_bundle
from mediator_cli.methods.registry import methods
from mediator_cli.recipe.schema import Recipe

UNITS = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(3)), "model.norm"]
# To measure this machine takes seconds; tests/pipeline/test_forecast.py is where that is the point.
PLAN = ("plan", "recipe.yaml", "--no-calibrate")
DENSE_BYTES = 2 * (20 * 8 + 3 * (64 + 32 + 32 + 64 + 3 * 96 + 16) + 8)


@pytest.fixture
def answer(workshop, mediator):
    """Call a command with --json over a recipe that routes all, and parse its answer."""
    workshop.recipe(assign={"rule": "all"}, average={"method": "ties"})

    def ask(*words):
        run = mediator(*words, "--json")
        assert run.code == 0, run.err
        return json.loads(run.out)

    return ask


def test_validate_answers_in_json(answer):
    assert answer("validate", "recipe.yaml") == {"valid": True, "problems": [], "notices": []}


def test_plan_answers_in_json(answer, workshop):
    report = answer(*PLAN)
    assert (report["n_layers"], report["n_units"], report["n_tensors"]) == (3, 5, 29)
    assert report["assignment"] == "route 5 of 5 units: all candidates"
    assert report["dense_bytes"] == DENSE_BYTES
    assert report["output"] == str(workshop.folder / "recipe")
    assert [(m["method"], m["parameters"]["density"], m["n_tensors"]) for m in report["methods"]] == [("ties", 0.2, 29)]
    assert report["differences"] == []


def test_merge_answers_in_json(answer, workshop):
    report = answer("merge", "recipe.yaml", "-o", "out")
    manifest = read_bundle(workshop.folder / "out").manifest
    assert report["bundle"] == str(workshop.folder / "out")
    assert report["digest"] == manifest.digest
    assert report["assignment"] == dict.fromkeys(UNITS, "route")
    assert list(report["scores"]) == UNITS
    assert report["sizes"] == {"dense": DENSE_BYTES, "sparse": manifest.sizes.sparse, "full_models": 2 * DENSE_BYTES}


def test_inspect_answers_in_json_for_a_bundle(answer, workshop):
    answer("merge", "recipe.yaml", "-o", "out")
    report = answer("inspect", "out")
    assert (report["kind"], report["n_tensors"], report["bytes"]) == ("bundle", 29, DENSE_BYTES)
    assert report["manifest"] == read_bundle(workshop.folder / "out").manifest.model_dump(mode="json")
    assert report["config"]["num_hidden_layers"] == 3


def test_inspect_answers_in_json_for_a_checkpoint(answer):
    report = answer("inspect", "base")
    assert (report["kind"], report["n_tensors"], report["manifest"]) == ("checkpoint", 29, None)
    group = next(group for group in report["groups"] if group["kind"] == "*.self_attn.q_proj.weight")
    assert group == {**group, "dtype": "BF16", "shape": [8, 8], "n_tensors": 3, "bytes": 3 * 64 * 2}
    assert {tensor["file"] for tensor in report["tensors"]} == {"model.safetensors"}


def test_inspect_answers_in_json_for_an_adapter(answer):
    report = answer("inspect", "lora")
    assert (report["kind"], report["n_tensors"]) == ("LoRA adapter", 3 * 7 * 2)
    assert report["config"] == {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}


def test_verify_answers_in_json(answer):
    answer("merge", "recipe.yaml", "-o", "out")
    assert answer("verify", "out") == {"valid": True, "problems": [], "unknown_files": []}


def test_methods_answers_in_json(answer):
    known = answer("methods")
    assert [method["name"] for method in known] == list(methods())
    assert {"dare_linear", "dare_ties", "linear", "slerp", "task_arithmetic", "ties"} <= set(methods())


def test_one_method_answers_in_json(answer):
    method = answer("methods", "ties")
    assert method["parameters"]["density"]["default"] == 0.2
    assert method["presets"] == {name: dict(values) for name, values in methods()["ties"].presets.items()}
    assert {"mergekit", "fusion_bench"} <= set(method["presets"])
    assert method["reference"] == "https://arxiv.org/abs/2306.01708"


def test_an_unknown_method_is_refused_with_a_suggestion(refused):
    refused("", "unknown merge method 'tise'", "did you mean 'ties'?", "methods", "tise")


def test_analyze_conflicts_answers_in_json_what_it_writes(answer, workshop):
    report = answer("analyze-conflicts", "recipe.yaml", "-o", "c.json")
    assert report == json.loads((workshop.folder / "c.json").read_text())
    assert report["experts"] == ["a", "b"]
    assert list(report["units"]) == UNITS
    assert report["tensors"]["model.norm.weight"]["size"] == 8


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_analyze_conflicts_draws_a_picture(workshop, mediator, suffix):
    workshop.recipe()
    assert mediator("analyze-conflicts", "recipe.yaml", "--plot", f"heat.{suffix}").code == 0
    picture = (workshop.folder / f"heat.{suffix}").read_bytes()
    assert picture.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in picture


def test_json_is_all_that_stands_on_standard_output(answer, mediator):
    run = mediator("merge", "recipe.yaml", "-o", "out", "--json")
    assert run.out.startswith("{")
    assert run.out.endswith("}\n")


@pytest.mark.parametrize("command", ["merge", "analyze-conflicts"])
def test_quiet_prints_nothing(workshop, mediator, command):
    workshop.recipe(average={"method": "slerp"}, experts=[{"name": n, "model": "./base"} for n in ("a", "b")])
    run = mediator(command, "recipe.yaml", "--quiet")
    assert (run.code, run.out, run.err) == (0, "", "")


@pytest.mark.parametrize(
    "words",
    [
        ("validate", "recipe.yaml"),
        PLAN,
        ("merge", "recipe.yaml", "-o", "out"),
        ("merge", "recipe.yaml", "-o", "base"),
        ("analyze-conflicts", "recipe.yaml"),
        ("inspect", "base"),
        ("methods",),
        ("methods", "ties"),
        ("schema",),
        ("--help",),
        ("merge", "--help"),
        ("merge", "--nonsense"),
    ],
)
def test_no_colour_codes_go_to_a_pipe(workshop, mediator, words):
    workshop.recipe()
    run = mediator(*words)
    assert "\x1b" not in run.out + run.err
    assert run.out + run.err


def test_progress_is_one_plain_line_a_stage_in_a_pipe(workshop, mediator):
    workshop.recipe(assign={"rule": "all"})
    stages = [line.split(":")[0] for line in mediator("merge", "recipe.yaml").err.splitlines()]
    assert stages == ["survey", "merge"]


def test_the_digest_at_the_end_is_the_same_for_the_same_recipe(workshop, mediator):
    workshop.recipe(assign={"rule": "all"})
    runs = [mediator("merge", "recipe.yaml", "-o", f"out{n}", "--workers", n).out for n in (1, 3)]
    first, second = (run.split("digest ")[1][:64] for run in runs)
    assert first == second == read_bundle(workshop.folder / "out1").manifest.digest


def test_the_module_runs_as_a_program_and_knows_its_version():
    run = subprocess.run([sys.executable, "-m", "mediator_cli", "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"mediator {version('mediator-merge')}\n")


def test_no_words_at_all_print_the_help(mediator):
    run = mediator()
    assert "analyze-conflicts" in run.out + run.err


def test_a_wrong_option_is_the_users_to_mend(mediator):
    run = mediator("merge", "recipe.yaml", "--workers", "0")
    assert run.code == 2
    assert "--workers" in run.err


def resolved(schema, node):
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def test_the_recipe_schema_names_every_key_and_every_method(mediator):
    schema = json.loads(mediator("schema").out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    choices = [resolved(schema, item) for item in schema["$defs"]["AverageSpec"]["oneOf"]]
    assert [choice["properties"]["method"]["const"] for choice in choices] == list(methods())


def test_the_recipe_schema_names_every_parameter_of_a_method(mediator):
    schema = json.loads(mediator("schema", "recipe").out)
    for name, method in methods().items():
        known = schema["$defs"][f"average_{name}"]["properties"]
        assert set(known) == {"method", "preset", *method.schema.model_fields}
        assert known["preset"]["enum"] == ["paper", *method.presets]


def test_every_reference_in_a_schema_leads_somewhere(mediator):
    for kind in ("recipe", "manifest", "conflicts"):
        text = mediator("schema", kind).out
        wanted = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
        assert wanted <= set(json.loads(text)["$defs"])


@pytest.mark.parametrize(("kind", "file"), [("manifest", "routing_manifest.json"), ("conflicts", "conflicts.json")])
def test_the_other_schemas_name_what_a_bundle_holds(workshop, mediator, kind, file):
    written = json.loads((workshop.merge("out") / file).read_text())
    schema = json.loads(mediator("schema", kind).out)
    # What experts share, MoEs, gates and changes since the merge are told only where there are some: versions 3 to 5.
    assert set(schema["properties"]) - {"shared", "moe", "gates", "history"} == set(written)
    version = schema["properties"]["schema_version"]
    assert version.get("enum", [version.get("const")])[0] == written["schema_version"] == 2


def test_plan_tells_weights_that_are_not_all_one(answer, mediator, workshop):
    assert answer(*PLAN)["weights"] == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert "\n weights" not in mediator(*PLAN).out
    words = (*PLAN, "--set", "experts[0].weight=[0.2, 1]")
    assert answer(*words)["weights"] == {"a": [0.2, 1.0], "b": [1.0, 1.0]}
    row = next(line for line in mediator(*words).out.splitlines() if line.startswith(" weights"))
    assert row.split() == ["weights", "a", "0.2", "to", "1;", "b", "1"]


def test_plan_tells_no_weights_of_stacked_layers(answer, mediator, workshop):
    copied, merged = {"source": "base", "layers": "0-1"}, [{"source": name, "layers": 1} for name in "ab"]
    merged[1]["weight"] = 0.5
    workshop.recipe(assign={"rule": "none"}, slices=[copied, {"sources": merged}])
    assert answer(*PLAN)["weights"] == {}
    assert "\n weights" not in mediator(*PLAN).out
