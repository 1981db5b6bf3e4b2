"""The router of a bundle from recipe to answer: merged, verified, read, fitted anew, and never half replaced."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from conftest import ROUTE_ALL, all_files, edit_json, with_prompts
from safetensors.numpy import load_file, save_file
from tiny_tokens import SUMS, task_prompts, word_tokenizer, write_prompts

from mediator_cli import verify_bundle
from mediator_cli.bundle.manifest import MANIFEST, ROUTER, Manifest, read_manifest, to_json
from mediator_cli.errors import BundleError, MediatorError, OutputError
from mediator_cli.pipeline.router import refit_router, route_texts
from mediator_cli.recipe.router import PolicySpec, RouterSpec
from mediator_cli.runtime.router import read_router


@pytest.fixture
def bundle(routed):
    return routed


def files(shop, **others):
    return {name: shop.folder / f"{others.get(name, name)}.jsonl" for name in ("a", "b")}


def messages(folder):
    return [(p.place.removeprefix(f"{folder}/"), p.message) for p in verify_bundle(folder).problems]


def test_a_merge_with_prompts_fits_a_router_that_knows_its_tasks(bundle):
    record = read_manifest(bundle).router
    assert (record.features, record.classifier, record.experts, record.size) == (
        "embedding_mean",
        "logistic",
        ("a", "b"),
        8,
    )
    assert (record.report.n_fitted, record.report.n_held_out) == (96, 12)
    _, routing = route_texts(bundle, ["two plus three", "dull film plot"])
    assert routing.probabilities.argmax(axis=1).tolist() == [0, 1]
    assert verify_bundle(bundle).problems == ()
    assert verify_bundle(bundle).unknown == ()


def test_the_router_reads_the_dense_experts_embeddings(bundle):
    router = read_router(bundle, read_manifest(bundle))
    from mediator_cli.bundle.read import read_bundle

    table = read_bundle(bundle).dense("model.embed_tokens.weight").float().numpy()
    ids = word_tokenizer().encode("two plus three", add_special_tokens=False)
    expected = router.route(table[ids].mean(axis=0)[None])
    _, found = route_texts(bundle, [" two plus  three\n"])
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-5)
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-4)


def test_the_file_is_described_in_the_manifest_and_nowhere_else(bundle):
    manifest = read_manifest(bundle)
    assert manifest.router.file.name == ROUTER
    assert manifest.router.file.bytes == (bundle / ROUTER).stat().st_size
    assert ROUTER not in [file.name for file in manifest.files]


def test_the_same_recipe_gives_the_same_router(shop, bundle):
    other = shop.merge("other", experts=with_prompts(), **ROUTE_ALL)
    assert (other / ROUTER).read_bytes() == (bundle / ROUTER).read_bytes()
    assert read_manifest(other).router == read_manifest(bundle).router
    assert read_manifest(other).digest == read_manifest(bundle).digest


def test_the_model_card_tells_how_often_the_router_is_right(bundle):
    report = read_manifest(bundle).router.report
    card = (bundle / "README.md").read_text()
    assert f"Of 12 held-out prompts it takes {report.accuracy:.1%} for what they are" in card
    assert f"| a | {report.confusion[0][0]} | {report.confusion[0][1]} |" in card


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ({"features": "hidden_mean", "layer": 2, "classifier": "gaussian"}, ("hidden_mean", 2, "gaussian", 8)),
        ({"features": "text", "classifier": "prototype"}, ("text", None, "prototype", 4096)),
        ({"classifier": "ridge"}, ("embedding_mean", None, "ridge", 8)),
    ],
)
def test_every_kind_of_router_is_merged_and_routes(shop, router, expected):
    bundle = shop.merge("out", experts=with_prompts(), router=router, **ROUTE_ALL)
    record = read_manifest(bundle).router
    assert (record.features, record.layer, record.classifier, record.size) == expected
    _, routing = route_texts(bundle, ["two plus three", "dull film plot"])
    assert routing.probabilities.argmax(axis=1).tolist() == [0, 1]
    assert verify_bundle(bundle).problems == ()


def test_the_policy_of_the_recipe_decides(shop):
    policy = {"rule": "fixed", "weights": {"b": 0.3}}
    bundle = shop.merge("out", experts=with_prompts(), router={"policy": policy}, **ROUTE_ALL)
    assert route_texts(bundle, ["two plus three"])[1].weights.tolist() == [[0.0, pytest.approx(0.3)]]


@pytest.mark.parametrize("assign", [{"rule": "none"}, {"rule": "top_k", "k": 0}])
def test_where_nothing_is_routed_no_router_is_fitted(shop, assign):
    bundle = shop.merge("out", experts=with_prompts(), assign=assign)
    manifest = read_manifest(bundle)
    assert manifest.router is None
    assert not (bundle / ROUTER).exists()
    assert [notice for notice in manifest.notices if notice.startswith("no router is fitted: ")]
    with pytest.raises(BundleError, match="the bundle has no router"):
        route_texts(bundle, ["two"])
    with pytest.raises(BundleError, match="no unit is routed"):
        refit_router(bundle, files(shop), RouterSpec())


def test_two_identical_tasks_are_refused_before_anything_is_merged(shop):
    shutil.copy(shop.folder / "a.jsonl", shop.folder / "b.jsonl")
    before = all_files(shop.folder)
    with pytest.raises(MediatorError, match="a and b share 60 of 60 prompts") as raised:
        shop.merge("out", experts=with_prompts(), **ROUTE_ALL)
    assert raised.value.problems[0].place == f"{shop.folder}/out.yaml:3 experts: prompts"
    assert all_files(shop.folder).keys() - before.keys() == {"out.yaml"}


def test_a_tokenizer_that_does_not_work_is_refused_before_anything_is_merged(shop):
    (shop.folder / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    before = all_files(shop.folder)
    with pytest.raises(MediatorError, match="has no usable tokenizer"):
        shop.merge("out", experts=with_prompts(), **ROUTE_ALL)
    assert all_files(shop.folder).keys() - before.keys() == {"out.yaml"}


def test_sources_without_a_usable_tokenizer_merge_without_prompts(workshop):
    assert read_manifest(workshop.merge("out", **ROUTE_ALL)).router is None


def test_a_missing_router_is_told(bundle):
    (bundle / ROUTER).unlink()
    assert messages(bundle) == [(ROUTER, "is missing")]


def test_a_changed_router_is_told(bundle):
    data = bytearray((bundle / ROUTER).read_bytes())
    data[-1] ^= 1
    (bundle / ROUTER).write_bytes(data)
    assert messages(bundle) == [(ROUTER, "its bytes are not those that were written")]


def write_manifest(bundle, data):
    """Write a manifest by hand, with the checksum of its text."""
    (bundle / MANIFEST).write_text(to_json(Manifest.model_validate(data)))


def test_values_that_are_no_numbers_are_told_even_under_a_right_digest(bundle):
    arrays = load_file(bundle / ROUTER)
    arrays["classifier.intercepts"][0] = np.nan
    save_file(arrays, bundle / ROUTER)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["router"]["file"]["sha256"] = sha256((bundle / ROUTER).read_bytes()).hexdigest()
    write_manifest(bundle, manifest)
    assert messages(bundle) == [(f"{ROUTER}: classifier.intercepts", "holds NaN or infinite values")]


def test_a_router_of_an_unknown_expert_is_told(bundle):
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["router"]["experts"] = ["a", "c"]
    write_manifest(bundle, manifest)
    assert messages(bundle) == [("routing_manifest.json router.experts", "no expert c")]


def test_a_router_whose_file_leads_out_of_the_bundle_is_refused(bundle):
    manifest = json.loads((bundle / "routing_manifest.json").read_text())
    record = manifest["router"] | {"file": manifest["router"]["file"] | {"name": "../router.safetensors"}}
    edit_json(bundle / "routing_manifest.json", router=record)
    with pytest.raises(BundleError, match="unsafe file name"):
        read_manifest(bundle)


def test_a_router_of_another_feature_size_is_refused(shop, bundle):
    other = shop.merge("other", experts=with_prompts(), router={"features": "text"}, **ROUTE_ALL)
    shutil.copy(other / ROUTER, bundle / ROUTER)
    with pytest.raises(BundleError, match="as the manifest's router needs"):
        route_texts(bundle, ["two"])


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_refused(bundle, text):
    with pytest.raises(BundleError, match="prompt 2: is empty"):
        route_texts(bundle, ["two", text])


def test_a_router_is_fitted_anew_on_other_prompts(shop, bundle):
    write_prompts(shop.folder / "c.jsonl", task_prompts(("and", "the", "of", "film"), 40))
    before = read_manifest(bundle)
    spec = RouterSpec(features="text", policy=PolicySpec(rule="argmax"))
    manifest, notices = refit_router(bundle, files(shop, b="c"), spec)
    assert manifest == read_manifest(bundle)
    assert (manifest.router.features, manifest.router.policy.rule, notices) == ("text", "argmax", ())
    assert manifest.router.report.n_fitted == 48 + 32
    assert manifest.experts[1].prompts.name == str(shop.folder / "c.jsonl")
    assert verify_bundle(bundle).problems == verify_bundle(bundle).unknown == ()
    assert (manifest.digest, manifest.tensors) == (before.digest, before.tensors)
    card = (bundle / "README.md").read_text()
    assert "logistic on text, policy argmax" in card
    assert card.count("## Router") == 1


def test_a_bundle_without_a_router_gets_one(shop):
    bundle = shop.merge("out", **ROUTE_ALL)
    assert read_manifest(bundle).router is None
    refit_router(bundle, files(shop), RouterSpec())
    assert read_manifest(bundle).router.experts == ("a", "b")
    assert "## Router" in (bundle / "README.md").read_text()
    assert verify_bundle(bundle).problems == verify_bundle(bundle).unknown == ()


def test_fitting_anew_with_the_same_prompts_gives_the_same_router(shop, bundle, monkeypatch):
    monkeypatch.chdir(shop.folder)
    before = all_files(bundle)
    refit_router(bundle, {}, RouterSpec())
    assert all_files(bundle) == before


def test_noted_prompts_are_used_only_while_they_are_the_same(shop, bundle, monkeypatch):
    monkeypatch.chdir(shop.folder)
    write_prompts(shop.folder / "a.jsonl", task_prompts(SUMS, 50))
    before = all_files(bundle)
    with pytest.raises(BundleError, match="the prompts that a was noted with are not there") as raised:
        refit_router(bundle, {}, RouterSpec())
    assert raised.value.problems[0].hint == "give --prompts a=FILE"
    assert all_files(bundle) == before


def test_prompts_that_were_never_noted_have_to_be_given(shop):
    bundle = shop.merge("out", **ROUTE_ALL)
    with pytest.raises(BundleError, match="notes no prompts of b"):
        refit_router(bundle, {"a": shop.folder / "a.jsonl"}, RouterSpec())


@pytest.mark.parametrize("n", range(1, 5))
def test_a_crash_between_two_renames_leaves_a_bundle_that_is_whole(shop, bundle, monkeypatch, n):
    calls, real = [], Path.replace

    def dying(self, target):
        calls.append(target)
        if len(calls) == n:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(OutputError, match="cannot write"):
        refit_router(bundle, files(shop), RouterSpec(features="text"))
    monkeypatch.undo()
    assert verify_bundle(bundle).problems == ()
    manifest = read_manifest(bundle)
    assert (manifest.router is None) == (n > 1)
    read_router(bundle, manifest)
    refit_router(bundle, files(shop), RouterSpec(features="text"))
    assert verify_bundle(bundle).problems == verify_bundle(bundle).unknown == ()


def test_there_are_four_renames(shop, bundle, monkeypatch):
    calls, real = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: calls.append(Path(target).name) or real(self, target))
    refit_router(bundle, files(shop), RouterSpec())
    assert calls == ["routing_manifest.json", ROUTER, "README.md", "routing_manifest.json"]
