"""From a recipe to a folder: rows by token, bodies bit for bit, exactness of the start, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_json, edit_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from unlike_models import LETTERS, byte_level, pieces, write_model, write_recipe

import mediator_cli.moe.heterogeneous  # noqa: F401 - teaches the Auto classes
from mediator_cli.cli.app import main
from mediator_cli.errors import CheckpointError, MediatorError, OutputError, RecipeError
from mediator_cli.pipeline.heterogeneous.make import plan_heterogeneous
from mediator_cli.pipeline.heterogeneous.write import merge_heterogeneous
from mediator_cli.pipeline.settings import Settings
from mediator_cli.recipe.heterogeneous import load_heterogeneous

OTHER_LETTERS = "ghijklmnop"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unlike")
    write_model(folder / "one", "llama", byte_level(extra=("<tool>",)), 1, tie_word_embeddings=True)
    write_model(folder / "two", "gpt_neox", pieces(OTHER_LETTERS, ("<call>",)), 2, hidden_size=24)
    write_model(folder / "biased", "phi", byte_level(), 3)
    for name, letters in (("one", LETTERS[:6]), ("two", OTHER_LETTERS[:6])):
        texts = [" ".join(letters[n : n + 2]) for n in range(5)] + [f"{a} {b}" for a in letters for b in letters]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return folder


def build(models: Path, experts=None, name: str = "out", changes=(), **fields) -> Path:
    recipe = write_recipe(models, experts or {"one": "one", "two": "two"}, **fields)
    plan = plan_heterogeneous(load_heterogeneous(recipe, changes))
    return merge_heterogeneous(plan, models / name, Settings(overwrite=True))[0]


def problems(models: Path, experts=None, **fields) -> list[tuple[int, str, str]]:
    with pytest.raises(MediatorError) as caught:
        build(models, experts, **fields)
    found = caught.value.problems
    return [(int(p.place.split(":")[1].split(" ")[0]), f"{p.place} {p.message}", p.hint) for p in found]


def one_token_texts(folder: Path, letters: str) -> dict[str, int]:
    """Give the ids of all single letters and spaced letters by what they stand for, asked of the tokenizer itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for letter in letters for text in (letter, f" {letter}")] + ["\n"]
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
    return {text: found[0] for text, found in ids.items() if len(found) == 1}


@pytest.mark.parametrize("width", ["max", "sum"])
def test_rows_are_matched_by_what_a_token_stands_for(models, width):
    out = load_file(build(models, width=width) / "model.safetensors")
    one, two = (load_file(models / name / "model.safetensors") for name in ("one", "two"))
    ids, theirs = one_token_texts(models / "one", LETTERS), one_token_texts(models / "two", OTHER_LETTERS)
    assert set(LETTERS) & set(OTHER_LETTERS) == set("ghijkl")
    used = [theirs[text] for text in ids if text in theirs] + [
        AutoTokenizer.from_pretrained(models / "two").eos_token_id
    ]
    used.append(AutoTokenizer.from_pretrained(models / "two").convert_tokens_to_ids("<out>"))
    # The space alone is ▁ there and Ġ here.
    used.append(AutoTokenizer.from_pretrained(models / "two").convert_tokens_to_ids("▁"))
    for ours, other in (
        ("embed.weight", "gpt_neox.embed_in.weight"),
        ("head.weight", "embed_out.weight"),
    ):
        first = one["model.embed_tokens.weight"]
        for text, number in ids.items():
            known = text in theirs
            if width == "max":
                expected = torch.zeros(24)
                expected[:16] += first[number]
                expected = (expected + two[other][theirs[text]]) / 2 if known else expected
            else:
                mean = two[other][used].double().mean(dim=0).float()
                expected = torch.cat([first[number], two[other][theirs[text]] if known else mean])
            torch.testing.assert_close(out[ours][number], expected, rtol=0, atol=1e-6, msg=text)
    end, their_end = (AutoTokenizer.from_pretrained(models / name).eos_token_id for name in ("one", "two"))
    part = out["head.weight"][end, -24:] if width == "sum" else out["head.weight"][end] * 2
    rest = 0 if width == "sum" else torch.nn.functional.pad(one["model.embed_tokens.weight"][end], (0, 8))
    torch.testing.assert_close(part - rest, two["embed_out.weight"][their_end], rtol=0, atol=1e-6)


def test_bodies_are_copied_bit_for_bit_and_projectors_start_at_nothing(models):
    out = load_file(build(models) / "model.safetensors")
    for number, (name, prefix, outside) in enumerate((("one", "model.", 1), ("two", "gpt_neox.", 2))):
        own = load_file(models / name / "model.safetensors")
        copied = {key: value for key, value in out.items() if key.startswith(f"experts.{number}.body.")}
        assert len(copied) == len(own) - outside
        for key, value in copied.items():
            assert torch.equal(value, own[prefix + key.removeprefix(f"experts.{number}.body.")])
    projectors = [value for key, value in out.items() if ".proj_" in key]
    assert len(projectors) == 8
    assert not any(value.any() for value in projectors)


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {name: found for name, found in info.items() if found} == {}
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize(
    "kind", ["llama", "gpt_neox", "gpt2", "gemma3_text", "phi", "mixtral", "granite", "cohere", "bloom", "deepseek_v3"]
)
def test_one_expert_of_any_architecture_starts_as_itself(models, kind):
    extra = {"granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0}, "cohere": {"logit_scale": 0.25}}
    extra["deepseek_v3"] = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "kv_lora_rank": 8, "n_group": 1,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "topk_group": 1,
        "num_key_value_heads": 2, "first_k_dense_replace": 1,
    }  # fmt: skip
    folder = write_model(models / kind, kind, byte_level(), **extra.get(kind, {}))
    out = build(models, {"only": kind}, f"out-{kind}")
    ids = torch.randint(0, 26, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = logits_of(folder, ids)
    torch.testing.assert_close(logits_of(out, ids), expected, rtol=0, atol=3e-6 * expected.abs().max().item())


def test_side_by_side_each_expert_starts_as_itself(models):
    shutil.copytree(models / "one", models / "three", dirs_exist_ok=True)
    edit_tensors(models / "three/model.safetensors", lambda t: t.update({k: v + 0.05 for k, v in t.items()}))
    out = build(models, {"one": "one", "three": "three"}, width="sum")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(0, 26, (2, 6), generator=torch.Generator().manual_seed(1))
    for number, name in enumerate(("one", "three")):
        with torch.no_grad():
            found = model(ids, mixture=torch.eye(2)[number].expand(2, 2)).logits
        torch.testing.assert_close(found, logits_of(models / name, ids), rtol=0, atol=1e-5)


def test_head_biases_of_one_family_count_for_the_tokens_that_it_knows(models):
    out = load_file(build(models, {"one": "one", "biased": "biased"}) / "model.safetensors")
    bias = load_file(models / "biased/model.safetensors")["lm_head.bias"]
    expected = torch.zeros(len(out["head.bias"]))
    expected[: len(bias)] = bias / 2
    torch.testing.assert_close(out["head.bias"], expected, rtol=0, atol=1e-7)


def test_the_union_has_the_added_tokens_of_all(models):
    folder = build(models, added_tokens="union")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("a<call>") == [0, len(tokenizer) - 1]
    two = AutoTokenizer.from_pretrained(models / "two")
    row = load_file(models / "two/model.safetensors")["gpt_neox.embed_in.weight"][two.convert_tokens_to_ids("<call>")]
    stored = load_file(folder / "model.safetensors")["embed.weight"]
    # The other's end of text has another text, so it is a token of its own here, too.
    assert len(stored) == len(tokenizer) == len(AutoTokenizer.from_pretrained(models / "one")) + 2
    assert torch.equal(stored[-1, -24:], row)


@pytest.mark.parametrize("init", ["prototype", "logistic"])
def test_the_router_starts_from_prompts(models, init):
    recipe = {"experts": [{"name": n, "model": n, "prompts": f"{n}.jsonl"} for n in ("one", "two")]}
    folder = build(models, router={"init": init}, top_k=2, changes=[f"experts={json.dumps(recipe['experts'])}"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for number, text in enumerate(("a c b", "k i h")):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_tensors="pt", return_dict=True)
        assert model(**ids).mixture[0, number] > 0.6


def test_random_projectors_keep_the_size_of_states(models):
    out = load_file(
        build(models, width="max", projectors={"init": "random", "depth": 2, "width": 40}) / "model.safetensors"
    )
    weights = [out[f"experts.1.proj_in.layers.{n}.weight"] for n in (0, 1)]
    assert [tuple(weight.shape) for weight in weights] == [(40, 24), (24, 40)]
    for weight in weights:
        assert abs(weight.std().item() * np.sqrt(weight.shape[1]) - 1) < 0.1
    again = load_file(
        build(models, width="max", projectors={"init": "random", "depth": 2, "width": 40}) / "model.safetensors"
    )
    assert all(torch.equal(out[name], again[name]) for name in out)
    other = load_file(build(models, width="max", projectors={"init": "random"}, seed=1) / "model.safetensors")
    assert not torch.equal(other["router.weight"], out["router.weight"])


def test_shards_and_a_smaller_dtype(models):
    whole = load_file(build(models) / "model.safetensors")
    folder = build(models, output={"shard_size": 10_000, "dtype": "bfloat16"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(stored[name], value.to(torch.bfloat16)) for name, value in whole.items())
    ids = torch.tensor([[1, 2, 3]])
    assert logits_of(folder, ids).dtype == torch.bfloat16


def test_models_that_can_be_no_expert_are_named_all_at_once(models):
    write_model(models / "encoder", "bert", byte_level())
    write_model(models / "capped", "gemma2", byte_level())
    write_model(models / "states", "mamba", byte_level())
    shutil.copytree(models / "one", models / "bare", dirs_exist_ok=True)
    for file in (models / "bare").glob("tokenizer*"):
        file.unlink()
    (models / "adapter").mkdir(exist_ok=True)
    (models / "adapter/adapter_config.json").write_text("{}")
    names = ("encoder", "capped", "states", "bare", "adapter", "missing")
    found = problems(models, {name: name for name in names}, top_k=7)
    text = "\n".join(message for _, message, _ in found)
    for part in (
        "bert can be no expert: it is an encoder",
        "gemma2 can be no expert: it does more than a linear head to its logits (`final_logit_softcapping: 30.0`)",
        "mamba can be no expert: it does not take `past_key_values`",
        "brings no tokenizer",
        "is an adapter",
        "no such folder",
        "7 experts are to answer, the recipe has 6",
    ):
        assert part in text
    assert all("causal language models" in hint for _, message, hint in found if "no expert" in message)
    assert [line for line, _, _ in found] == sorted(line for line, _, _ in found)


def test_missing_tensors_are_told(models):
    shutil.copytree(models / "one", models / "torn", dirs_exist_ok=True)
    edit_tensors(models / "torn/model.safetensors", lambda t: t.pop("model.norm.weight"))
    assert "llama can be no expert: it lacks the tensor model.norm.weight" in problems(models, {"torn": "torn"})[0][1]


def test_prompts_that_are_missing_are_named(models):
    found = problems(models, router={"init": "logistic"})
    assert [message.split(" router")[1] for _, message, _ in found] == [
        f".init logistic needs prompts of every expert, {name} has none" for name in ("one", "two")
    ]
    assert all("init: random" in hint for _, _, hint in found)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_number_that_is_none_stops_and_leaves_nothing(models, name):
    shutil.copytree(models / "one", models / "broken", dirs_exist_ok=True)
    edit_tensors(models / "broken/model.safetensors", lambda t: t[name].view(-1)[5].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="expert broken is nan at flat index 5"):
        build(models, {"broken": "broken"}, "from-broken")
    assert not [path for path in models.iterdir() if "from-broken" in path.name]


def test_numbers_too_large_for_the_dtype_are_told(models):
    shutil.copytree(models / "one", models / "large", dirs_exist_ok=True)
    edit_tensors(models / "large/model.safetensors", lambda t: t["model.norm.weight"].fill_(1e6))
    with pytest.raises(OutputError, match="not finite in F16"):
        build(models, {"large": "large"}, "from-large", output={"dtype": "float16"})


def test_faults_of_form_are_told_together(models):
    recipe = write_recipe(models, {"a": "one", "A": "one"}, base="x", tokenizer="expert:c", projectors={"width": 3})
    with pytest.raises(RecipeError) as caught:
        load_heterogeneous(recipe, ["router.init=protoype"])
    text = str(caught.value)
    for part in ("expert names must differ", "no base in common", "one layer has no inner width", "--set router.init"):
        assert part in text


def test_counts_of_experts_from_1_to_64(models):
    many = {f"e{n}": "one" for n in range(65)}
    with pytest.raises(RecipeError, match="at most 64"):
        load_heterogeneous(write_recipe(models, many))
    del many["e64"]
    assert len(load_heterogeneous(write_recipe(models, many)).recipe.experts) == 64
    with pytest.raises(RecipeError, match="at least 1"):
        load_heterogeneous(write_recipe(models, {}))


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mediator", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_commands_tell_what_they_do(models, monkeypatch, capsys):
    recipe = str(write_recipe(models, {"one": "one", "two": "two"}))
    assert run(monkeypatch, "validate", recipe, "--json") == 0
    assert json.loads(capsys.readouterr().out)["valid"]
    assert run(monkeypatch, "plan", recipe, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert run(monkeypatch, "merge", recipe, "-o", str(models / "told"), "--json", "-q") == 0
    written = json.loads(capsys.readouterr().out)
    stored = load_file(models / "told/model.safetensors").values()
    assert plan["parameters"] == written["parameters"] == sum(tensor.numel() for tensor in stored)
    assert plan["write_bytes"] == sum(tensor.nbytes for tensor in stored)
    assert run(monkeypatch, "merge", recipe, "-o", str(models / "told")) == 2
    assert run(monkeypatch, "merge", recipe, "--resume") == 2
    assert run(monkeypatch, "validate", recipe, "--set", "top_k=3") == 2
    assert run(monkeypatch, "analyze-conflicts", recipe) == 2
    said = capsys.readouterr().err
    for part in ("exists", "--resume: does not go with", "3 experts are to answer", "only `mediator validate`"):
        assert part in said


def test_a_config_without_model_type_is_told(models):
    shutil.copytree(models / "one", models / "unnamed", dirs_exist_ok=True)
    edit_json(models / "unnamed/config.json", model_type=None)
    assert "can be no expert" in problems(models, {"unnamed": "unnamed"})[0][1]


@pytest.mark.parametrize("what", ["gates", "projectors", "all"])
def test_training_changes_what_was_asked_and_nothing_else(models, what):
    from mediator_cli.moe.train.run import train
    from mediator_cli.moe.train.settings import TrainSettings

    row = namedtuple("row", "prompt answer")
    folder, target = build(models, name="untrained", top_k=2), models / f"trained-{what}"
    rows = {"one": [row("a b c", "d e"), row("c b", "a")] * 4, "two": [row("g h", "i")] * 8}
    settings = TrainSettings(what=what, steps=4, batch=4, learning_rate=1e-2, held_out=0, load_balance=0.01)
    report = train(folder, rows, target, settings)
    before, after = (load_file(each / "model.safetensors") for each in (folder, target))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {"gates": ("router",), "projectors": ("router", ".proj_"), "all": ("",)}[what]
    assert changed == {name for name in changed if any(part in name for part in wanted)}
    assert {name.split(".")[-2] for name in changed} >= {"router"}
    assert report.losses[-1] < report.losses[0]
    assert AutoModelForCausalLM.from_pretrained(target).config.expert_names == ("one", "two")
