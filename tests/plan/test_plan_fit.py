"""Experts whose tensors stand under other names, fused, split, tied, or only in part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Workshop, fine_tune, random_tensors, write_checkpoint
from safetensors.torch import load_file

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.checkpoint.matching import match_names
from mediator_cli.errors import CheckpointError, RecipeError

N_EXPERTS, INNER, HIDDEN, VOCAB = 3, 6, 8, 20
STATIC = {"assign": {"rule": "none"}}
Tensors = dict[str, torch.Tensor]


def merged(shop: Workshop, **fields: object) -> Tensors:
    """Merge statically and read the dense tensors."""
    folder = shop.merge("out", **{**STATIC, **fields})
    return load_file(folder / "model.safetensors")


def notices(shop: Workshop) -> str:
    manifest = json.loads((shop.folder / "out" / "routing_manifest.json").read_text())
    return "\n".join(manifest["notices"])


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def moe_tensors(seed: int) -> Tensors:
    """Two layers of a tiny Mixtral, experts one tensor each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    found = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN)}
    for layer in (f"model.layers.{n}" for n in range(2)):
        found[f"{layer}.self_attn.q_proj.weight"] = draw(HIDDEN, HIDDEN)
        found[f"{layer}.block_sparse_moe.gate.weight"] = draw(N_EXPERTS, HIDDEN)
        for n in range(N_EXPERTS):
            found[f"{layer}.block_sparse_moe.experts.{n}.w1.weight"] = draw(INNER, HIDDEN)
            found[f"{layer}.block_sparse_moe.experts.{n}.w2.weight"] = draw(HIDDEN, INNER)
            found[f"{layer}.block_sparse_moe.experts.{n}.w3.weight"] = draw(INNER, HIDDEN)
    return found


def fused(tensors: Tensors) -> Tensors:
    """The same in the layout of transformers 5."""
    found = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    for layer in (f"model.layers.{n}" for n in range(2)):
        old = f"{layer}.block_sparse_moe"
        found[f"{layer}.mlp.gate.weight"] = tensors[f"{old}.gate.weight"]
        rows = [
            torch.cat([tensors[f"{old}.experts.{n}.w1.weight"], tensors[f"{old}.experts.{n}.w3.weight"]])
            for n in range(N_EXPERTS)
        ]
        found[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(rows)
        downs = [tensors[f"{old}.experts.{n}.w2.weight"] for n in range(N_EXPERTS)]
        found[f"{layer}.mlp.experts.down_proj"] = torch.stack(downs)
    return found


CONFIG = {"num_hidden_layers": 2, "vocab_size": VOCAB, "model_type": "mixtral"}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
def test_fused_experts_merge_like_single_ones(tmp_path, method):
    base, own = moe_tensors(0), {name: fine_tune(moe_tensors(0), n) for n, name in enumerate("ab", 1)}
    shop = Workshop(tmp_path, base, own)
    parameters = {"average": {"method": method, **({} if method == "linear" else {"density": 0.5})}}
    for name, tensors in {"base": base, **own}.items():
        write_checkpoint(tmp_path / name, tensors, CONFIG)
    single = merged(shop, **parameters)
    write_checkpoint(tmp_path / "b", fused(own["b"]), CONFIG)
    (tmp_path / "out").rename(tmp_path / "single")
    assert same(merged(shop, **parameters), single)
    assert "expert b stores the experts of MoE layers fused" in notices(shop)


def test_single_experts_merge_like_fused_ones(tmp_path):
    base, own = moe_tensors(0), {name: fine_tune(moe_tensors(0), n) for n, name in enumerate("ab", 1)}
    shop = Workshop(tmp_path, base, own)
    for name, tensors in {"base": base, **own}.items():
        write_checkpoint(tmp_path / name, fused(tensors), CONFIG)
    together = merged(shop)
    write_checkpoint(tmp_path / "a", own["a"], CONFIG)
    (tmp_path / "out").rename(tmp_path / "together")
    assert same(merged(shop), together)
    assert "one tensor each" in notices(shop)
    expected = (fused(own["a"])["model.layers.1.mlp.experts.down_proj"].float()
                + fused(own["b"])["model.layers.1.mlp.experts.down_proj"].float()) / 2  # fmt: skip
    assert torch.equal(together["model.layers.1.mlp.experts.down_proj"], expected.bfloat16())


def test_a_missing_expert_of_a_layer_is_refused(tmp_path):
    base = moe_tensors(0)
    shop = Workshop(tmp_path, base)
    lacking = fused(base)
    lacking["model.layers.1.mlp.experts.down_proj"] = lacking["model.layers.1.mlp.experts.down_proj"][:2].contiguous()
    for name, tensors in {"base": base, "a": base, "b": lacking}.items():
        write_checkpoint(tmp_path / name, tensors, CONFIG)
    with pytest.raises(RecipeError, match=r"lacks tensor model.layers.1.block_sparse_moe.experts.0.w2.weight"):
        make_plan(load_recipe(shop.recipe(**STATIC)))


@pytest.mark.parametrize(("old", "new"), [("model.", ""), ("model.", "transformer."), ("model.", "a.model.")])
def test_another_prefix_is_the_same_tensor(workshop, old, new):
    expected = merged(workshop)
    (workshop.folder / "out").rename(workshop.folder / "expected")
    own = {new + name.removeprefix(old): tensor for name, tensor in workshop.experts["b"].items()}
    (workshop.folder / "b" / "model.safetensors").unlink()
    write_checkpoint(workshop.folder / "b", own)
    assert same(merged(workshop), expected)
    assert f"expert b names {len(own)} tensors otherwise" in notices(workshop)


def test_language_and_vision_layers_are_not_mistaken_for_each_other():
    kinds = ("self_attn.q_proj", "self_attn.k_proj")
    language = {f"{k}.weight": (4, 4) for k in (*kinds, "mlp.up_proj", "mlp.down_proj")}
    vision = {f"{k}.weight": (4, 4) for k in (*kinds, "mlp.fc1")}
    ours = {f"model.vision.layers.{n}.{k}": v for n in range(3) for k, v in vision.items()}
    ours |= {f"model.language_model.layers.{n}.{k}": v for n in range(3) for k, v in language.items()}
    text = {f"model.layers.{n}.{k}": v for n in range(3) for k, v in language.items()}
    found = match_names(ours, text)
    assert found == {name: name.replace("language_model.", "") for name in ours if "language_model" in name}
    old = {f"vision.layers.{n}.{k}": v for n in range(3) for k, v in vision.items()}
    old |= {f"language_model.model.layers.{n}.{k}": v for n in range(3) for k, v in language.items()}
    assert match_names(ours, old) == {
        name: name.replace("model.language_model", "language_model.model").replace("model.vision", "vision")
        for name in ours
    }


def test_an_expert_that_ties_its_head_gives_its_embeddings_as_head(workshop):
    head = torch.randn(VOCAB, HIDDEN).bfloat16()
    untied = {"tie_word_embeddings": False}
    write_checkpoint(workshop.folder / "base", workshop.base | {"lm_head.weight": head}, untied)
    write_checkpoint(workshop.folder / "a", workshop.experts["a"] | {"lm_head.weight": head}, untied)
    out = merged(workshop)
    mine = workshop.experts["b"]["model.embed_tokens.weight"].float()
    assert torch.equal(out["lm_head.weight"], ((head.float() + mine) / 2).bfloat16())
    assert "expert b ties its head to its embeddings" in notices(workshop)


def test_buffers_of_old_versions_are_no_tensors(workshop):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    expected = merged(workshop)
    write_checkpoint(workshop.folder / "a", workshop.experts["a"] | buffer)
    (workshop.folder / "out").rename(workshop.folder / "expected")
    assert same(merged(workshop), expected)


def test_kept_tensors_are_the_bases_whatever_the_experts_have(workshop):
    lacking = {name: t for name, t in workshop.experts["b"].items() if "layers.1.mlp" not in name}
    odd = {"value_head.weight": torch.ones(3)}
    write_checkpoint(workshop.folder / "b", lacking | odd)
    keep = ["*.layers.1.mlp.*", "*norm.weight", "value_head.*"]
    out = merged(workshop, keep_base=keep)
    assert "value_head.weight" not in out
    for name, tensor in out.items():
        is_kept = "layers.1.mlp" in name or name.endswith("norm.weight")
        assert torch.equal(tensor, workshop.base[name]) == is_kept, name
    with pytest.raises(RecipeError, match=r"keep_base\[0\]: '\*.vision.\*' matches no tensor"):
        make_plan(load_recipe(workshop.recipe(keep_base=["*.vision.*"], experts=[{"name": "a", "model": "./a"}])))


def test_kept_tensors_are_not_routed(workshop):
    folder = workshop.merge(assign={"rule": "all"}, keep_base=["*.mlp.*", "model.norm.weight"])
    manifest = json.loads((folder / "routing_manifest.json").read_text())
    stored = json.loads((folder / "routing_manifest.json").read_text())["sparse"][0]["units"]
    assert manifest["assignment"]["model.norm"] == "average"
    assert stored["model.layers.0"]["n_entries"] == sum(
        t.numel() for n, t in workshop.base.items() if n.startswith("model.layers.0.") and ".mlp." not in n
    )


def test_extra_tensors_are_refused_with_what_to_do(workshop):
    write_checkpoint(workshop.folder / "a", workshop.experts["a"] | {"value_head.weight": torch.ones(3)})
    with pytest.raises(RecipeError, match=r"has tensor value_head\.weight, which the base lacks") as caught:
        make_plan(load_recipe(workshop.recipe()))
    assert "keep_base" in str(caught.value)


@pytest.mark.parametrize("rule", ["none", "mean_std"])
def test_a_wrong_base_is_noticed_before_the_work(workshop, rule):
    write_checkpoint(workshop.folder / "base", random_tensors(9))
    told: list[str] = []
    plan = make_plan(load_recipe(workshop.recipe(assign={"rule": rule})))
    merge(plan, workshop.folder / "out", settings=Settings(workers=1, notify=told.append))
    assert [text.split(" by ")[0] for text in told] == [f"expert {n} differs from the base" for n in "ab"]
    share = float(told[0].split(" by ")[1].split("%")[0])
    matrices = [n for n, t in workshop.base.items() if t.ndim == 2]
    base = random_tensors(9)
    delta = sum(float((workshop.experts["a"][n].float() - base[n].float()).square().sum()) for n in matrices)
    assert share == pytest.approx(100 * (delta / sum(float(base[n].float().square().sum()) for n in matrices)) ** 0.5,
                                  abs=1)  # fmt: skip
    assert told[0] in notices(workshop)


def test_the_right_base_is_not_doubted(workshop):
    told: list[str] = []
    merge(make_plan(load_recipe(workshop.recipe())), workshop.folder / "out", settings=Settings(notify=told.append))
    assert told == []


def test_another_architecture_is_refused(workshop):
    write_checkpoint(workshop.folder / "b", workshop.experts["b"], {"model_type": "qwen2"})
    with pytest.raises((RecipeError, CheckpointError), match="other architecture: model_type qwen2, the base is llama"):
        make_plan(load_recipe(workshop.recipe()))


def vision_language(path: Path, text: Tensors, seed: int) -> Tensors:
    """Write a checkpoint with the text tensors below a language part, a vision tower and a projector."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.items()}
    for n in range(2):
        for kind in ("self_attn.q_proj", "mlp.fc1"):
            name = f"model.vision_tower.encoder.layers.{n}.{kind}.weight"
            tensors[name] = torch.randn(HIDDEN, HIDDEN, generator=generator).bfloat16()
    tensors["model.projector.linear_1.weight"] = torch.randn(HIDDEN, HIDDEN, generator=generator).bfloat16()
    inside = {"model_type": "llama", "vocab_size": VOCAB, "num_hidden_layers": 3}
    config = {"model_type": "llava", "text_config": inside, "vision_config": {"num_hidden_layers": 2}}
    write_checkpoint(path, tensors, config)
    facts = json.loads((path / "config.json").read_text())
    del facts["num_hidden_layers"], facts["vocab_size"]
    (path / "config.json").write_text(json.dumps(facts))
    return tensors


def test_only_the_language_part_of_a_vision_model_is_merged(workshop):
    base = vision_language(workshop.folder / "base", workshop.base, 0)
    seeing = vision_language(workshop.folder / "a", workshop.experts["a"], 1)
    out = merged(workshop)
    text = workshop.experts["b"]
    for name, tensor in out.items():
        if "language_model" in name:
            own = text[name.replace("language_model.", "")].float()
            assert torch.equal(tensor, ((seeing[name].float() + own) / 2).bfloat16()), name
        else:
            assert torch.equal(tensor, base[name]), name
    assert "5 tensors outside the language part are the base's" in notices(workshop)
    assert "expert b is a language model alone (llama, the base is llava)" in notices(workshop)
    everything = workshop.merge(
        "whole", **STATIC, keep_base=[], experts=[{"name": "a", "model": "./a"}], average={"method": "linear"}
    )
    assert same(load_file(everything / "model.safetensors"), seeing)
