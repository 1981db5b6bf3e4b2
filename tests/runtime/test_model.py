"""A bundle as a model, against complete checkpoints of each mixture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, Workshop, fine_tune, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, StaticCache

from mediator_cli import load_recipe, make_plan, merge, read_bundle
from mediator_cli.errors import BundleError, CheckpointError
from mediator_cli.runtime.forms import takes_rows
from mediator_cli.runtime.mixing import PASS_TOKENS, MixtureCache
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.runtime.modules import MixedVectors, take_over
from mediator_cli.runtime.open import open_bundle

MIXTURES = [[1.0, 0.0], [0.25, 0.75], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
PROMPTS = torch.randint(3, VOCAB, (5, 7), generator=torch.Generator().manual_seed(4))
ROUTE_ALL = {"assign": {"rule": "all"}, "extract": {"density": 0.4}}


def complete(folder: Path, weights: list[float], dtype: torch.dtype) -> Any:
    """Load the checkpoint that a mixture stands for, mixed by the reader of bundles in float32."""
    bundle = read_bundle(folder)
    names = [source.name for source in bundle.manifest.experts]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mixed = bundle.dense(name).float().flatten()
            for expert, weight in zip(names, weights, strict=True):
                if name in bundle.experts[expert].tensors and weight:
                    delta = bundle.experts[expert].read(name)
                    mixed[delta.positions] += delta.values * weight
            parameter.copy_(
                mixed.view(parameter.shape).to(bundle.dense(name).dtype if dtype != torch.float32 else dtype)
            )
    return model


@pytest.fixture
def bundle(workshop: Workshop) -> Path:
    # Small weights: random ones of size 1 make attention so sharp that rounding decides where it looks.
    for name in ("base", "a", "b"):
        tensors = load_file(workshop.folder / name / "model.safetensors")
        scaled = {n: t if n.endswith("norm.weight") else 0.3 * t for n, t in tensors.items()}
        save_file(scaled, workshop.folder / name / "model.safetensors", metadata={"format": "pt"})
    return workshop.merge("routed", **ROUTE_ALL)


def open_with(folder: Path, switch: int, **options: Any) -> RoutedModel:
    return open_bundle(folder, dtype=options.pop("dtype", torch.float32), switch_tokens=switch, **options)


def assert_complete(model: RoutedModel, folder: Path) -> None:
    """Compare every row of a mixed batch with the complete checkpoint of its mixture."""
    with torch.no_grad(), model.mixing(MIXTURES):
        found = model(PROMPTS).logits
    for row, weights in enumerate(MIXTURES):
        with torch.no_grad():
            expected = complete(folder, weights, torch.float32)(PROMPTS[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("switch", [1, 10**9], ids=["matrices", "products"])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 0], ids=["room", "no room"])
def test_rows_with_different_mixtures_are_those_of_complete_checkpoints(
    bundle: Path, switch: int, cache_bytes: int
) -> None:
    model = open_with(bundle, switch, cache_bytes=cache_bytes)
    assert_complete(model, bundle)


def test_bfloat16_matrices_are_those_of_complete_checkpoints(bundle: Path) -> None:
    model = open_with(bundle, 1, dtype=torch.bfloat16)
    for row, weights in enumerate(MIXTURES):
        with torch.no_grad(), model.mixing([weights]):
            found = model(PROMPTS[row : row + 1]).logits
        with torch.no_grad():
            assert torch.equal(found, complete(bundle, weights, torch.bfloat16)(PROMPTS[row : row + 1]).logits)


def test_bfloat16_products_are_as_near_to_the_truth_as_bfloat16_matrices(bundle: Path) -> None:
    model = open_with(bundle, 10**9, dtype=torch.bfloat16)
    errors = torch.zeros(2)
    for row, weights in enumerate(MIXTURES):
        with torch.no_grad(), model.mixing([weights]):
            products = model(PROMPTS[row : row + 1]).logits
        with torch.no_grad():
            truth = complete(bundle, weights, torch.float32)(PROMPTS[row : row + 1]).logits
            matrices = complete(bundle, weights, torch.bfloat16)(PROMPTS[row : row + 1]).logits
        errors += torch.stack([(found.float() - truth).square().sum() for found in (products, matrices)])
    assert errors[0] < 2 * errors[1]


def test_both_ways_were_really_taken(bundle: Path) -> None:
    kinds = {}
    for switch in (1, 10**9):
        model = open_with(bundle, switch)
        with torch.no_grad(), model.mixing(MIXTURES):
            model(PROMPTS)
            kinds[switch] = [part.matrices is None for part in model.opened.mixers[0].parts]
    assert kinds[1] == [False] * 4
    assert kinds[10**9] == [True]


def test_routed_embeddings_heads_and_norms_are_mixed(bundle: Path) -> None:
    model = open_with(bundle, 1)
    mixed = {mixer.name for mixer in model.opened.mixers}
    assert "model.embed_tokens.weight" in mixed
    assert model.lm_head.mixer.matrix is model.model.embed_tokens.mixer.matrix
    assert isinstance(model.model.norm, MixedVectors)


def test_generate_gives_every_row_what_it_gets_alone(bundle: Path) -> None:
    model = open_with(bundle, 1)
    together = model.generate(PROMPTS, mixture=MIXTURES, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, weights in enumerate(MIXTURES):
        reference = complete(bundle, weights, torch.float32)
        alone = reference.generate(PROMPTS[row : row + 1], max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()


def test_beams_and_samples_keep_the_mixture_of_their_row(bundle: Path) -> None:
    model = open_with(bundle, 10**9)
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    together = model.generate(PROMPTS[:2], mixture=[[1.0, 0.0], [0.0, 1.0]], **options)
    for row, expert in enumerate([[1.0, 0.0], [0.0, 1.0]]):
        alone = complete(bundle, expert, torch.float32).generate(PROMPTS[row : row + 1], **options)
        width = alone.shape[1]
        assert together[2 * row : 2 * row + 2, :width].tolist() == alone.tolist()


def test_a_static_cache_works_as_well(bundle: Path) -> None:
    model = open_with(bundle, 1)
    usual = model.generate(PROMPTS, mixture=MIXTURES, max_new_tokens=4, do_sample=False, pad_token_id=0)
    cache = StaticCache(config=model.config, max_cache_len=32)
    fixed = model.generate(
        PROMPTS, mixture=MIXTURES, max_new_tokens=4, do_sample=False, pad_token_id=0, past_key_values=cache
    )
    assert fixed.tolist() == usual.tolist()


def test_left_padding_does_not_change_a_row(bundle: Path) -> None:
    model = open_with(bundle, 1)
    padded = torch.cat([torch.zeros(5, 3, dtype=torch.int64), PROMPTS], dim=1)
    mask = (torch.arange(10) >= 3).long().expand(5, -1)
    options = {"mixture": MIXTURES, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert (
        model.generate(padded, attention_mask=mask, **options)[:, 10:].tolist()
        == model.generate(PROMPTS, **options)[:, 7:].tolist()
    )


def test_leaving_a_mixture_restores_what_was_before(bundle: Path) -> None:
    model = open_with(bundle, 1)
    plain = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32).eval()
    with torch.no_grad():
        with model.mixing("a"):
            outer = model(PROMPTS).logits
            with model.mixing("dense"):
                dense = model(PROMPTS).logits
            again = model(PROMPTS).logits
        inner = model.model.layers[0].mlp(torch.ones(1, 2, 8))
        assert torch.equal(dense, plain(PROMPTS).logits)
        assert torch.equal(outer, again)
        assert not torch.equal(outer, dense)
        assert torch.equal(inner, plain.model.layers[0].mlp(torch.ones(1, 2, 8)))


def test_few_tokens_wait_until_matrices_pay(bundle: Path) -> None:
    model = open_with(bundle, 3 * PASS_TOKENS + 12)
    with torch.no_grad(), model.mixing("a"):
        ways = []
        for _ in range(4):
            model(PROMPTS[:1, :4])
            ways.append(model.opened.mixers[0].parts[0].matrices is not None)
    assert ways == [False, False, True, True]


def test_biases_are_mixed_for_each_row(tmp_path: Path) -> None:
    config = Qwen2Config(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCAB, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = {k: v.clone() for k, v in Qwen2ForCausalLM(config).state_dict().items()}
    base = {k: torch.randn(v.shape) if k.endswith("bias") else v for k, v in base.items()}
    for name, tensors in {"base": base, "a": fine_tune(base, 1), "b": fine_tune(base, 2)}.items():
        write_checkpoint(
            tmp_path / name, tensors, json.loads(config.to_json_string()) | {"architectures": ["Qwen2ForCausalLM"]}
        )
    recipe = {
        "version": 1, "base": "./base", "experts": [{"name": n, "model": f"./{n}"} for n in "ab"], **ROUTE_ALL,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in recipe.items()))
    folder = merge(make_plan(load_recipe(tmp_path / "recipe.yaml")), tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.bias" in read_bundle(folder).experts["a"].tensors
    for switch in (1, 10**9):
        model = open_with(folder, switch)
        assert_complete(model, folder)


def test_only_modules_that_scale_take_a_vector_for_each_row() -> None:
    norm = torch.nn.LayerNorm(6)
    assert takes_rows(torch.nn.RMSNorm(6)) is False
    assert takes_rows(norm) is False
    config = LlamaForCausalLM.config_class(hidden_size=6, num_attention_heads=1, num_hidden_layers=1, vocab_size=4)
    assert takes_rows(LlamaForCausalLM(config).model.norm) is True


def test_a_norm_that_takes_no_rows_is_called_row_by_row(bundle: Path) -> None:
    model = open_with(bundle, 10**9)
    mixer = model.model.norm.mixer
    mixer.vectors = {"weight": torch.randn(2, 8), "bias": torch.randn(2, 8)}
    module = torch.nn.LayerNorm(8)
    take_over(module, mixer)
    x = torch.randn(5, 3, 8)
    with torch.no_grad(), model.mixing(MIXTURES):
        model(PROMPTS)
        found = module(x)
    for row, weights in enumerate(MIXTURES):
        scale = 1 + torch.tensor(weights) @ mixer.vectors["weight"]
        shift = torch.tensor(weights) @ mixer.vectors["bias"]
        expected = torch.nn.functional.layer_norm(x[row], (8,), scale, shift)
        torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=1e-6)


# What must not pass


def problem(call: Callable[[], object], kind: type[Exception] = BundleError) -> str:
    with pytest.raises(kind) as caught:
        call()
    only = caught.value.problems[0]  # type: ignore[attr-defined]
    assert only.hint
    return f"{only.place}: {only.message}"


def test_without_a_router_a_mixture_is_needed(bundle: Path) -> None:
    model = open_with(bundle, 1)
    assert "the bundle has no router" in problem(lambda: model.generate(PROMPTS))
    assert "the bundle has no router" in problem(lambda: model(PROMPTS))


def test_a_sequence_that_goes_on_needs_its_mixture(bundle: Path) -> None:
    model = open_with(bundle, 1)
    with torch.no_grad(), model.mixing("a"):
        cache = model(PROMPTS, use_cache=True).past_key_values
    message = problem(lambda: model(PROMPTS[:, :1], past_key_values=cache))
    assert "the mixture of a sequence that goes on is not known" in message


def test_embeddings_cannot_be_routed(bundle: Path) -> None:
    model = open_with(bundle, 1)
    message = problem(lambda: model.generate(inputs_embeds=torch.zeros(1, 2, 8)))
    assert "there are no token ids to route on" in message


def test_a_routed_model_is_not_saved_as_if_it_were_the_bundle(bundle: Path, tmp_path: Path) -> None:
    model = open_with(bundle, 1)
    assert "is not saved anew" in problem(lambda: model.save_pretrained(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_a_missing_expert_file_is_named(bundle: Path) -> None:
    (bundle / "experts/a.safetensors").unlink()
    assert "experts/a.safetensors" in problem(lambda: open_bundle(bundle), CheckpointError)


def test_a_cut_expert_file_is_named(bundle: Path) -> None:
    file = bundle / "experts/b.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    assert "experts/b.safetensors" in problem(lambda: open_bundle(bundle), CheckpointError)


def test_a_dense_model_that_lacks_a_weight_is_refused(bundle: Path) -> None:
    tensors = load_file(bundle / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, bundle / "model.safetensors", metadata={"format": "pt"})
    message = problem(lambda: open_bundle(bundle))
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_a_newer_manifest_is_refused(bundle: Path) -> None:
    file = bundle / "routing_manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 6}))
    assert "schema_version" in problem(lambda: open_bundle(bundle))


def test_the_cache_keeps_to_its_budget(bundle: Path) -> None:
    opened = open_with(bundle, 1).opened
    entry = opened.cache.entry_bytes
    stacks = {mixer.name: mixer.matrix.deltas.stack_bytes for mixer in opened.mixers if mixer.matrix}
    model = open_with(bundle, 1, cache_bytes=2 * entry + sum(stacks.values()))
    cache: MixtureCache = model.opened.cache
    with torch.no_grad():
        for mixture in ("a", "b", {"a": 0.5, "b": 0.5}):
            with model.mixing(mixture):
                model(PROMPTS)
    held = sum(tensor.nbytes for entry_ in cache.entries.values() for tensor in entry_.values())
    assert list(cache.entries) == [(0.0, 1.0), (0.5, 0.5)]
    assert held == 2 * entry
