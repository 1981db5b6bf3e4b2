"""What is said of routing before anything is read, and routers on architectures that are not Llama's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json, edit_tensors
from safetensors.torch import load_file
from tiny_architectures import DECODERS, EXPERTS, Family, write_family
from tiny_tokens import FILMS, SUMS, task_prompts, word_tokenizer, write_prompts

from mediator_cli import load_recipe, make_plan, merge, open_bundle
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.errors import RecipeError
from mediator_cli.pipeline import routable
from mediator_cli.pipeline.routable import check_routing
from mediator_cli.plan.model import Plan
from mediator_cli.runtime.features import FeatureSpec, prompt_features

ALL = {"assign": {"rule": "all"}}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty cache, outside the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEDIATOR_CACHE", str(folder))
    return folder


def checked(family: Family, **fields: Any) -> Plan:
    return check_routing(make_plan(load_recipe(family.recipe(**fields))))


def refusal(family: Family) -> str:
    with pytest.raises(RecipeError) as caught:
        checked(family, **ALL)
    (problem,) = caught.value.problems
    assert problem.place.endswith("recipe.yaml:1 assign.rule")
    assert problem.hint == "use assign: {rule: none}"
    checked(family, assign={"rule": "none"})
    return problem.message


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_routing_needs_a_causal_language_model(kind: str, tmp_path: Path) -> None:
    message = refusal(write_family(tmp_path, kind))
    assert message == (
        f"routing answers with a causal language model; {kind} is not one that transformers can build here: "
        "it is an encoder"
    )


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "smolvlm"])
def test_models_that_see_are_not_routed_unless_a_causal_class_reads_them(kind: str, tmp_path: Path) -> None:
    message = refusal(write_family(tmp_path, kind))
    assert f"{kind} is not one that transformers can build here: it is of another kind" in message


def test_a_model_that_sees_is_routed_where_a_causal_class_reads_it(tmp_path: Path) -> None:
    family = write_family(tmp_path, "gemma3")
    fields = {"average": {"method": "linear"}, "extract": {"density": 1.0, "values": "fp32"}}
    folder = merge(make_plan(load_recipe(family.recipe(**fields, **ALL))), tmp_path / "out")
    assert read_manifest(folder).averaged_in_routed_units == ()
    model, ids = open_bundle(folder), torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad(), model.mixing([[1.0, 0.0], [0.0, 1.0]]):
        found = model(input_ids=ids).logits
        for row, name in enumerate(EXPERTS):
            expected = family.model(name)(input_ids=ids[row : row + 1]).logits[0]
            torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=2e-5)


def test_a_model_type_that_transformers_does_not_know_is_merged_but_not_routed(tmp_path: Path) -> None:
    family = write_family(tmp_path, "llama")
    for name in ("base", *EXPERTS):
        edit_json(tmp_path / name / "config.json", model_type="novel", auto_map={"AutoConfig": "novel.Config"})
    assert "novel is not one that transformers can build here: it is not known" in refusal(family)
    folder = merge(make_plan(load_recipe(family.recipe(assign={"rule": "none"}))), tmp_path / "out")
    assert load_file(folder / "model.safetensors").keys() == family.stored("base").keys()


def test_a_config_that_cannot_be_is_told_with_the_reason(tmp_path: Path) -> None:
    family = write_family(tmp_path, "llama")
    edit_json(tmp_path / "base" / "config.json", hidden_act="no such function")
    assert "llama is not one that transformers can build here: it does not build: " in refusal(family)


def test_a_base_without_a_head_is_refused(tmp_path: Path) -> None:
    family = write_family(tmp_path, "llama")
    for name in ("base", *EXPERTS):
        edit_tensors(tmp_path / name / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    assert "the base lacks lm_head.weight" in refusal(family)


def test_a_tied_head_is_not_missed(tmp_path: Path) -> None:
    family = write_family(tmp_path, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in family.stored("base")
    assert all(tensor.mixable for tensor in checked(family, **ALL).tensors)


def test_what_cannot_be_mixed_is_told_with_counts_kinds_and_an_example(tmp_path: Path) -> None:
    family = write_family(tmp_path, "mixtral")
    plan = checked(family, **ALL)
    assert plan.notices[-1] == (
        "26 tensors are averaged even where their unit is routed, since the run time cannot mix them for each input: "
        "24 tensors that transformers fuses or reshapes as it loads them; 2 MixtralTopKRouter.weight; "
        "such as model.layers.0.block_sparse_moe.experts.0.w1.weight"
    )


def test_parameters_that_others_read_past_their_module_are_not_mixed(tmp_path: Path) -> None:
    plan = checked(write_family(tmp_path, "mamba"), **ALL)
    found = {tensor.name for tensor in plan.tensors if not tensor.mixable}
    layer = "backbone.layers.1.mixer"
    assert {f"{layer}.dt_proj.weight", f"{layer}.dt_proj.bias", f"{layer}.conv1d.weight", f"{layer}.D"} < found
    assert f"{layer}.in_proj.weight" not in found
    assert "Linear.weight, which is used without a call of its own" in plan.notices[-1]


def test_units_that_hold_nothing_that_can_be_mixed_are_no_candidates(tmp_path: Path) -> None:
    family = write_family(tmp_path, "mixtral")
    plan = checked(family, conflict={"unit": "tensor"}, **ALL)
    assert all(".experts." not in unit and ".gate." not in unit for unit in plan.candidates)
    folder = merge(plan, tmp_path / "out")
    assignment = read_manifest(folder).assignment
    assert assignment["model.layers.0.block_sparse_moe.gate.weight"] == "average"
    assert assignment["model.layers.0.self_attn.q_proj.weight"] == "route"


def test_averaged_tensors_keep_the_average_where_the_dense_expert_is_the_base(tmp_path: Path) -> None:
    family = write_family(tmp_path, "lfm2")
    extract = {"dense": "base", "density": 1.0, "values": "fp32"}
    folder = merge(
        make_plan(load_recipe(family.recipe(extract=extract, average={"method": "linear"}, **ALL))), tmp_path / "out"
    )
    found, stored = load_file(folder / "model.safetensors"), {n: family.stored(n) for n in ("base", *EXPERTS)}
    conv, other = "model.layers.0.conv.conv.weight", "model.layers.0.conv.in_proj.weight"
    torch.testing.assert_close(found[conv], (stored["a"][conv] + stored["b"][conv]) / 2)
    assert torch.equal(found[other], stored["base"][other])


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gemma2", "gpt_neox", "mamba"])
@pytest.mark.parametrize("features", ["embedding_mean", "hidden_mean"])
def test_routers_fit_and_route_on_other_architectures(kind: str, features: str, tmp_path: Path) -> None:
    family = write_family(tmp_path, kind)
    for name, words in zip(EXPERTS, (SUMS, FILMS), strict=True):
        write_prompts(tmp_path / f"{name}.jsonl", task_prompts(words, 30))
    word_tokenizer().save_pretrained(tmp_path / "base")
    experts = [{"name": n, "model": f"./{n}", "prompts": f"./{n}.jsonl"} for n in EXPERTS]
    router = {"features": features, "policy": {"rule": "argmax", "outside": "ignore"}}
    router |= {"layer": 1} if features == "hidden_mean" else {}
    folder = merge(make_plan(load_recipe(family.recipe(experts=experts, router=router, **ALL))), tmp_path / "out")
    model = open_bundle(folder)
    tokenizer = model.opened.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer(text).input_ids for text in ("two plus three", "film film plot", "two apples left")]
    assert model.route(prompts).weights.tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    found = model.generate(torch.tensor([prompts[0][:3], prompts[1][:3]]), max_new_tokens=3, pad_token_id=0)
    assert found.shape[0] == 2


@pytest.mark.parametrize("kind", DECODERS)
def test_the_hidden_mean_is_that_of_the_model_whatever_it_is(kind: str, tmp_path: Path) -> None:
    family = write_family(tmp_path, kind)
    model = family.model("base")
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    # Mamba does not list the embeddings among its hidden states.
    at = 0 if kind == "mamba" else 1
    found = prompt_features(model, word_tokenizer(), FeatureSpec("hidden_mean", 1), prompts)
    for row, prompt in zip(found, prompts, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[at][0]
        torch.testing.assert_close(torch.from_numpy(row), hidden.mean(0), atol=1e-5, rtol=1e-5)


def test_validate_and_plan_say_it_and_merge_records_it(workshop: Any, mediator: Any) -> None:
    family = write_family(workshop.folder, "lfm2")
    family.recipe(**ALL)
    said = "1 tensors are averaged even where their unit is routed"
    assert said in mediator("validate", "recipe.yaml").err
    assert said in json.loads(mediator("validate", "recipe.yaml", "--json").out)["notices"][-1]
    assert said in mediator("plan", "recipe.yaml", "--no-calibrate").err
    assert mediator("merge", "recipe.yaml", "-o", "out").err.count(said) == 1
    manifest = read_manifest(workshop.folder / "out")
    assert manifest.averaged_in_routed_units == ("model.layers.0.conv.conv.weight",)
    assert said in manifest.notices[-1]
    sizes = {name: math.prod(tensor.shape) for name, tensor in manifest.tensors.items()}
    read = json.loads(mediator("plan", "recipe.yaml", "--json", "--no-calibrate").out)["read_bytes"]
    share = 1 - sizes["model.layers.0.conv.conv.weight"] / sum(sizes.values())
    # Three passes over two experts and, beside each, the dense tensor; three sources make an average.
    assert read["extract experts"] == pytest.approx(4 * share * read["average"], abs=2)


def test_merge_refuses_before_it_reads(workshop: Any, refused: Any) -> None:
    write_family(workshop.folder, "t5").recipe(**ALL)
    refused("recipe.yaml:1 assign.rule", "t5 is not one that transformers can build", "rule: none")


def forget_how_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object, tensors: object) -> None:
        pytest.fail("the model was built again")

    monkeypatch.setattr(routable, "_ask_model", fail)


def test_what_a_model_said_is_noted(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = write_family(tmp_path, "mixtral")
    first = checked(family, **ALL)
    assert len(list((cache / "mixable").iterdir())) == 1
    forget_how_to_ask(monkeypatch)
    second = checked(family, **ALL)
    assert (second.tensors, second.candidates, second.notices) == (first.tensors, first.candidates, first.notices)


def test_that_a_parameter_is_missing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = write_family(tmp_path, "llama")
    for name in ("base", *EXPERTS):
        edit_tensors(tmp_path / name / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    first = refusal(family)
    forget_how_to_ask(monkeypatch)
    assert refusal(family) == first


def test_a_refusal_is_not_noted(tmp_path: Path, cache: Path) -> None:
    refusal(write_family(tmp_path, "bert"))
    assert not list(cache.rglob("*"))


def test_each_config_shape_and_version_has_its_own_note(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> int:
        return len(list((cache / "mixable").iterdir()))

    family = write_family(tmp_path, "llama")
    checked(family, **ALL)
    for name in ("base", *EXPERTS):
        edit_json(tmp_path / name / "config.json", rope_theta=5e5)
    checked(family, **ALL)
    assert count() == 2
    for name in ("base", *EXPERTS):
        edit_tensors(tmp_path / name / "model.safetensors", lambda t: t.update(extra=torch.zeros(2)))
    assert "extra" in {tensor.name for tensor in checked(family, **ALL).tensors if not tensor.mixable}
    assert count() == 3
    monkeypatch.setattr(routable, "version", lambda package: f"{package} of tomorrow")
    checked(family, **ALL)
    assert count() == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kinds": {"a": 1}, "missing": []}', '{"kinds": {}}', "\x00\xff"])
def test_a_damaged_note_is_ignored_and_mended(text: str, tmp_path: Path, cache: Path) -> None:
    family = write_family(tmp_path, "mamba")
    first = checked(family, **ALL)
    (note,) = (cache / "mixable").iterdir()
    whole = note.read_text()
    note.write_bytes(text.encode("latin-1"))
    assert checked(family, **ALL).tensors == first.tensors
    assert note.read_text() == whole


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("MEDIATOR_CACHE", str(cache / "file"))
    family = write_family(tmp_path, "llama")
    assert checked(family, **ALL).tensors == checked(family, **ALL).tensors
    assert (cache / "file").read_text() == ""


PROGRAM = """
import sys
from pathlib import Path
from mediator_cli import load_recipe, make_plan
from mediator_cli.pipeline.routable import check_routing
plan = check_routing(make_plan(load_recipe(Path(sys.argv[1]))))
print(plan.notices[-1])
print(*[name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_a_noted_answer_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    family = write_family(tmp_path, "mixtral")
    plan = checked(family, **ALL)
    recipe = family.recipe(**ALL)
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(recipe)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [plan.notices[-1], ""]
