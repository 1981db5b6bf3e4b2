"""Adapters added to a bundle of low-rank experts, and taken out of it: stored as they are, nothing pruned."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import all_files, edit_json, edit_tensors, put, write_adapter
from growing import growing_workshop, low_rank

from mediator_cli import open_bundle, verify_bundle
from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.bundle.manifest import LIBRARY_SCHEMA_VERSION, MANIFEST, read_manifest, to_json, with_router
from mediator_cli.bundle.read import read_bundle
from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord
from mediator_cli.errors import BundleError, CheckpointError
from mediator_cli.pipeline.change.newcomer import Newcomer
from mediator_cli.pipeline.change.run import add_expert, remove_expert
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.runtime.gates_file import read_gates, write_gates

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    made = growing_workshop(tmp_path_factory.mktemp("library"))
    write_adapter(made.folder / "second", 5, rank=3)
    write_adapter(made.folder / "third", 6, rank=4, use_rslora=True)
    return made


@pytest.fixture(scope="module")
def pair_once(shop):
    return low_rank(shop, "pair", "lora", "second")


@pytest.fixture
def pair(shop, pair_once, tmp_path, monkeypatch):
    monkeypatch.chdir(shop.folder)
    return shutil.copytree(pair_once, tmp_path / "pair")


@pytest.fixture(scope="module")
def triple(shop):
    return low_rank(shop, "triple", "lora", "second", "third")


def with_gates(bundle, names, top_k=None):
    """Give a bundle a gate on one matrix."""
    draw = torch.Generator().manual_seed(0)
    gate = Gate(torch.randn(len(names), 1, 8, generator=draw), torch.randn(len(names), generator=draw))
    record = write_gates(
        bundle, Gates("arrow", GateRule(score="absolute", top_k=top_k), names, {f"{MODULE}.weight": gate})
    )
    (bundle / MANIFEST).write_text(to_json(read_manifest(bundle).model_copy(update={"gates": record})))
    return gate


def test_an_adapter_is_stored_as_in_a_bundle_made_with_it(pair, triple, shop):
    changed = add_expert(pair, Newcomer("third", "third"))
    assert changed.energy == 1.0
    new, old = read_manifest(pair), read_manifest(triple)
    assert all_files(pair / "experts") == all_files(triple / "experts")
    assert (new.sparse, new.digest, new.sizes) == (old.sparse, old.digest, old.sizes)
    assert new.schema_version == LIBRARY_SCHEMA_VERSION
    assert (new.experts[2].kind, new.assignment) == ("lora", old.assignment)
    assert verify_bundle(pair).problems == ()
    alone = shop.merge("third alone", experts=[{"name": "third", "model": "./third"}], assign={"rule": "none"})
    found, wanted = read_bundle(pair), read_bundle(alone)
    for name in wanted.tensors:
        torch.testing.assert_close(found.expert("third", name), wanted.dense(name), atol=0.02, rtol=0.02)
    ids, answers = torch.tensor([[5, 6, 7]]), []
    for bundle in (pair, triple):
        model = open_bundle(bundle)
        with model.mixing("third"), torch.no_grad():
            answers.append(model(ids).logits)
    assert torch.equal(*answers)


def test_adding_and_taking_out_leaves_the_files_as_they_were(pair):
    before = all_files(pair / "experts")
    digest = read_manifest(pair).digest
    add_expert(pair, Newcomer("third", "third"))
    changed = remove_expert(pair, "third")
    assert all_files(pair / "experts") == before
    assert changed.after.digest == digest
    assert not any("its part" in notice for notice in changed.notices)
    changed = remove_expert(pair, "lora")
    assert not any("its part" in notice for notice in changed.notices)
    assert [record.expert for record in changed.after.sparse] == ["second"]
    assert verify_bundle(pair).problems == ()


def only(folder, part):
    """Leave an adapter the modules of one layer."""
    edit_tensors(
        folder / "adapter_model.safetensors",
        lambda t: [t.pop(name) for name in list(t) if f"layers.{part}." not in name],
    )
    return folder


@pytest.mark.parametrize(("dense", "kept"), [("base", "012"), ("average", "0")])
def test_an_adapter_may_be_the_first_to_change_a_unit_into_which_nothing_was_merged(
    shop, one_layer, tmp_path, monkeypatch, dense, kept
):
    monkeypatch.chdir(shop.folder)
    bundle = shutil.copytree(one_layer, tmp_path / "one")
    manifest = read_manifest(bundle)
    extract = manifest.extract.model_copy(update={"dense": dense})
    (bundle / MANIFEST).write_text(to_json(manifest.model_copy(update={"extract": extract})))
    changed = add_expert(bundle, Newcomer("third", "third"))
    layers = {name.split(".")[2] for name in changed.after.sparse[2].tensors}
    assert layers == set(kept)
    routed = {unit for unit, how in changed.after.assignment.items() if how == "route"}
    assert routed == set(changed.after.sparse[2].units) == {f"model.layers.{layer}" for layer in kept}
    squares = dict.fromkeys("012", 0.0)
    for name, (a, b) in read_tensors_of(shop.folder / "third").items():
        squares[name.split("layers.")[1][0]] += float((b.double() @ a.double()).square().sum())
    share = sum(squares[layer] for layer in kept) / sum(squares.values())
    assert changed.energy == pytest.approx(share, rel=1e-5)
    assert any("lost of expert third" in notice and "layers.1" in notice for notice in changed.notices) == (kept == "0")
    assert verify_bundle(bundle).problems == ()


@pytest.fixture(scope="module")
def one_layer(shop):
    """A bundle of two adapters of layer 0 alone."""
    for number in (1, 2):
        only(write_adapter(shop.folder / f"first{number}", 20 + number), 0)
    rule = {"assign": {"rule": "listed", "units": ["model.layers.0"]}}
    return low_rank(shop, "one layer", "first1", "first2", **rule)


def read_tensors_of(folder):
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}


REFUSED = {
    "a full checkpoint": ("c", None, BundleError, "is a full checkpoint, and the bundle's experts are low-rank"),
    "DoRA": ("dora", {"use_dora": True}, CheckpointError, "is a DoRA adapter"),
    "NaN": ("nan", None, CheckpointError, "NaN"),
    "other shapes": ("shapes", None, CheckpointError, "does not give"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_plain_adapter_of_the_base_changes_nothing(pair, shop, fault):
    model, config, kind, message = REFUSED[fault]
    if model != "c":
        folder = write_adapter(shop.folder / model, 9)
        edit_json(folder / "adapter_config.json", **(config or {}))
        tensors = {"nan": torch.full((2, 8), float("nan")), "shapes": torch.zeros(2, 9)}
        if model == "dora":
            sides = {name: b.shape[0] for name, (_, b) in read_tensors_of(folder).items()}
            lengths = {f"{name}.lora_magnitude_vector": torch.ones(side) for name, side in sides.items()}
            edit_tensors(folder / "adapter_model.safetensors", lambda t: t.update(lengths))
        if model in tensors:
            change = put(f"base_model.model.{MODULE}.lora_A.weight", tensors[model])
            edit_tensors(folder / "adapter_model.safetensors", change)
    before = all_files(pair)
    with pytest.raises(kind, match=message):
        add_expert(pair, Newcomer("x", model))
    assert all_files(pair) == before


def test_a_gated_bundle_loses_an_expert_but_takes_no_newcomer(triple, shop, monkeypatch):
    monkeypatch.chdir(shop.folder)
    bundle = shutil.copytree(triple, shop.folder / "gated")
    names = ("lora", "second", "third")
    gate = with_gates(bundle, names, top_k=3)
    before = all_files(bundle)
    with pytest.raises(BundleError, match=r"gates inside the model \(arrow\) choose among its experts"):
        add_expert(bundle, Newcomer("again", "lora"))
    assert all_files(bundle) == before
    changed = remove_expert(bundle, "second")
    left = read_gates(bundle, changed.after)
    assert (left.experts, left.rule.top_k, left.rule.score) == (("lora", "third"), 2, "absolute")
    kept = left.by_name[f"{MODULE}.weight"]
    np.testing.assert_array_equal(kept.directions.numpy(), gate.directions[[0, 2]].numpy())
    np.testing.assert_array_equal(kept.bias.numpy(), gate.bias[[0, 2]].numpy())
    assert (verify_bundle(bundle).problems, verify_bundle(bundle).unknown) == ((), ())
    assert changed.after.gates.file.name == "gates-2.safetensors"
    assert (changed.notices, changed.after.history[0].router) == ((), "gates, left without its scores")
    assert remove_expert(bundle, "lora").after.gates.file.name == "gates.safetensors"
    assert (verify_bundle(bundle).problems, verify_bundle(bundle).unknown) == ((), ())


def test_a_blind_router_keeps_its_weights(pair):
    policy = PolicyRecord(rule="fixed", weights={"lora": 0.75, "second": 0.5}, outside="ignore")
    router = RouterRecord(
        features="none", classifier="none", experts=("lora", "second"), size=1, temperature=1.0,
        outside_above=None, policy=policy, report=None, file=None,
    )  # fmt: skip
    (pair / MANIFEST).write_text(to_json(with_router(read_manifest(pair), router)))
    changed = add_expert(pair, Newcomer("third", "third"))
    assert changed.after.router.experts == ("lora", "second", "third")
    assert (changed.after.router.size, changed.after.router.policy.weights) == (1, {"lora": 0.75, "second": 0.5})
    assert any("gives weight 0 to third" in notice for notice in changed.notices)
    assert "begin router" not in (pair / "README.md").read_text()
    changed = remove_expert(pair, "lora")
    assert changed.after.router.policy.weights == {"second": 0.5}
    model = open_bundle(pair)
    assert model.expert_names == ("second", "third")


def test_an_unreadable_recipe_does_not_matter_to_low_rank_experts(pair):
    manifest = read_manifest(pair)
    recipe = manifest.recipe.model_copy(update={"text": "strategy: arrow\n"})
    (pair / MANIFEST).write_text(to_json(manifest.model_copy(update={"recipe": recipe})))
    assert add_expert(pair, Newcomer("third", "third")).after.sparse[2].expert == "third"
