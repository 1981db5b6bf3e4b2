"""Adapters on bases that are stored otherwise than the model they were trained on, and what no base can take."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import edit_json
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import (
    assert_same,
    disturb,
    gpt2,
    llama,
    merge,
    mixtral,
    open_reader,
    qwen3_moe,
    read_all,
    read_tensor,
    write,
)
from safetensors.torch import load_file, save_file

from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.errors import CheckpointError

# What PEFT and transformers warn of is their own business here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")
Q = {"target_modules": ["q_proj"]}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def tied_llama():
    return llama(tie_word_embeddings=True)


def store(folder, change):
    """Store the base's tensors in another way; gives what `change` makes of them."""
    file = folder / "base" / "model.safetensors"
    tensors = change({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(tensors, file)
    return tensors


def edit_adapter(folder, change):
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors) or tensors, file)


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder / "adapter", read_tensors(folder / "base"))
    return caught.value.problems


def renamed(tensors, *changes):
    for old, new in changes:
        tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in tensors.items()
        }
    return tensors


BF16 = {
    "LoRA": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 4}},
    "DoRA": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
}


@pytest.mark.parametrize("config", BF16.values(), ids=BF16)
def test_a_bf16_base_differs_from_peft_by_its_roundings_alone(tmp_path, config):
    kind = write(tmp_path, llama, dtype=torch.bfloat16, **config)
    merged = merge(tmp_path, kind)
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    assert_same(read_all(tmp_path), merged, 0.03)


RENAMED = {
    "no prefix": (gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": [1]}, [("transformer.", "")]),
    "below a prefix": (
        llama, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        [("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
    ),
    "between other names": (mixtral, EXPERTS, [("model.", "model.language_model.")]),
}  # fmt: skip


@pytest.mark.parametrize(("model", "config", "changes"), RENAMED.values(), ids=RENAMED)
def test_a_base_under_other_names_is_found(tmp_path, model, config, changes):
    merged = renamed(merge(tmp_path, write(tmp_path, model, **config)), *changes)
    base = store(tmp_path, lambda tensors: renamed(tensors, *changes))
    assert_same(read_all(tmp_path), merged, 1e-5)
    assert any(not torch.equal(base[name], merged[name]) for name in base)


def test_missing_layers_are_not_taken_from_another_stack(tmp_path):
    write(tmp_path, lambda: llama(num_hidden_layers=3), **Q)
    store(tmp_path, lambda t: renamed(t, ("model.layers.2.", "vision.layers.2.")))
    (problem,) = refusal(tmp_path)
    assert problem.place.endswith("adapter_model.safetensors: model.layers.2.self_attn.q_proj.weight")
    assert problem.message == "the base has no such tensor, and a merge adds none"


def fused(tensors):
    """Fuse the experts of each layer as transformers 5 holds them in memory."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        singles = [{r: tensors[f"{place}.{e}.{r}_proj.weight"] for r in ("gate", "up", "down")} for e in range(3)]
        found[f"{place}.gate_up_proj"] = torch.stack([torch.cat([s["gate"], s["up"]]) for s in singles])
        found[f"{place}.down_proj"] = torch.stack([single["down"] for single in singles])
    return found


@pytest.mark.parametrize("config", [EXPERTS, {**Q, "modules_to_save": ["mlp"]}], ids=["LoRA", "saved"])
def test_experts_in_memory_fit_a_base_that_stores_them_so(tmp_path, config):
    merged = fused(merge(tmp_path, write(tmp_path, qwen3_moe, **config)))
    store(tmp_path, fused)
    assert_same(read_all(tmp_path), merged, 1e-5)
    assert_same(read_all(tmp_path, 100), merged, 1e-5)


def adapt_single_experts(folder):
    """Write an adapter as transformers 4 made it: a pair for each weight of each expert."""
    kind = write(folder, qwen3_moe, **Q)
    base = load_file(folder / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in base if ".experts." in name]:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        n_out, n_in = base[name].shape
        tensors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(2, n_in, generator=generator)
        tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(n_out, 2, generator=generator)
    save_file(tensors, file)
    config = folder / "adapter" / "adapter_config.json"
    edit_json(config, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    return kind


def test_single_experts_of_older_versions_fit_single_and_fused_ones(tmp_path):
    merged = merge(tmp_path, adapt_single_experts(tmp_path))
    assert_same(read_all(tmp_path), merged, 1e-5)
    store(tmp_path, fused)
    assert_same(read_all(tmp_path), fused(merged), 1e-5)
    assert_same(read_all(tmp_path, 100), fused(merged), 1e-5)


def test_square_experts_alone_do_not_tell_rows_from_columns(tmp_path):
    parameters = {**EXPERTS, "target_parameters": ["experts.down_proj"]}
    write(tmp_path, lambda: qwen3_moe(moe_intermediate_size=16), **parameters)
    (problem,) = refusal(tmp_path)
    assert problem.message == "its experts are square, so the file does not tell rows from columns"


def resize(folder, model, **config):
    """Train on a base with more tokens than the stored one has."""
    torch.manual_seed(0)
    base = model()
    base.save_pretrained(folder / "base")
    base.resize_token_embeddings(36)
    trained = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **Q, **config))
    disturb(trained).save_pretrained(folder / "adapter", save_embedding_layers=True)
    return type(base)


@pytest.mark.parametrize(
    ("model", "heads"), [(llama, ["lm_head.weight"]), (tied_llama, [])], ids=["a head of its own", "tied"]
)
def test_more_tokens_than_the_base_has_give_new_shapes(tmp_path, model, heads):
    kind = resize(tmp_path, model)
    names = ["model.embed_tokens.weight", *heads]
    adapter = open_adapter(tmp_path / "adapter", read_tensors(tmp_path / "base"))
    assert adapter.shapes == {name: (36, 16) for name in names}
    expected = merge(tmp_path, kind, resize=36)
    assert expected["model.embed_tokens.weight"].shape == (36, 16)
    assert_same(read_all(tmp_path), expected, 1e-5)
    assert_same(read_all(tmp_path, 100), expected, 1e-5)


def test_a_head_that_differs_from_its_embeddings_does_not_pass_for_tied(tmp_path):
    resize(tmp_path, tied_llama)

    def change(tensors):
        tensors["base_model.model.lm_head.weight"][33, 3] += 1

    edit_adapter(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from its .*embed_tokens\.weight"):
        read_all(tmp_path)


TIED = {
    "LoRA on the embeddings": ({"target_modules": ["embed_tokens"]}, "changes the embeddings and not the head"),
    "LoRA on the head": ({"target_modules": ["lm_head", "q_proj"]}, "its head is tied to its embeddings"),
    "DoRA on both": (
        {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True}, "its head is tied to its embeddings",
    ),
    "saved embeddings": ({**Q, "modules_to_save": ["embed_tokens"]}, "replaces the embeddings and not the head"),
    "both saved": ({**Q, "modules_to_save": ["embed_tokens", "lm_head"]}, "its head is tied to its embeddings"),
    "saved head": ({**Q, "modules_to_save": ["lm_head"]}, "its head is tied to its embeddings"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), TIED.values(), ids=TIED)
def test_what_would_untie_the_head_is_refused(tmp_path, config, message):
    write(tmp_path, tied_llama, **config)
    problems = refusal(tmp_path)
    assert any(message in problem.message for problem in problems)
    assert any("give the base a head of its own" in problem.hint for problem in problems)


@pytest.mark.parametrize("config", [config for config, _ in TIED.values()], ids=TIED)
def test_the_same_adapters_are_exact_once_the_base_has_a_head_of_its_own(tmp_path, config):
    kind = write(tmp_path, tied_llama, **config)
    head = {"lm_head.weight": load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"].clone()}
    store(tmp_path, lambda tensors: tensors | head)
    edit_json(tmp_path / "base" / "config.json", tie_word_embeddings=False)
    assert_same(read_all(tmp_path), merge(tmp_path, kind), 1e-5)


def start_from(folder, start):
    """Train from a start that changes the base's weights; save as it is, and converted to a plain LoRA."""
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(folder / "base")
    config = LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=start, **Q)
    trained = get_peft_model(base, config)
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(folder / "start")
    trained.peft_config["default"].init_lora_weights = start
    disturb(trained).save_pretrained(folder / "adapter")
    trained.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "start"))
    return type(base)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_is_refused_until_it_is_converted(tmp_path, start):
    kind = start_from(tmp_path, start)
    (problem,) = refusal(tmp_path)
    assert problem.place.endswith("adapter_config.json init_lora_weights")
    assert f"init_lora_weights={start!r} is not supported" in problem.message
    assert "path_initial_model_for_weight_conversion=START" in problem.hint
    # What PEFT makes of the trained adapter on the base, whose weights it changes again as it loads.
    expected = {}
    if start != "pissa_niter_4":  # a random start, which PEFT draws anew
        expected = merge(tmp_path, kind)
    (tmp_path / "adapter").rename(tmp_path / "raw")
    (tmp_path / "plain").rename(tmp_path / "adapter")
    assert_same(read_all(tmp_path), merge(tmp_path, kind), 1e-5)
    if expected:
        assert_same(read_all(tmp_path), expected, 1e-4)


def test_a_pickled_adapter_is_read_like_a_safetensors_file(tmp_path):
    write(tmp_path, llama, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    whole = read_all(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    found = read_all(tmp_path)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


NAMED = {
    ".lora_A.weight": ".lora_A.default.weight", ".lora_B.bias": ".lora_B.default.bias",
    ".lora_embedding_A": ".lora_embedding_A.default", "lm_head.weight": "lm_head.modules_to_save.default.weight",
    "norm.weight": "norm.modules_to_save.weight",
}  # fmt: skip


def test_names_with_the_adapters_name_in_them_are_the_same(tmp_path):
    write(
        tmp_path, llama, target_modules=["q_proj", "embed_tokens"], bias="all", modules_to_save=["lm_head", "norm"]
    )  # fmt: skip
    whole = read_all(tmp_path)

    def rename(tensors):
        ends = {name: next((end for end in NAMED if name.endswith(end)), "") for name in tensors}
        return {name.removesuffix(end) + NAMED.get(end, ""): tensors[name] for name, end in ends.items()}

    edit_adapter(tmp_path, rename)
    kept = {"base_model.model.lm_head.original_module.weight": torch.zeros(32, 16)}
    edit_adapter(tmp_path, lambda tensors: tensors | kept)
    found = read_all(tmp_path)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_threads_change_no_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("mediator_cli.checkpoint.adapter.read._NORM_ELEMENTS", 50)
    write(tmp_path, llama, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    whole = read_all(tmp_path)
    with open_reader(tmp_path) as (reader, shapes), ThreadPoolExecutor(4) as pool:
        jobs = [(name, shape, cut) for name, shape in shapes.items() for cut in (50, 60, 70)]
        for (name, *_), found in zip(jobs, pool.map(lambda job: read_tensor(reader, *job), jobs), strict=True):
            assert torch.equal(found.view(torch.int32), whole[name].view(torch.int32)), name


def test_an_adapter_of_another_base_is_refused_in_one_line(tmp_path):
    write(tmp_path, lambda: llama(num_hidden_layers=6), target_modules=["q_proj", "k_proj"])
    other = llama(hidden_size=32, num_attention_heads=4, num_hidden_layers=5)
    other.save_pretrained(tmp_path / "base")
    missing, square, long = sorted(refusal(tmp_path), key=lambda problem: problem.message, reverse=True)
    assert missing.place.endswith(": model.layers.5.self_attn.k_proj.weight, model.layers.5.self_attn.q_proj.weight")
    assert square.message == "B [8, 2] · A [2, 16] does not give [8, 32]"
    assert square.place.endswith("k_proj.weight and 2 more")
    assert long.message == "B [16, 2] · A [2, 16] does not give [32, 32]"
    assert long.hint == "was the adapter trained on another base?"


def config_of(folder):
    return folder / "adapter" / "adapter_config.json"


def without(*ends):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


SPOILT = {
    "magnitudes lost": (
        {**Q, "use_dora": True}, without("magnitude_vector"), {}, "has no magnitude but use_dora is set",
    ),
    "magnitudes not said": ({**Q, "use_dora": True}, None, {"use_dora": False}, "has a magnitude but use_dora is not"),
    "magnitudes of another size": (
        {**Q, "use_dora": True},
        lambda tensors: {n: t[:7].clone() if "magnitude" in n else t for n, t in tensors.items()}, {},
        "B [16, 2] · A [2, 16] does not give [16, 16]",
    ),
    "biases lost": ({**Q, "lora_bias": True}, without("lora_B.bias"), {}, "has no bias but lora_bias is set"),
    "biases not said": ({**Q, "lora_bias": True}, None, {"lora_bias": False}, "has a bias but lora_bias is not set"),
    "another rank": (
        {**Q, "rank_pattern": {"q_proj": 3}}, None, {"rank_pattern": {}}, "has rank 3, adapter_config.json says r=2",
    ),
    "saved modules lost": (
        {**Q, "modules_to_save": ["norm"]}, without("norm.weight"), {}, "the file holds nothing for it",
    ),
    "tokens lost": ({**Q, "trainable_token_indices": [1]}, without("_delta"), {}, "the file holds nothing for it"),
    "other tokens": (
        {**Q, "trainable_token_indices": [1]}, None, {"trainable_token_indices": [1, 2]},
        "has rows [1, 16], trainable_token_indices names 2 tokens",
    ),
    "token out of range": (
        {**Q, "trainable_token_indices": [1]}, None, {"trainable_token_indices": [32]},
        "changes token 32, there are 32",
    ),
    "parameters not said": (
        EXPERTS, None, {"target_parameters": ["experts.down_proj"]},
        "has 2 wrapped parameters, target_parameters does not say which",
    ),
    "saved module of another shape": (
        {**Q, "modules_to_save": ["norm"]},
        lambda tensors: {n: t[:9].clone() if "norm" in n else t for n, t in tensors.items()}, {},
        "shape [9], the base has [16]",
    ),
    "twice": (
        Q, lambda tensors: tensors | {n.replace(".weight", ".default.weight"): t.clone() for n, t in tensors.items()},
        {}, "tensor is not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "change", "settings", "message"), SPOILT.values(), ids=SPOILT)
def test_a_file_that_does_not_hold_what_its_config_says_is_refused(tmp_path, config, change, settings, message):
    write(tmp_path, mixtral if config is EXPERTS else llama, **config)
    if change:
        edit_adapter(tmp_path, change)
    edit_json(config_of(tmp_path), **settings)
    problems = refusal(tmp_path)
    assert any(message in problem.message for problem in problems), problems
    assert all(problem.hint for problem in problems)


DAMAGED = {
    "LoRA": (llama, {"target_modules": ["q_proj", "embed_tokens"], "bias": "all"}),
    "DoRA": (llama, {**Q, "use_dora": True, "modules_to_save": ["norm"]}),
    "tokens": (llama, {**Q, "lora_bias": True, "trainable_token_indices": [1, 2]}),
    "experts": (mixtral, EXPERTS),
}


def damage(tensors, dice):
    """Change one tensor in one of the ways in which files go wrong."""
    name = dice.choice(sorted(tensors))
    kind = dice.randrange(5)
    if kind == 0 and len(tensors) > 1:
        del tensors[name]
    elif kind == 1:
        tensors[name] = torch.zeros([dice.randrange(5) for _ in range(dice.randrange(5))])
    elif kind == 2:
        tensors[name.replace("lora_A", "base_layer.lora_A").replace("layers.0", "layers.7")] = tensors[name].clone()
    elif kind == 3:
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[f"base_model.{name}"] = tensors[name].clone()


@pytest.mark.parametrize(("model", "config"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_read_in_full_or_refused(tmp_path, model, config):
    write(tmp_path, model, **config)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole, dice, refused = load_file(file), random.Random(0), []
    for _ in range(40):
        tensors = {name: tensor.clone() for name, tensor in whole.items()}
        damage(tensors, dice)
        save_file(tensors, file)
        try:
            read_all(tmp_path)
        except CheckpointError as error:
            refused.append(error)
    assert len(refused) > 20
    assert all(problem.place and problem.message and problem.hint for error in refused for problem in error.problems)


def test_peft_can_load_what_we_accept(tmp_path):
    """The tables above write what PEFT reads back: a guard on the tests themselves."""
    kind = write(tmp_path, llama, **Q)
    loaded = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert json.loads(config_of(tmp_path).read_text())["r"] == loaded.peft_config["default"].r == 2
