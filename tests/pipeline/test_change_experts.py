"""Experts added to a finished bundle and taken out of it, against merges from scratch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import all_files, fine_tune, write_adapter, write_checkpoint
from growing import RIDGE, growing_workshop, merged
from safetensors.numpy import load_file

from mediator_cli import verify_bundle
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.bundle.read import read_bundle
from mediator_cli.errors import BundleError, CheckpointError, MediatorError, OutputError
from mediator_cli.pipeline.change.newcomer import Newcomer
from mediator_cli.pipeline.change.run import add_expert, remove_expert
from mediator_cli.pipeline.settings import Settings
from mediator_cli.runtime.router import read_ridge_sums, read_router

RUN = Settings(workers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("growing")


@pytest.fixture(scope="module")
def shop(folder):
    return growing_workshop(folder)


@pytest.fixture(scope="module")
def pair(shop):
    """A bundle of a and b, with a ridge router."""
    return merged(shop, "pair", "a", "b", router=RIDGE)


@pytest.fixture(scope="module")
def triple(shop):
    """The same with c, merged from scratch."""
    return merged(shop, "triple", "a", "b", "c", router=RIDGE)


@pytest.fixture
def copy(pair, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    return shutil.copytree(pair, tmp_path / "copy")


def add_c(bundle, shop, name="c", **more):
    return add_expert(bundle, Newcomer(name, str(shop.folder / "c")), {name: shop.folder / "c.jsonl"}, run=RUN, **more)


def experts_in(bundle):
    return {name: data for name, data in all_files(bundle / "experts").items() if data is not None}


def dense_in(bundle):
    return {file.name: file.read_bytes() for file in bundle.glob("model*.safetensors")}


FORMS = {
    "int8": {},
    "several files": {"output": {"shard_size": "1500B"}},
    "over the model": {"extract": {"dense": "base", "density": 0.2, "over": "model"}},
    "random": {"extract": {"dense": "base", "density": 0.4, "select": "random", "values": "bf16"}, "seed": 5},
    "lossless": {"extract": {"dense": "base", "density": 1, "values": "bf16"}},
    "signs, and norms whole": {
        "extract": {"mode": "sign", "dense": "base"},
        "overrides": [{"match": "*norm*", "extract": {"mode": "sparse", "density": 1, "values": "bf16"}}],
    },
    "tensors as units": {"conflict": {"unit": "tensor"}, "assign": {"rule": "listed", "units": ["*.mlp.*"]}},
}


ALSO = [pytest.param(form, marks=pytest.mark.slow) for form in ("int8", "random", "lossless", "tensors as units")]


@pytest.mark.parametrize("form", ["several files", "over the model", "signs, and norms whole", *ALSO])
def test_an_added_expert_has_the_bytes_that_a_merge_gives_it(shop, folder, form):
    fields = {"router": None, **FORMS[form]}
    small = merged(shop, f"small {form}", "a", "b", **fields)
    whole = merged(shop, f"whole {form}", "a", "b", "c", **fields)
    add_expert(small, Newcomer("c", str(folder / "c")), run=RUN, router=False)
    assert experts_in(small) == experts_in(whole)
    new, old = read_manifest(small), read_manifest(whole)
    assert (new.sparse, new.sizes) == (old.sparse, old.sizes)
    assert new.experts[2].files == old.experts[2].files
    assert verify_bundle(small) == verify_bundle(whole)
    if "average" not in new.assignment.values():
        assert dense_in(small) == dense_in(whole)
        assert (new.digest, new.tensors) == (old.digest, old.tensors)


def test_a_ridge_router_with_one_more_is_the_one_fitted_on_all_prompts(copy, shop, triple):
    changed = add_c(copy, shop)
    new, whole = (read_ridge_sums(place, read_manifest(place)) for place in (copy, triple))
    assert new.counts.tolist() == whole.counts.tolist()
    np.testing.assert_allclose(new.gram, whole.gram, rtol=1e-9)
    arrays, wanted = (load_file(place / read_manifest(place).router.file.name) for place in (copy, triple))
    for name in ("coefficients", "intercepts", "mean", "scale"):
        np.testing.assert_allclose(arrays[f"classifier.{name}"], wanted[f"classifier.{name}"], rtol=1e-4, atol=1e-6)
    router, reference = changed.after.router, read_manifest(triple).router
    assert router.experts == ("a", "b", "c")
    assert router.temperature == pytest.approx(reference.temperature, rel=1e-3)
    assert router.report.accuracy == reference.report.accuracy
    assert router.report.confusion == reference.report.confusion
    assert router.report.n_fitted == reference.report.n_fitted


def test_the_others_stay_byte_for_byte_and_the_manifest_tells_of_the_newcomer(copy, shop, pair):
    before = all_files(pair)
    changed = add_c(copy, shop)
    after = all_files(copy)
    assert set(before) - set(after) == {"router.safetensors"}
    assert set(after) - set(before) == {"experts/c.safetensors", "router-2.safetensors"}
    same = {name for name in before if after.get(name) == before[name]}
    assert set(before) - same == {"router.safetensors", "routing_manifest.json", "README.md"}
    manifest = read_manifest(copy)
    assert manifest == changed.after
    assert [source.name for source in manifest.experts] == ["a", "b", "c"]
    assert manifest.experts[2].weight == 0.0
    (record,) = manifest.history
    assert (record.change, record.source, record.before) == ("added", manifest.experts[2], read_manifest(pair).digest)
    assert record.source.prompts.name == str(shop.folder / "c.jsonl")
    assert verify_bundle(copy).problems == ()
    assert verify_bundle(copy).unknown == ()
    card = (copy / "README.md").read_text()
    assert "Merged with mediator from 3 experts of one base." in card
    assert "| c | c | not declared |" in card
    assert "- expert c added, from c; router: ridge solved again" in card
    assert "taken for c" in card


def test_an_expert_added_and_taken_out_again_leaves_the_bundle_as_it_was(copy, shop, pair):
    add_c(copy, shop)
    remove_expert(copy, "c")
    assert experts_in(copy) == experts_in(pair)
    old, new = read_manifest(pair), read_manifest(copy)
    assert (new.digest, new.sizes, new.sparse, new.experts) == (old.digest, old.sizes, old.sparse, old.experts)
    assert [record.change for record in new.history] == ["added", "removed"]
    assert new.router.file.name == "router.safetensors"
    assert new.router.report == old.router.report
    before, after = load_file(pair / "router.safetensors"), load_file(copy / "router.safetensors")
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert verify_bundle(copy).problems == ()
    assert verify_bundle(copy).unknown == ()
    assert "| c |" not in (copy / "README.md").read_text()


def test_a_bundle_without_one_routes_as_one_merged_without_it(triple, pair, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    rest = shutil.copytree(triple, tmp_path / "rest")
    changed = remove_expert(rest, "c")
    new, old = load_file(rest / "router-2.safetensors"), load_file(pair / "router.safetensors")
    for name in ("coefficients", "intercepts", "mean", "scale"):
        np.testing.assert_allclose(new[f"classifier.{name}"], old[f"classifier.{name}"], rtol=1e-4, atol=1e-6)
    assert changed.after.router.report.confusion == read_manifest(pair).router.report.confusion
    assert experts_in(rest) == experts_in(pair)
    assert not any("has its part" in notice for notice in changed.notices)


def test_without_the_prompts_of_the_others_ridge_grows_all_the_same(shop, pair, triple, tmp_path):
    # From a folder where the relative paths of the manifest lead nowhere.
    bundle = shutil.copytree(pair, tmp_path / "elsewhere" / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        changed = add_c(bundle, shop)
    arrays, wanted = load_file(bundle / "router-2.safetensors"), load_file(triple / "router.safetensors")
    coefficients = (each["classifier.coefficients"] for each in (arrays, wanted))
    np.testing.assert_allclose(*coefficients, rtol=1e-4, atol=1e-6)
    router, old = changed.after.router, read_manifest(pair).router
    assert (router.temperature, router.report) == (old.temperature, None)
    assert router.outside_above >= old.outside_above
    assert any("12 of 12 held-out prompts of c are taken for its own" in notice for notice in changed.notices)
    assert any("the prompts that the other experts were fitted with are not all there" in n for n in changed.notices)


def test_without_its_prompts_an_expert_is_taken_out_of_ridge_by_its_mean(triple, tmp_path, monkeypatch):
    rest = shutil.copytree(triple, tmp_path / "rest")
    monkeypatch.chdir(tmp_path)
    changed = remove_expert(rest, "a")
    assert "for want of the prompts" in changed.after.history[0].router
    sums = read_ridge_sums(rest, changed.after)
    assert sums.counts.tolist() == [48, 48]
    router = read_router(rest, changed.after)
    held = read_ridge_sums(triple, read_manifest(triple))
    means = held.sums[1:] / held.counts[1:, None]
    assert router.route(means.astype(np.float32)).probabilities.argmax(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize("classifier", ["logistic", "prototype", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_other_routers_are_fitted_anew_where_all_prompts_are_there(shop, folder, monkeypatch, classifier):
    monkeypatch.chdir(folder)
    small = merged(shop, f"small {classifier}", "a", "b", router={"classifier": classifier})
    whole = merged(shop, f"whole {classifier}", "a", "b", "c", router={"classifier": classifier})
    add_c(small, shop)
    new, old = read_manifest(small).router, read_manifest(whole).router
    assert new.model_copy(update={"file": None}) == old.model_copy(update={"file": None})
    assert (small / "router-2.safetensors").read_bytes() == (whole / "router.safetensors").read_bytes()
    # Without the prompts: prototypes are added, the others refuse; any loses a row.
    monkeypatch.chdir(small)
    d = Newcomer("d", str(shop.folder / "b"))
    if classifier == "prototype":
        changed = add_expert(small, d, {"d": shop.folder / "c.jsonl"}, run=RUN)
        assert changed.after.router.experts == ("a", "b", "c", "d")
    else:
        with pytest.raises(BundleError, match=r"those of a, b(, c)? are not there"):
            add_expert(small, d, {"d": shop.folder / "c.jsonl"}, run=RUN)
    changed = remove_expert(small, "b")
    assert "in proportion" in changed.after.history[-1].router
    assert changed.after.router.report is None
    means = np.zeros((3, 8), np.float32)
    wanted = read_router(whole, read_manifest(whole)).route(means).probabilities[:, [0, 2]]
    if classifier != "prototype":
        found = read_router(small, changed.after).route(means).probabilities
        np.testing.assert_allclose(found, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-5)


def test_an_adapter_is_added_as_it_is_merged(shop, folder, monkeypatch):
    monkeypatch.chdir(folder)
    average = {"extract": {"dense": "average", "density": 1, "values": "bf16"}, "router": None}
    bundle = merged(shop, "with adapter", "a", "b", **average)
    changed = add_expert(bundle, Newcomer("lora", str(folder / "lora")), run=RUN)
    assert changed.after.experts[2].kind == "lora"
    merged_one = shop.merge("adapter alone", experts=[{"name": "lora", "model": "./lora"}], assign={"rule": "none"})
    found, wanted = read_bundle(bundle), read_bundle(merged_one)
    for name in wanted.tensors:
        if ".layers." in name:
            assert torch.equal(found.expert("lora", name), wanted.dense(name)), name
    assert changed.energy == pytest.approx(1.0, abs=1e-3)
    assert any("the dense expert stays as it was merged" in notice for notice in changed.notices)


def test_the_base_of_an_adapter_may_lie_elsewhere_now(shop, folder, tmp_path, monkeypatch):
    average = {"extract": {"dense": "average", "density": 0.5}, "router": None}
    bundle = merged(shop, "base gone", "a", "b", **average)
    monkeypatch.chdir(tmp_path)
    new = Newcomer("lora", str(folder / "lora"))
    with pytest.raises(BundleError, match=r"\./base, which the bundle notes, is not here"):
        add_expert(bundle, new, run=RUN)
    changed = add_expert(bundle, Newcomer("lora", str(folder / "lora"), str(folder / "base")), run=RUN)
    assert changed.after.experts[2].kind == "lora"
    # With the base's own tensors in the bundle it is not needed.
    own = merged(shop, "base inside", "a", "b", router=None)
    assert add_expert(own, new, run=RUN).after.experts[2].kind == "lora"


def test_the_energy_counts_what_lies_outside_routed_units(shop, folder):
    fields = {"assign": {"rule": "listed", "units": ["model.layers.0"]}, "router": None}
    fields["extract"] = {"dense": "base", "density": 1, "values": "bf16"}
    bundle = merged(shop, "one layer", "a", "b", **fields)
    changed = add_expert(bundle, Newcomer("c", str(folder / "c")), run=RUN)
    opened, c = read_bundle(bundle), load_tensors(folder / "c")
    inside = outside = 0.0
    for name in opened.tensors:
        square = float((c[name].double() - opened.dense(name).double()).square().sum())
        inside, outside = (inside + square, outside) if "layers.0" in name else (inside, outside + square)
    assert changed.energy == pytest.approx(inside / (inside + outside), rel=1e-6)


def load_tensors(folder):
    from safetensors.torch import load_file as load_torch

    return load_torch(folder / "model.safetensors")


def test_policies_keep_what_they_were_given(shop, folder, monkeypatch):
    monkeypatch.chdir(folder)
    router = {**RIDGE, "policy": {"rule": "fixed", "weights": {"a": 0.25, "b": 0.5}}}
    bundle = merged(shop, "fixed", "a", "b", router=router)
    changed = add_c(bundle, shop)
    assert changed.after.router.policy.weights == {"a": 0.25, "b": 0.5}
    assert any("gives weight 0 to c" in notice for notice in changed.notices)
    routing = read_router(bundle, changed.after).route(np.zeros((1, 8), np.float32))
    assert routing.weights.tolist() == [[0.25, 0.5, 0.0]]
    changed = remove_expert(bundle, "a")
    assert changed.after.router.policy.weights == {"b": 0.5}


def test_experts_that_are_asked_need_no_prompts(shop):
    bundle = merged(shop, "asked", "a", "b", router={"features": "perplexity", "temperature": 0.7})
    changed = add_expert(bundle, Newcomer("c", str(shop.folder / "c")), run=RUN)
    router = changed.after.router
    assert (router.experts, router.size, router.temperature, router.report) == (("a", "b", "c"), 3, 0.7, None)
    changed = remove_expert(bundle, "b")
    changed = remove_expert(bundle, "a")
    assert (changed.after.router.experts, changed.after.router.policy.k) == (("c",), 1)
    with pytest.raises(BundleError, match="c is its last expert"):
        remove_expert(bundle, "c")
    assert verify_bundle(bundle).problems == ()


def test_a_classifier_over_what_experts_say_is_fitted_when_all_can_be_asked(shop, monkeypatch):
    monkeypatch.chdir(shop.folder)
    router = {"features": "perplexity", "classifier": "ridge", "max_prompts": 10}
    bundle = merged(shop, "said", "a", "b", router=router)
    changed = add_c(bundle, shop)
    assert (changed.after.router.experts, changed.after.router.size) == (("a", "b", "c"), 3)
    assert changed.after == read_manifest(bundle)
    assert (verify_bundle(bundle).problems, verify_bundle(bundle).unknown) == ((), ())
    assert remove_expert(bundle, "a").after.router.size == 2
    monkeypatch.chdir(bundle)
    with pytest.raises(BundleError, match="not all of their prompts are there"):
        remove_expert(bundle, "c")
    assert remove_expert(bundle, "c", router=False).after.router is None
    assert (verify_bundle(bundle).problems, verify_bundle(bundle).unknown) == ((), ())


def test_a_merge_keeps_its_part_of_one_that_is_taken_out(shop, tmp_path):
    bundle = merged(shop, "averaged", "a", "b", extract={"dense": "average", "density": 0.5}, router=None)
    changed = remove_expert(bundle, "a")
    assert "the dense expert still has its part of a, as it was merged" in changed.notices
    shared = merged(shop, "emr", "a", "b", extract={"mode": "emr", "dense": "base"}, router=None)
    with pytest.raises(BundleError, match="share arrays that are made of all of them"):
        add_expert(shared, Newcomer("c", str(shop.folder / "c")), run=RUN)
    changed = remove_expert(shared, "a")
    assert any("made of all, a among them" in notice for notice in changed.notices)
    assert verify_bundle(shared).problems == ()


FAULTS = {
    "name taken": ({"name": "B"}, BundleError, "must differ"),
    "name not allowed": ({"name": "no/slash"}, BundleError, "is not allowed"),
    "name reserved": ({"name": "dense"}, BundleError, "reserved"),
    "no such model": ({"model": "nowhere"}, CheckpointError, "no such folder"),
    "other shapes": ({"model": "wide"}, MediatorError, "shape"),
    "NaN": ({"model": "broken"}, CheckpointError, "nan at flat index"),
    "base of a checkpoint": ({"base": "base"}, BundleError, "is for adapters"),
    "another base": (
        {"model": "lora", "base": "other"},
        CheckpointError,
        "not the base that the bundle was merged from",
    ),
    "adapter of another base": ({"model": "stranger"}, CheckpointError, "was trained on other, which is another model"),
    "prompts too few": ({"prompts": "few.jsonl"}, BundleError, "c has 5 usable prompts"),
    "prompts of another": ({"prompts": "a.jsonl"}, BundleError, "a and c share 60 of 60 prompts"),
    "no prompts": ({"prompts": None}, BundleError, "needs prompts of the newcomer"),
    "prompts missing": ({"prompts": "gone.jsonl"}, CheckpointError, "check the path"),
}


@pytest.fixture(scope="module")
def faulty(shop, folder):
    """Models and prompts that do not fit."""
    wide = fine_tune(shop.base, 3) | {"model.layers.1.mlp.up_proj.weight": torch.zeros(13, 8)}
    write_checkpoint(folder / "wide", wide)
    broken = fine_tune(shop.base, 3)
    broken["model.layers.2.mlp.up_proj.weight"][1, 1] = float("nan")
    write_checkpoint(folder / "broken", broken)
    write_checkpoint(folder / "other", fine_tune(shop.base, 9))
    write_adapter(folder / "stranger", 4, base_model_name_or_path="other")
    lines = (folder / "c.jsonl").read_text().splitlines()[:5]
    (folder / "few.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_changes_nothing(copy, faulty, folder, fault):
    change, kind, message = FAULTS[fault]
    wish = {"name": "c", "model": "c", "base": None, "prompts": "c.jsonl"} | change
    files = {wish["name"]: folder / wish["prompts"]} if wish["prompts"] else {}
    before = all_files(copy)
    with pytest.raises(kind, match=message):
        add_expert(copy, Newcomer(wish["name"], wish["model"], wish["base"]), files, run=RUN)
    assert all_files(copy) == before


def test_an_equal_model_is_told_of_and_unknown_names_are_refused(copy, shop, folder):
    changed = add_expert(copy, Newcomer("again", "b"), run=RUN, router=False)
    assert "expert again is the same model as b: their files are equal" in changed.notices
    assert changed.after.router is None
    assert not list(copy.glob("router*"))
    assert verify_bundle(copy).problems == ()
    with pytest.raises(BundleError, match="no expert 'agian'"):
        remove_expert(copy, "agian")
    static = merged(shop, "static", "a", "b", assign={"rule": "none"}, router=None)
    for change in (lambda: add_c(static, shop, router=False), lambda: remove_expert(static, "a")):
        with pytest.raises(BundleError, match="no unit is routed"):
            change()


def test_two_changes_at_once_are_refused(copy, shop):
    import fcntl
    import os

    lock = os.open(copy, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    before = all_files(copy)
    with pytest.raises(OutputError, match="another process is changing this bundle"):
        add_c(copy, shop)
    os.close(lock)
    assert all_files(copy) == before
    assert json.loads((copy / "routing_manifest.json").read_text())["schema_version"] == 2
