"""What can be evaluated, what it weighs, and what is loaded for it."""

import pytest
import torch
from conftest import edit_json, with_prompts
from safetensors.torch import load_file
from tiny_bundles import PLAIN_EXPERTS, routed

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.errors import CheckpointError
from mediator_cli.evaluate.models import find_candidates, load_candidate


@pytest.fixture
def shop(shop, monkeypatch):
    monkeypatch.chdir(shop.folder)
    return shop


def size(*files):
    return sum(file.stat().st_size for file in files)


def test_sizes_count_what_each_part_needs(shop):
    out = routed(shop)
    dense, a, b, router = (
        out / name
        for name in ("model.safetensors", "experts/a.safetensors", "experts/b.safetensors", "router.safetensors")
    )
    names = ["out", "out::dense", "out::a", "out::oracle", "base", "lora", "base"]
    found = find_candidates(names, ["a", "b"], shop.folder / "base")
    lora = size(shop.folder / "base" / "model.safetensors", shop.folder / "lora" / "adapter_model.safetensors")
    assert [(c.name, c.kind, c.n_bytes) for c in found] == [
        ("out", "bundle", size(dense, a, b, router)),
        ("out::dense", "bundle", size(dense)),
        ("out::a", "bundle", size(dense, a)),
        ("out::oracle", "bundle", size(dense, a, b)),
        ("base", "model", size(shop.folder / "base" / "model.safetensors")),
        ("lora", "adapter", lora),
    ]
    assert [c.mixture("b") for c in found] == [None, None, "a", "b", None, None]


def test_all_problems_are_told_at_once(shop):
    shop.merge("plain", experts=PLAIN_EXPERTS, assign={"rule": "all"})
    names = ["plain", "plain::c", "plain::oracle", "base::a", "gone", "lora"]
    with pytest.raises(CheckpointError) as caught:
        find_candidates(names, ["a", "films"])
    problems = caught.value.problems
    assert [(p.place, p.message) for p in problems if p.place != str(shop.folder / "gone")] == [
        ("plain", "has no router"),
        ("plain::c", "no such part"),
        ("plain::oracle", "no expert is named like the task 'films'"),
        ("base", "is no bundle, so it has no part 'a'"),
        ("lora", "is an adapter"),
    ]
    assert len(problems) == 6
    assert "plain::a, ::dense, ::oracle" in problems[0].hint


def test_an_adapter_is_added_to_its_base_in_float32(shop):
    (candidate,) = find_candidates(["lora"], [], shop.folder / "base")
    model, tokenizer = load_candidate(candidate)
    factors = load_file(shop.folder / "lora" / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        expected = shop.base[name].double()
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            expected += 2 * factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
        torch.testing.assert_close(parameter.double(), expected, rtol=2**-8, atol=1e-6)
        assert parameter.dtype == torch.bfloat16
    assert tokenizer("two plus")["input_ids"] == [5, 7]


def test_an_adapter_of_another_base_is_refused(shop):
    edit_json(shop.folder / "lora" / "adapter_config.json", r=3)
    with pytest.raises(CheckpointError, match="says r=3"):
        find_candidates(["lora"], [], shop.folder / "base")


def test_a_bundle_loads_whole_and_its_dense_part_as_a_plain_model(shop):
    out = routed(shop)
    whole, dense = find_candidates(["out", "out::dense"], [])
    assert type(load_candidate(whole)[0]).__name__ == "RoutedLlamaForCausalLM"
    model, _ = load_candidate(dense)
    assert type(model).__name__ == "LlamaForCausalLM"
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.named_parameters())


def test_a_static_merge_needs_no_router(shop):
    out = shop.merge("out", experts=with_prompts(), assign={"rule": "none"})
    assert read_manifest(out).router is None
    assert [c.n_bytes for c in find_candidates(["out"], [])] == [size(out / "model.safetensors")]
