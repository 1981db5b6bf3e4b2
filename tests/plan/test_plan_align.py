"""Which units may change places: by architecture, and proved by the model's own answers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_architectures import write_family

from mediator_cli.engine.align import axes_of
from mediator_cli.plan.align import find_units

ALL = ("mlp", "heads", "residual")
KNOWN = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "mixtral"), ALL),
    "qwen3_moe": ALL,
    **dict.fromkeys(("gpt_neox", "falcon"), ("mlp",)),
    **dict.fromkeys(("lfm2", "jamba"), ("mlp", "heads")),
    **dict.fromkeys(("gpt2", "phi3", "mamba"), ()),
}
IDS = torch.tensor([[5, 7, 9, 3, 11, 2, 8]])


def random_order(units, generator):
    k = units.per_group
    groups = generator.permutation(units.size // k)
    return np.concatenate([group * k + generator.permutation(k) for group in groups])


def permuted(tensors, units, seed=0):
    """Give units any order that keeps their groups; new tensors, and the orders."""
    generator = np.random.default_rng(seed)
    orders = {one.name: random_order(one, generator) for one in units}
    moved = dict(tensors)
    for name, axes in axes_of(units, orders, {name: tuple(tensor.shape) for name, tensor in tensors.items()}).items():
        tensor = tensors[name] if axes.rows is None else tensors[name][torch.from_numpy(axes.rows)]
        moved[name] = (tensor if axes.columns is None else tensor[..., torch.from_numpy(axes.columns)]).contiguous()
    return moved, orders


@pytest.mark.parametrize("kind", KNOWN)
def test_units_of_an_architecture_are_known_and_may_change_places(kind, tmp_path):
    family = write_family(tmp_path, kind)
    tensors, config = family.stored("base"), json.loads((tmp_path / "base" / "config.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    units, faults = find_units(shapes, config, ALL)
    known = tuple(group for group in ALL if group not in [fault.split(":")[0] for fault, _ in faults])
    assert known == KNOWN[kind]
    assert {one.group for one in units} == set(known)
    if not known:
        return
    moved, _ = permuted(tensors, units)
    assert any(not torch.equal(moved[name], tensors[name]) for name in tensors)
    with torch.no_grad():
        before = family.model("base")(input_ids=IDS).logits
        save_file(moved, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
        after = family.model("a")(input_ids=IDS).logits
    assert before.abs().max() > 1
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8, "rope_theta": 1e4}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    f"{LAYER}.self_attn.q_proj.weight": (8, 8),
    f"{LAYER}.self_attn.k_proj.weight": (4, 8),
    f"{LAYER}.self_attn.v_proj.weight": (4, 8),
    f"{LAYER}.self_attn.o_proj.weight": (8, 8),
    f"{LAYER}.mlp.gate_proj.weight": (12, 8),
    f"{LAYER}.mlp.up_proj.weight": (12, 8),
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
    f"{LAYER}.input_layernorm.weight": (8,),
    "model.norm.weight": (8,),
}


def faults_of(group, config=LLAMA, without=(), **shapes):
    changed = {f"{LAYER}.{name.replace('__', '.')}": shape for name, shape in shapes.items()}
    known = {name: shape for name, shape in (SHAPES | changed).items() if not name.endswith(tuple(without))}
    units, faults = find_units(known, config, (group,))
    assert bool(units) != bool(faults)
    return " ".join(fault for fault, _ in faults)


@pytest.mark.parametrize("group", ALL)
def test_a_plain_decoder_has_all_groups(group):
    assert faults_of(group) == ""


@pytest.mark.parametrize(
    ("group", "told", "change"),
    [
        ("mlp", f"the hidden units of {LAYER}.mlp.gate_proj.weight, {LAYER}.mlp.up_proj.weight are not known",
         {"without": ["down_proj.weight"]}),
        ("mlp", f"{LAYER}.mlp.up_proj.weight is [10, 8], not [12, 8]", {"mlp__up_proj__weight": (10, 8)}),
        ("mlp", f"the part of {LAYER}.mlp.mixer.weight in it is not known", {"mlp__mixer__weight": (12, 12)}),
        ("mlp", "its units are not known in", {"without": ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]}),
        ("heads", f"{LAYER}.self_attn has no k_proj", {"without": ["k_proj.weight"]}),
        ("heads", f"{LAYER}.self_attn.q_proj.weight is [16, 8], not [8, 8]", {"self_attn__q_proj__weight": (16, 8)}),
        ("heads", f"the part of {LAYER}.self_attn.sinks in it is not known", {"self_attn__sinks": (4,)}),
        ("heads", f"the config does not tell how many heads {LAYER}.self_attn has", {"config": {"hidden_size": 8}}),
        ("heads", "a slope for each head", {"config": {**LLAMA, "alibi": True}}),
        ("residual", f"the part of {LAYER}.conv.weight in the stream is not known", {"conv__weight": (8, 3)}),
        ("residual", "no single stream with a hidden_size", {"config": {**LLAMA, "is_encoder_decoder": True}}),
        ("residual", "neither config nor tensors tell how positions come in",
         {"config": {key: value for key, value in LLAMA.items() if key != "rope_theta"}}),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(group, told, change):
    assert told in faults_of(group, **change)


def test_what_is_kept_as_a_whole_has_no_units():
    tower = {f"vision.layers.0.self_attn.{kind}_proj.weight": (6, 6) for kind in "qkvo"}
    _, faults = find_units({**SHAPES, **tower}, LLAMA, ("heads", "residual"))
    assert len(faults) == 2
    units, faults = find_units({**SHAPES, **tower}, LLAMA, ("heads", "residual"), frozenset(tower))
    assert faults == []
    assert [one.name for one in units] == [f"{LAYER}.self_attn", "residual"]
    _, faults = find_units({**SHAPES, **tower}, LLAMA, ("residual",), frozenset(tower), moves_base=True)
    assert "vision.layers.0.self_attn.q_proj.weight" in faults[0][0]
