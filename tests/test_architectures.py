"""Merges of checkpoints of many architectures, against merges of the models' own parameters in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_architectures import AUTO, DECODERS, EXPERTS, N_TOKENS, VISION, Family, write_family
from transformers import AutoModelForCausalLM, Qwen2Config

from mediator_cli import load_recipe, make_plan, merge, open_bundle
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.errors import BundleError

IDS = torch.randint(3, N_TOKENS, (2, 7), generator=torch.Generator().manual_seed(4))


def build(family: Family, name: str, **fields: Any) -> Path:
    return merge(make_plan(load_recipe(family.recipe(**fields))), family.folder / name)


def answers(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The logits of a model, whatever it is."""
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def merged_in_memory(family: Family, base: float, expert: float) -> Any:
    """Load the base and set its parameters to base · W₀ + expert · (Wₐ + W_b)."""
    model = family.model("base")
    members = [(base, model.state_dict()), *((expert, family.model(name).state_dict()) for name in EXPERTS)]
    merged = {}
    for name, tensor in model.state_dict().items():
        total = sum(weight * state[name].double() for weight, state in members)
        merged[name] = total.to(tensor.dtype) if tensor.is_floating_point() else tensor
    model.load_state_dict(merged)
    return model


METHODS = [("linear", 0.0, 0.5), ("task_arithmetic", -1.0, 1.0)]


@pytest.mark.parametrize("kind", AUTO)
def test_static_merges_are_those_of_the_models_in_memory(kind: str, tmp_path: Path) -> None:
    family = write_family(tmp_path, kind)
    stored = {name: family.stored(name) for name in ("base", *EXPERTS)}
    for method, base, expert in METHODS:
        folder = build(family, method, average={"method": method}, assign={"rule": "none"})
        found = load_file(folder / "model.safetensors")
        assert found.keys() == stored["base"].keys()
        for name, tensor in found.items():
            expected = base * stored["base"][name].double() + expert * (stored["a"][name].double() + stored["b"][name])
            torch.testing.assert_close(tensor, expected.float(), atol=1e-6, rtol=1e-6, msg=name)
        model, info = family.auto.from_pretrained(folder, output_loading_info=True)
        assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expected = answers(merged_in_memory(family, base, expert))
        torch.testing.assert_close(answers(model.eval()), expected, atol=1e-5, rtol=1e-5)


# What the run time cannot mix in each row of these, by the end of its name
AVERAGED = {
    "mixtral": ("gate.weight", "w1.weight", "w2.weight", "w3.weight"),
    "qwen3_moe": ("gate.weight", *(f".{n}.{p}_proj.weight" for n in range(4) for p in ("gate", "up", "down"))),
    "lfm2": ("conv.conv.weight",),
    "mamba": ("A_log", ".D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias"),
    "jamba": (
        "A_log", ".D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "router.weight",
        *(f"experts.{n}.{p}_proj.weight" for n in range(2) for p in ("gate", "up", "down")),
    ),
}  # fmt: skip


def expert_alone(family: Family, expert: str, averaged: tuple[str, ...]) -> Any:
    """Load an expert with the averaged tensors, which all inputs share, in place of its own."""
    stored = family.stored(expert)
    others = [family.stored(name) for name in EXPERTS]
    for name in averaged:
        stored[name] = ((others[0][name].double() + others[1][name].double()) / 2).to(stored[name].dtype)
    folder = family.folder / f"{expert}-alone"
    family.model(expert).save_pretrained(folder)
    from safetensors.torch import save_file

    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return family.auto.from_pretrained(folder).eval()


def blended(one: Any, other: Any) -> Any:
    """Give a model of 0.25 · one + 0.75 · other."""
    model, theirs = copy.deepcopy(one), other.state_dict()
    mixed = {name: 0.25 * tensor + 0.75 * theirs[name] for name, tensor in one.state_dict().items()}
    model.load_state_dict(mixed)
    return model


@pytest.mark.parametrize("kind", DECODERS)
def test_routed_bundles_answer_as_the_experts_themselves(kind: str, tmp_path: Path) -> None:
    family = write_family(tmp_path, kind)
    folder = build(
        family, "routed", average={"method": "linear"}, assign={"rule": "all"},
        extract={"density": 1.0, "values": "fp32", "rescale": False},
    )  # fmt: skip
    averaged = read_manifest(folder).averaged_in_routed_units
    endings = AVERAGED.get(kind, ())
    assert set(averaged) == {name for name in family.stored("base") if endings and name.endswith(endings)}
    alone = {name: expert_alone(family, name, averaged) for name in EXPERTS}
    expected = torch.cat([answers(alone["a"], IDS[:1]), answers(alone["b"], IDS[1:])])
    assert not torch.allclose(expected[1:], answers(alone["a"], IDS[1:]), atol=1e-2)
    written = {
        name: model.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
        for name, model in alone.items()
    }
    for switch in (1, 10**9):
        model = open_bundle(folder, switch_tokens=switch)
        with model.mixing([[1.0, 0.0], [0.0, 1.0]]):
            torch.testing.assert_close(answers(model), expected, atol=2e-5, rtol=2e-5)
        for name in EXPERTS:
            with model.mixing(name):
                torch.testing.assert_close(answers(model), answers(alone[name]), atol=2e-5, rtol=2e-5)
        with model.mixing({"a": 0.25, "b": 0.75}):
            blend = blended(alone["a"], alone["b"])
            torch.testing.assert_close(answers(model), answers(blend), atol=2e-5, rtol=2e-5)
        both = IDS[:1].expand(2, -1)
        found = model.generate(
            both, mixture=[[1.0, 0.0], [0.0, 1.0]], max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        for row, name in zip(found, EXPERTS, strict=True):
            assert row[: written[name].shape[1]].tolist() == written[name][0].tolist()


@pytest.mark.parametrize(
    "kind",
    ["gpt2", "mamba", "qwen3_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma3_text", "falcon"))],
)
def test_routed_bundles_in_bfloat16_answer_as_near_as_rounding_lets_them(kind: str, tmp_path: Path) -> None:
    family = write_family(tmp_path, kind, dtype=torch.bfloat16)
    folder = build(
        family, "routed", average={"method": "linear"}, assign={"rule": "all"},
        extract={"density": 1.0, "values": "bf16", "rescale": False},
    )  # fmt: skip
    averaged = read_manifest(folder).averaged_in_routed_units
    alone = {name: expert_alone(family, name, averaged) for name in EXPERTS}
    for switch in (1, 10**9):
        model = open_bundle(folder, switch_tokens=switch)
        with model.mixing([[1.0, 0.0], [0.0, 1.0]]):
            found = answers(model)
        for row, name in enumerate(EXPERTS):
            ids = IDS[row : row + 1]
            truth, rounded = answers(alone[name].float(), ids), answers(alone[name].bfloat16(), ids)
            error, usual = (found[row] - truth[0]).float().norm(), (rounded - truth).float().norm()
            assert error < 3 * usual
            other = EXPERTS[1 - row]
            assert error < 0.2 * (answers(alone[other].float(), ids) - truth).norm()


def test_a_sequence_of_a_model_without_attention_goes_on_only_with_its_mixture(tmp_path: Path) -> None:
    model = open_bundle(build(write_family(tmp_path, "mamba"), "routed", assign={"rule": "all"}))
    with torch.no_grad(), model.mixing("a"):
        cache = model(IDS, use_cache=True).cache_params
    with pytest.raises(BundleError, match="the mixture of a sequence that goes on is not known"):
        model(IDS[:, :1], cache_params=cache)


# Models that also see: the language part is merged, the rest is the base's

TEXT_CONFIG = {"qwen2_vl": Qwen2Config}
EYES = ("visual.", "vision_tower.", "vision_model.", "connector.", "multi_modal_projector.")


def check_language_merge(family: Family, folder: Path, experts: dict[str, dict[str, torch.Tensor]]) -> None:
    found, base = load_file(folder / "model.safetensors"), family.stored("base")
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        if any(part in name for part in EYES):
            assert torch.equal(tensor, base[name]), name
        else:
            mean = sum(stored[name].double() for stored in experts.values()) / len(experts)
            torch.testing.assert_close(tensor, mean.float(), atol=1e-6, rtol=1e-6, msg=name)
    model, info = family.auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference = family.model("base")
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    first, second = (family.model(expert).state_dict() for expert in EXPERTS)
    for name, tensor in state.items():
        if not any(part in name for part in EYES):
            state[name] = ((first[name].double() + second[name].double()) / 2).to(tensor.dtype)
    reference.load_state_dict(state)
    torch.testing.assert_close(answers(model.eval()), answers(reference), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", VISION)
def test_of_a_model_that_sees_the_language_part_is_merged(kind: str, tmp_path: Path) -> None:
    family = write_family(tmp_path, kind)
    plan = make_plan(load_recipe(family.recipe(average={"method": "linear"}, assign={"rule": "none"})))
    eyes = [name for name in family.stored("base") if any(part in name for part in EYES)]
    assert any(f"{len(eyes)} tensors outside the language part are the base's" in notice for notice in plan.notices)
    folder = merge(plan, tmp_path / "out")
    check_language_merge(family, folder, {name: family.stored(name) for name in EXPERTS})


@pytest.mark.parametrize("kind", VISION)
def test_text_only_experts_are_merged_into_a_model_that_sees(kind: str, tmp_path: Path) -> None:
    family = write_family(tmp_path, kind)
    stored = {name: family.stored(name) for name in EXPERTS}
    for name in EXPERTS:
        write_language_part(family, name, tmp_path / f"{name}-text")
    experts = [{"name": name, "model": f"./{name}-text"} for name in EXPERTS]
    plan = make_plan(load_recipe(family.recipe(experts=experts, average={"method": "linear"}, assign={"rule": "none"})))
    check_language_merge(family, merge(plan, tmp_path / "out"), stored)


def write_language_part(family: Family, name: str, folder: Path) -> None:
    """Write the language part of a member as a causal language model of its own."""
    whole = family.model(name)
    text = whole.config.get_text_config()
    model = AutoModelForCausalLM.from_config(TEXT_CONFIG.get(family.kind, type(text))(**text.to_dict()))
    model.get_decoder().load_state_dict(whole.get_decoder().state_dict())
    model.lm_head.load_state_dict(whole.lm_head.state_dict())
    model.save_pretrained(folder)
