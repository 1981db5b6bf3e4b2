"""The two ends of the dial, and the promise of same bytes, from recipe to files on disk."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import fine_tune, random_tensors, write_checkpoint
from safetensors.torch import load_file

from mediator_cli import Settings, read_bundle, verify_bundle
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine import batches

EXPERTS = [{"name": "a", "model": "./a", "weight": 0.7}, {"name": "b", "model": "./b", "weight": 1.6}]
LORA = [*EXPERTS, {"name": "lora", "model": "./lora"}]
LOSSLESS = {"density": 1.0, "values": "fp32"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def from_bf16(tensor):
    return (tensor.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_bf16_bits(values):
    """Round float32 to bfloat16, to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def same_bits(left, right):
    """Compare entry by entry, telling 0 from -0."""
    kind = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return left.contiguous().view(kind) == right.contiguous().view(kind)


def bits_of(tensor):
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def test_rule_none_with_linear_equals_numpy_bit_for_bit(workshop):
    out = workshop.merge(experts=EXPERTS, assign={"rule": "none"}, average={"method": "linear"})
    merged = load_file(out / "model.safetensors")
    assert set(merged) == set(workshop.base)
    for name, tensor in merged.items():
        total = from_bf16(workshop.experts["a"][name]) * np.float32(0.7)
        total += from_bf16(workshop.experts["b"][name]) * np.float32(1.6)
        assert np.array_equal(bits_of(tensor), to_bf16_bits(total / np.float32(0.7 + 1.6))), name


def test_rule_none_writes_no_sparse_expert(workshop):
    out = workshop.merge(assign={"rule": "none"})
    assert not (out / "experts").exists()
    assert set(read_bundle(out).manifest.assignment.values()) == {"average"}


def expected_experts(workshop, dtype):
    """The experts as plain tensors in the output dtype; the adapter multiplied in float64."""
    factors = load_file(workshop.folder / "lora" / "adapter_model.safetensors")
    adapted = {}
    for name, tensor in workshop.base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        adapted[name] = tensor.float()
        if f"{module}.lora_A.weight" in factors:
            b, a = (factors[f"{module}.lora_{factor}.weight"].double() for factor in "BA")
            adapted[name] = tensor.float() + (2.0 * (b @ a)).float()
    experts = {**workshop.experts, "lora": adapted}
    return {expert: {n: t.float().to(dtype) for n, t in tensors.items()} for expert, tensors in experts.items()}


def add_negative_zeros(workshop):
    """Put -0.0 where the base is not, where it is +0.0, and +0.0 where the base is -0.0."""
    for name, tensor in workshop.base.items():
        tensor.view(-1)[:3] = torch.tensor([1.0, 0.0, -0.0])
        for expert in workshop.experts.values():
            expert[name].view(-1)[:3] = torch.tensor([-0.0, -0.0, 0.0])
    write_checkpoint(workshop.folder / "base", workshop.base)
    for name, tensors in workshop.experts.items():
        write_checkpoint(workshop.folder / name, tensors)


@pytest.mark.parametrize("dense", ["average", "base"])
@pytest.mark.parametrize("values", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_all_at_density_one_gives_every_expert_back(workshop, dtype, values, dense):
    add_negative_zeros(workshop)
    extract = {"density": 1.0, "values": values, "dense": dense}
    out = workshop.merge(experts=LORA, assign={"rule": "all"}, extract=extract, output={"dtype": dtype})
    bundle = read_bundle(out)
    for expert, tensors in expected_experts(workshop, DTYPES[dtype]).items():
        for name, tensor in tensors.items():
            found = bundle.expert(expert, name)
            assert found.dtype == DTYPES[dtype]
            assert same_bits(found, tensor).all(), (expert, name)


def test_negative_zeros_are_kept_by_overrides(workshop):
    add_negative_zeros(workshop)
    out = workshop.merge(experts=LORA, assign={"rule": "all"}, extract=LOSSLESS)
    sparse = read_bundle(out).experts["a"].read("model.norm.weight")
    assert {0, 1} <= set(sparse.override_positions.tolist())
    assert torch.signbit(sparse.override_values[:2]).all()


def test_a_mixture_that_is_not_one_expert_adds_weighted_deltas(workshop):
    out = workshop.merge(assign={"rule": "all"}, extract=LOSSLESS, output={"dtype": "float32"})
    name = "model.layers.1.mlp.up_proj.weight"
    bundle = read_bundle(out)
    dense = bundle.dense(name)
    deltas = {expert: workshop.experts[expert][name].float() - dense for expert in ("a", "b")}
    expected = dense + 0.25 * deltas["a"] + 0.5 * deltas["b"]
    assert torch.allclose(bundle.mixture({"a": 0.25, "b": 0.5}, name), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def large(workshop):
    """The workshop with an embedding of more than three blocks."""
    base = random_tensors(0) | {"model.embed_tokens.weight": torch.randn(25_000, 8).bfloat16()}
    for name, tensors in (("base", base), ("a", fine_tune(base, 1)), ("b", fine_tune(base, 2))):
        write_checkpoint(workshop.folder / name, tensors, {"vocab_size": 25_000})
    return workshop


FIELDS = {
    "experts": EXPERTS,
    "assign": {"rule": "mean_std", "candidates": "all"},
    "average": {"method": "dare_ties", "density": 0.5},
    "extract": {"density": 0.05, "values": "int8"},
}
ROUTED = {**FIELDS, "assign": {"rule": "all"}}


def all_bytes(folder):
    """The bytes of every dense tensor by name, and of every sparse expert's file."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load_file(file).items()}
    assert found
    return found | {file.name: file.read_bytes() for file in (folder / "experts").glob("*.safetensors")}


WAYS = {
    "one worker": {"workers": 1, "slab": BLOCK},
    "five workers, two blocks": {"workers": 5, "slab": 2 * BLOCK},
    "the same again": {"workers": 2, "slab": 4 * BLOCK},
    "little memory": {"workers": 4, "memory": 260 << 20},
    "much memory": {"workers": 2, "memory": 8 << 30},
}


@pytest.mark.parametrize("values", ["int8", "sign", "bf16"])
def test_same_recipe_gives_same_bytes_however_it_runs(large, values):
    fields = {**ROUTED, "extract": {"density": 0.05, "values": values}}
    first = all_bytes(large.merge("first", Settings(workers=2, slab=4 * BLOCK), **fields))
    assert "a.safetensors" in first
    for way, other in WAYS.items():
        assert all_bytes(large.merge(way, Settings(**other), **fields)) == first, way


@pytest.mark.parametrize("most", [1, 1000, 250_000])
@pytest.mark.parametrize("over", ["tensor", "model"])
def test_batches_change_no_byte(large, monkeypatch, most, over):
    fields = {**ROUTED, "extract": {"density": 0.05, "values": "int8", "over": over}}
    first = all_bytes(large.merge("first", **fields))
    monkeypatch.setattr(batches, "_ROW_ELEMENTS", most)
    assert all_bytes(large.merge("second", Settings(workers=3), **fields)) == first


@pytest.mark.parametrize("extract", [{"select": "random", "values": "sign"}, {"density": 1.0, "values": "bf16"}])
def test_other_ways_to_extract_give_same_bytes_too(large, extract):
    fields = {**ROUTED, "average": {"method": "linear"}, "extract": {"density": 0.3, **extract}}
    first = all_bytes(large.merge("first", Settings(workers=1, slab=4 * BLOCK), **fields))
    assert first == all_bytes(large.merge("second", Settings(workers=3, slab=BLOCK), **fields))


def test_another_seed_gives_other_bytes(large):
    assert all_bytes(large.merge("first", **ROUTED)) != all_bytes(large.merge("second", seed=1, **ROUTED))


def tensor_digests(folder):
    """The digests of all dense and sparse tensors."""
    manifest = read_bundle(folder).manifest
    dense = {name: record.xxh3 for name, record in manifest.tensors.items()}
    return dense, {record.expert: record.tensors for record in manifest.sparse}


@pytest.mark.parametrize(("shard_size", "n_files"), [("200B", 23), ("1KB", 4), ("50KB", 1)])
@pytest.mark.parametrize("over", ["tensor", "model"])
def test_shard_size_changes_files_but_no_tensor(workshop, shard_size, n_files, over):
    fields = {**ROUTED, "extract": {"density": 0.05, "values": "int8", "over": over}}
    whole = workshop.merge("whole", **fields)
    shards = workshop.merge("shards", output={"shard_size": shard_size}, **fields)
    for folder, count in ((whole, 1), (shards, n_files)):
        assert len(list(folder.glob("model*.safetensors"))) == count
        assert len(list((folder / "experts").glob("a*.safetensors"))) == count
    one, other = (
        {name: data for name, data in all_bytes(folder).items() if not name.endswith(".safetensors")}
        for folder in (whole, shards)
    )
    assert one == other
    assert tensor_digests(whole) == tensor_digests(shards)
    assert read_bundle(whole).manifest.digest == read_bundle(shards).manifest.digest
    for expert in "ab":
        for name in workshop.base:
            kept, again = (read_bundle(folder).experts[expert].read(name) for folder in (whole, shards))
            assert torch.equal(kept.positions, again.positions)
            assert torch.equal(kept.values, again.values)
    assert verify_bundle(shards).problems == ()


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_python_hash_seed_changes_no_byte(workshop, hash_seed):
    here = workshop.merge("here", **FIELDS)
    recipe = workshop.recipe("there.yaml", **FIELDS)
    code = (
        "import sys; from pathlib import Path; from mediator_cli import load_recipe, make_plan, merge;"
        "merge(make_plan(load_recipe(Path(sys.argv[1]))), Path(sys.argv[2]))"
    )
    there = workshop.folder / "there"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, "-c", code, recipe, there], check=True, env=environment)
    assert all_bytes(here) == all_bytes(there)
    assert (here / "conflicts.json").read_bytes() == (there / "conflicts.json").read_bytes()


def test_the_digest_covers_every_tensor(workshop):
    one = read_bundle(workshop.merge("one", **ROUTED)).manifest.digest
    write_checkpoint(workshop.folder / "b", fine_tune(workshop.base, 9))
    assert read_bundle(workshop.merge("two", **ROUTED)).manifest.digest != one
