"""Recipes of kind moe: what stock transformers computes from the folder, against a naive MoE of the sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.errors import RecipeError
from mediator_cli.pipeline.merge import merge
from mediator_cli.pipeline.moe_report import describe_moe
from mediator_cli.pipeline.settings import Settings
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_recipe
from tests.conftest import edit_json, edit_tensors
from tests.tiny_moe import tiny_moe
from tests.tiny_vocabularies import EMBED, Tokens, write_source

TOKENS = torch.tensor([[3, 7, 1, 19, 4, 4, 11, 2], [5, 5, 6, 0, 13, 9, 17, 8]])
RANDOM = {"gates": {"method": "random"}}
PAIRS = [
    ("llama", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "mixtral"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
    ("llama", "granitemoeshared"),
    ("granite", "granitemoeshared"),
]
_FIELDS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 3},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.5},
}


@dataclass(frozen=True)
class Family:
    """A base and experts a and b of one architecture, and recipes over them."""

    folder: Path

    def recipe(self, name: str = "recipe", experts: tuple[str, ...] = ("a", "b"), **fields: Any) -> Path:
        listed = [{"name": f"e{at}", "model": f"./{model}"} for at, model in enumerate(experts)]
        data = {"version": 1, "kind": "moe", "base": "./base", "experts": listed, "moe": RANDOM, **fields}
        path = self.folder / f"{name}.yaml"
        path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in data.items()) + "\n")
        return path

    def merge(self, name: str, settings: Settings | None = None, **fields: Any) -> Path:
        plan = make_plan(load_recipe(self.recipe(name, **fields)))
        return merge(plan, self.folder / name, settings=settings or Settings(workers=2, overwrite=True))


def _make(folder: Path, kind: str) -> Family:
    for seed, name in enumerate(("base", "a", "b")):
        # Close to each other as fine-tunes are, so that means of them still work.
        tiny_moe(folder / name, kind, **_FIELDS.get(kind, {}))
        generator = torch.Generator().manual_seed(seed)
        edit_tensors(
            folder / name / "model.safetensors",
            lambda tensors, g=generator, size=0.3 * (seed > 0): tensors.update(
                {k: v + size * v.std() * torch.randn(v.shape, generator=g) for k, v in tensors.items()}
            ),
        )
    return Family(folder)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def of(kind: str) -> Family:
        if kind not in made:
            made[kind] = _make(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


@pytest.fixture
def llama(tmp_path: Path, families: Callable[[str], Family]) -> Family:
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(families("llama").folder / name)
    return Family(tmp_path)


@pytest.fixture
def own_llama(tmp_path: Path) -> Family:
    return _make(tmp_path, "llama")


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


class _Naive(torch.nn.Module):
    """Blocks of whole dense models, weighed by the softmax of the top logits of a gate."""

    def __init__(self, blocks: list[torch.nn.Module], gate: torch.Tensor, top_k: int) -> None:
        super().__init__()
        self.blocks, self.gate, self.top_k = torch.nn.ModuleList(blocks), gate, top_k

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits, chosen = (states @ self.gate.T).topk(self.top_k)
        every = torch.stack([block(states) for block in self.blocks], -2)
        picked = every.gather(-2, chosen[..., None].expand(*chosen.shape, states.shape[-1]))
        return (logits.softmax(-1)[..., None] * picked).sum(-2)


def _naive(family: Family, moe: Path, shared: Path, top_k: int, experts: tuple[str, ...] = ("a", "b")) -> torch.Tensor:
    """Run a dense model with the experts' blocks, mixed by the gates of an MoE, in the layers that have gates."""
    model, dense = _load(shared), [_load(family.folder / name) for name in experts]
    for name, gate in _tensors(moe).items():
        if name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            at = int(name.split(".")[2])
            model.model.layers[at].mlp = _Naive([each.model.layers[at].mlp for each in dense], gate.float(), top_k)
    return _logits(model)


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_identical_experts_give_the_dense_model(kind: str, form: str, families: Callable[[str], Family]) -> None:
    family = families(kind)
    folder = family.merge(f"same_{form}", experts=("a", "a", "a"), moe={**RANDOM, "format": form})
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == form
    assert torch.allclose(_logits(_load(folder)), _logits(_load(family.folder / "a")), atol=1e-5)


@pytest.mark.parametrize(("kind", "form"), [pair for pair in PAIRS if "granite" not in pair[1]])
@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_get_the_experts_that_the_gates_choose(
    kind: str, form: str, top_k: int, families: Callable[[str], Family]
) -> None:
    family = families(kind)
    spec = {**RANDOM, "format": form, "experts_per_token": top_k, "shared_from": "e1"}
    folder = family.merge(f"mixed_{form}_{top_k}", moe=spec)
    found, wanted = _logits(_load(folder)), _naive(family, folder, family.folder / "b", top_k)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, _logits(_load(family.folder / "b")), atol=1e-2)


def test_shared_tensors_are_merged_and_a_reloaded_copy_is_the_same(llama: Family, tmp_path: Path) -> None:
    folder = llama.merge("averaged", average={"method": "ties", "preset": "mergeme"})
    dense = make_plan(load_recipe(llama.recipe("dense", kind="mediator", moe=None, assign={"rule": "none"})))
    assert dense.moe is None
    static = merge(dense, llama.folder / "static", settings=Settings(workers=1))
    model = _load(folder)
    assert torch.allclose(_logits(model), _naive(llama, folder, _like(static, folder, llama), 2), atol=1e-5)
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(_logits(_load(tmp_path / "copy")), _logits(model))


def _like(static: Path, folder: Path, family: Family) -> Path:
    """Give a dense model the tensors that an MoE shares, all but its blocks."""
    tensors, shared = load_file(static / "model.safetensors"), _tensors(folder)
    save_file({n: shared.get(n, t) for n, t in tensors.items()}, static / "model.safetensors", {"format": "pt"})
    return static


def test_only_listed_layers_get_experts_and_the_others_the_mean(llama: Family) -> None:
    folder = llama.merge("some", assign={"rule": "listed", "units": ["model.layers.1"]})
    config, tensors = json.loads((folder / "config.json").read_text()), _tensors(folder)
    assert config["model_type"] == "qwen2_moe"
    assert config["mlp_only_layers"] == [0, 2]
    assert config["norm_topk_prob"] is True
    a, b = (load_file(llama.folder / name / "model.safetensors") for name in ("a", "b"))
    up = "model.layers.2.mlp.up_proj.weight"
    assert torch.allclose(tensors[up], (a[up] + b[up]) / 2, atol=1e-6)
    assert torch.equal(tensors["model.layers.1.mlp.experts.1.up_proj.weight"], b["model.layers.1.mlp.up_proj.weight"])
    assert not tensors["model.layers.0.self_attn.q_proj.bias"].any()
    assert tensors["model.layers.1.mlp.shared_expert_gate.weight"].all()
    static = merge(
        make_plan(load_recipe(llama.recipe("mean", kind="mediator", moe=None, assign={"rule": "none"}))),
        llama.folder / "mean",
        settings=Settings(workers=1),
    )
    assert torch.allclose(_logits(_load(folder)), _naive(llama, folder, static, 2), atol=1e-5)


def test_conflict_chooses_the_layers(llama: Family) -> None:
    plan = make_plan(load_recipe(llama.recipe("scored", assign={"rule": "top_k", "k": 2})))
    report = describe_moe(plan)
    assert (report.layers, report.rule, report.conflict_bytes > 0) == ((2, 2), "top_k", True)
    manifest = read_manifest(merge(plan, llama.folder / "scored", settings=Settings(workers=2)))
    assert manifest.moe is not None
    assert manifest.conflict is not None
    scores = {int(unit.split(".")[-1]): score for unit, score in manifest.conflict.scores.items() if "layers" in unit}
    assert list(manifest.moe.layers) == sorted(sorted(scores, key=lambda layer: -scores[layer])[:2])


def test_base_may_be_an_expert_and_experts_are_scaled_and_made_noisy(llama: Family) -> None:
    own = {"e0": {"residual_scale": 0.5}, "e1": {"noise_scale": 0.1}}
    folder = llama.merge("scaled", moe={**RANDOM, "base_expert": True, "experts": own, "shared_from": "base"})
    tensors = _tensors(folder)
    base, a, b = (load_file(llama.folder / name / "model.safetensors") for name in ("base", "a", "b"))
    for layer in range(3):
        stem, block = f"model.layers.{layer}", f"model.layers.{layer}.block_sparse_moe.experts"
        assert torch.equal(tensors[f"{block}.0.w2.weight"], 0.5 * a[f"{stem}.mlp.down_proj.weight"])
        assert torch.equal(tensors[f"{block}.0.w1.weight"], a[f"{stem}.mlp.gate_proj.weight"])
        assert torch.equal(tensors[f"{block}.2.w3.weight"], base[f"{stem}.mlp.up_proj.weight"])
        assert torch.equal(tensors[f"{stem}.self_attn.q_proj.weight"], base[f"{stem}.self_attn.q_proj.weight"])
    block = "block_sparse_moe.experts.1.w1.weight"
    layers = [f"model.layers.{n}" for n in range(3)]
    noise = torch.cat([(tensors[f"{n}.{block}"] - b[f"{n}.mlp.gate_proj.weight"]).flatten() for n in layers])
    assert abs(noise.std().item() - 0.1) < 0.01
    assert abs(noise.mean().item()) < 0.01


def test_heads_are_shared_and_stay_tied_where_they_are(own_llama: Family) -> None:
    a, b = (load_file(own_llama.folder / name / "model.safetensors") for name in ("a", "b"))
    head = _tensors(own_llama.merge("untied"))["lm_head.weight"]
    assert torch.allclose(head, (a["lm_head.weight"] + b["lm_head.weight"]) / 2, atol=1e-6)
    for name in ("base", "a", "b"):
        edit_json(own_llama.folder / name / "config.json", tie_word_embeddings=True)
        edit_tensors(own_llama.folder / name / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    folder = own_llama.merge("tied")
    model = _load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in _tensors(folder)


def test_the_plan_counts_what_is_written(llama: Family) -> None:
    plan = make_plan(load_recipe(llama.recipe("counted")))
    report = describe_moe(plan)
    folder = merge(plan, llama.folder / "counted", settings=Settings(workers=1))
    model = _load(folder)
    assert report.parameters == (model.num_parameters(),) * 2
    assert report.active == report.parameters
    assert report.bytes[1] == sum(tensor.nbytes for tensor in _tensors(folder).values())
    manifest = read_manifest(folder)
    assert (manifest.schema_version, manifest.sizes.dense) == (4, report.bytes[1])
    assert not verify_bundle(folder).problems


@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_granite_with_all_neurons_gives_the_expert_that_the_gates_choose(
    kind: str, families: Callable[[str], Family]
) -> None:
    family = families(kind)
    spec = {**RANDOM, "format": "granitemoeshared", "experts_per_token": 1, "neurons": 1.0}
    folder = family.merge("granite", moe=spec)
    static = merge(
        make_plan(load_recipe(family.recipe("mean", kind="mediator", moe=None, assign={"rule": "none"}))),
        family.folder / "mean",
        settings=Settings(workers=1, overwrite=True),
    )
    model, gates = _load(static), _tensors(folder)
    dense = [_load(family.folder / name) for name in ("a", "b")]
    for at, layer in enumerate(model.model.layers):
        gate = gates[f"model.layers.{at}.block_sparse_moe.router.layer.weight"]
        layer.mlp = _Naive([each.model.layers[at].mlp for each in dense], gate, 1)
    assert torch.allclose(_logits(_load(folder)), _logits(model), atol=1e-5)


def test_granite_with_few_neurons_keeps_those_that_changed(own_llama: Family) -> None:
    base = load_file(own_llama.folder / "base" / "model.safetensors")
    for name, neurons in (("a", [1, 5]), ("b", [2])):
        changed = {key: tensor.clone() for key, tensor in base.items()}
        for key, tensor in changed.items():
            if "mlp" in key:
                part = tensor[:, neurons] if "down" in key else tensor[neurons]
                part += torch.randn(part.shape, generator=torch.Generator().manual_seed(len(key)))
                tensor[(slice(None), neurons) if "down" in key else neurons] = part
        save_file(changed, own_llama.folder / name / "model.safetensors", {"format": "pt"})
    spec = {**RANDOM, "format": "granitemoeshared", "experts_per_token": 1, "neurons": 0.25, "shared_from": "base"}
    folder = own_llama.merge("few", moe=spec)
    model, gates = _load(own_llama.folder / "base"), _tensors(folder)
    dense = [_load(own_llama.folder / name) for name in ("a", "b")]
    for at, layer in enumerate(model.model.layers):
        gate = gates[f"model.layers.{at}.block_sparse_moe.router.layer.weight"]
        layer.mlp = _Naive([each.model.layers[at].mlp for each in dense], gate, 1)
    assert gates["model.layers.0.block_sparse_moe.output_linear.weight"].shape == (2, 16, 8)
    assert torch.allclose(_logits(_load(folder)), _logits(model), atol=1e-5)


def test_the_same_bytes_whatever_the_slab(llama: Family) -> None:
    spec = {**RANDOM, "experts": {"e0": {"noise_scale": 0.5}}}
    one = read_manifest(llama.merge("one", moe=spec, settings=Settings(workers=1, slab=4096)))
    two = read_manifest(llama.merge("two", moe=spec, settings=Settings(workers=2)))
    assert one.digest == two.digest


@pytest.mark.parametrize("n", [1, 64])
def test_from_one_expert_to_many(n: int, llama: Family) -> None:
    folder = llama.merge(f"n{n}", experts=("a",) * n, moe={**RANDOM, "experts_per_token": 1})
    assert torch.allclose(_logits(_load(folder)), _logits(_load(llama.folder / "a")), atol=1e-5)


def _refused(family: Family, *texts: str, **fields: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(load_recipe(family.recipe("wrong", **fields)))
    told = str(caught.value)
    for text in texts:
        assert text in told, told


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"moe": {**RANDOM, "experts_per_token": 3}}, ("gets 3 experts, and there are 2", "base_expert: true")),
        ({"moe": {**RANDOM, "format": "qwen3_moe"}}, ("takes qwen3, and the base is llama", "mixtral or qwen2_moe")),
        ({"moe": {**RANDOM, "shared_from": "e7"}}, ("no source 'e7'",)),
        ({"moe": {**RANDOM, "experts": {"e7": {}}}}, ("no expert 'e7'",)),
        ({"moe": {**RANDOM, "experts": {"base": {}}}}, ("no expert 'base'", "base_expert: true")),
        ({"moe": {**RANDOM, "neurons": 0.5}}, ("granitemoeshared",)),
        ({"moe": {**RANDOM, "experts": {"e0": {"noise_scale": 0.1}}, "format": "granitemoeshared"}},
         ("noise differs everywhere",)),
        ({"moe": {}}, ("need prompts of every expert, none are given for e0, e1", "random")),
        ({"assign": {"rule": "none"}}, ("no layer experts", "kind: mediator")),
        ({"assign": {"rule": "top_k", "k": 1}, "moe": {**RANDOM, "format": "mixtral"}},
         ("every layer has experts", "qwen2_moe")),
        ({"assign": {"rule": "listed", "units": ["model.norm"]}}, ("no layer gets experts",)),
        ({"extract": {"density": 0.1}}, ("`extract` does not go with `kind: moe`",)),
        ({"conflict": {"unit": "tensor"}}, ("whole feed-forward blocks",)),
        ({"kind": "mediator"}, ("`moe` goes with `kind: moe`",)),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told(fields: dict[str, Any], texts: tuple[str, ...], llama: Family) -> None:
    _refused(llama, *texts, **fields)


def test_attention_that_works_otherwise_is_not_averaged(own_llama: Family) -> None:
    edit_json(own_llama.folder / "a" / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    _refused(own_llama, "rope_theta is 500000.0, the base has 10000.0", "shared_from: base", "experts[0]")
    make_plan(load_recipe(own_llama.recipe("copied", moe={**RANDOM, "shared_from": "base"})))


def test_models_that_no_format_takes_are_told(tmp_path: Path) -> None:
    family = _make(tmp_path, "olmo2")
    _refused(family, "no format of stock software makes a Mixture of Experts of olmo2", "kind: mediator")


def test_biases_that_a_format_has_no_place_for_are_named(own_llama: Family) -> None:
    name = "model.layers.1.mlp.down_proj.bias"
    for source in ("base", "a", "b"):
        edit_tensors(own_llama.folder / source / "model.safetensors", lambda t: t.update({name: torch.zeros(16)}))
    _refused(own_llama, f"mixtral has no place for {name}", "kind: mediator")
    bias = "model.layers.1.self_attn.k_proj.bias"
    for source in ("base", "a", "b"):
        file = own_llama.folder / source / "model.safetensors"
        edit_tensors(file, lambda t: (t.pop(name), t.update({bias: torch.zeros(8)})))
    _refused(own_llama, f"mixtral has no place for {bias}", "qwen2_moe has one")


def test_a_mixture_of_mixtures_is_refused(tmp_path: Path) -> None:
    family = _make(tmp_path, "mixtral")
    _refused(family, "of mixtral: they take")


@pytest.mark.parametrize("form", ["granitemoeshared", "qwen2_moe"])
def test_heads_of_a_size_that_servers_misread_are_refused(form: str, own_llama: Family) -> None:
    for name in ("base", "a", "b"):
        edit_json(own_llama.folder / name / "config.json", head_dim=16)
    told = f"servers read {form} with heads of hidden size / heads, and the base's have 16"
    _refused(own_llama, told, "format: mixtral", moe={**RANDOM, "format": form})


def test_vocabularies_are_joined_as_in_a_static_merge(tmp_path: Path) -> None:
    family = Family(tmp_path)
    sources = {"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<y>", "<x>"])}
    for name, tokens in sources.items():
        write_source(tmp_path / name, tokens)
    moe = _tensors(family.merge("moe", tokenizer="union"))
    static = family.merge("static", tokenizer="union", kind="mediator", moe=None, assign={"rule": "none"})
    shared = {name: tensor for name, tensor in _tensors(static).items() if ".mlp." not in name}
    assert moe[EMBED].shape == (22, 8)
    assert all(torch.equal(moe[name], tensor) for name, tensor in shared.items())
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["vocab_size"] == 22
