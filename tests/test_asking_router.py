"""Routers that ask the experts: merged, measured, fitted, replaced, shown; and the version of their manifests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROUTE_ALL, all_files, with_prompts
from pydantic import ValidationError
from tiny_tokens import word_tokenizer

from mediator_cli.bundle.manifest import MANIFEST, ROUTER, Manifest, read_manifest, to_json, with_router
from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.errors import MediatorError
from mediator_cli.evaluate.score import score_rows
from mediator_cli.evaluate.tasks import Row
from mediator_cli.pipeline.router import refit_router, route_texts
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_recipe
from mediator_cli.recipe.router import PolicySpec, RouterSpec
from mediator_cli.runtime.open import open_bundle

ASKING = {"features": "perplexity"}
LATE = {"reads", "first_token", "form"}


def text_of(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    return data


@pytest.fixture(scope="module")
def asked_once(tmp_path_factory: pytest.TempPathFactory, routed_once: Path) -> Path:
    """A bundle whose router was replaced by one that asks, without prompts to measure it on."""
    bundle = shutil.copytree(routed_once, tmp_path_factory.mktemp("asked") / "out")
    manifest = read_manifest(bundle)
    bare = tuple(source.model_copy(update={"prompts": None}) for source in manifest.experts)
    (bundle / MANIFEST).write_text(to_json(manifest.model_copy(update={"experts": bare})))
    refit_router(bundle, {}, RouterSpec.model_validate(ASKING))
    return bundle


def test_an_asking_router_has_defaults_of_its_own():
    spec = RouterSpec.model_validate(ASKING)
    assert (spec.classifier, spec.calibrate, spec.max_prompts) == ("none", "none", 80)
    assert spec.policy == PolicySpec(rule="top_k", k=2)
    fitted = RouterSpec.model_validate({**ASKING, "classifier": "logistic"})
    assert (fitted.calibrate, fitted.policy) == ("temperature", PolicySpec())
    combined = RouterSpec.model_validate({"features": "gradient", "policy": {"combine": "logits"}})
    assert combined.policy == PolicySpec(rule="top_k", k=2, combine="logits")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": "text", "reads": "prompt"}, "features 'text' takes no reads"),
        ({"features": "text", "first_token": "bos"}, "features 'text' takes no first_token"),
        ({"classifier": "none"}, "features 'embedding_mean' needs a classifier"),
        ({"features": "gradient", "form": "inverse"}, "`form` is for features 'perplexity'"),
        ({**ASKING, "classifier": "ridge", "form": "posterior"}, "`form` is for features 'perplexity'"),
        ({**ASKING, "classifier": "ridge", "temperature": 0.5}, "`temperature` is for classifier 'none'"),
        ({**ASKING, "calibrate": "temperature", "temperature": 0.5}, "give a temperature, or let"),
        ({**ASKING, "temperature": 0.0}, "greater than 0"),
        ({**ASKING, "layer": 2}, "features 'perplexity' takes no layer"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        RouterSpec.model_validate(fields)


def test_no_prompts_are_needed_and_others_still_are(shop):
    def plan(**router):
        return make_plan(load_recipe(shop.recipe(router=router, **ROUTE_ALL)))

    assert plan(features="gradient").router.features == "gradient"
    with pytest.raises(MediatorError, match="needs prompts of every expert"):
        plan(features="gradient", classifier="logistic")


def test_a_merge_without_prompts_gives_a_router_that_was_not_measured(shop, mediator):
    shop.recipe(router={**ASKING, "policy": {"combine": "probabilities"}}, **ROUTE_ALL)
    run = mediator("merge", "recipe.yaml", "-o", "out")
    assert run.code == 0, run.err
    bundle = shop.folder / "out"
    record = read_manifest(bundle).router
    assert (record.report, record.file, record.outside_above, record.size) == (None, None, None, 2)
    assert (record.temperature, record.form) == (1.0, "inverse")
    assert "probabilities of experts that run apart" in run.out
    assert "not measured, for want of prompts" in run.out
    assert "How often it is right was not measured." in (bundle / "README.md").read_text()
    assert not (bundle / ROUTER).exists()
    assert verify_bundle(bundle).problems == verify_bundle(bundle).unknown == ()
    assert open_bundle(bundle).combine == "probabilities"
    assert open_bundle(bundle, combine="logits").combine == "logits"
    assert json.loads(mediator("merge", "recipe.yaml", "-o", "other", "--json").out)["router"] is None


@pytest.mark.parametrize("router", [{"features": "gradient"}, {**ASKING, "classifier": "logistic"}], ids=str)
def test_a_merge_with_prompts_measures_what_the_experts_say(shop, router):
    bundle = shop.merge("out", experts=with_prompts(), router={**router, "max_prompts": 16}, **ROUTE_ALL)
    manifest = read_manifest(bundle)
    report, is_fitted = manifest.router.report, "classifier" in router
    assert (report.n_fitted, report.n_held_out) == ((26, 2) if is_fitted else (0, 6))
    assert (bundle / ROUTER).exists() == is_fitted
    assert manifest.router.outside_above is not None
    assert (report.accuracy < 0.8) == any("is right on only" in notice for notice in manifest.notices)
    _, routing = route_texts(bundle, ["two plus three", "dull film plot"])
    found = open_bundle(bundle).route([[5, 7, 6], [13, 10, 12]])
    assert routing.weights == pytest.approx(found.weights, abs=1e-6)
    assert routing.answers.shape == (2, 2)
    assert verify_bundle(bundle).problems == verify_bundle(bundle).unknown == ()


def test_only_what_is_new_gets_the_new_version(asked_once, routed_once):
    late, old = text_of(asked_once), text_of(routed_once)
    assert (late["schema_version"], old["schema_version"]) == (4, 2)
    assert late["router"].keys() >= LATE
    assert not LATE & old["router"].keys()
    assert "combine" not in old["router"]["policy"]
    assert to_json(read_manifest(asked_once)) == (asked_once / MANIFEST).read_text()
    assert to_json(read_manifest(routed_once)) == (routed_once / MANIFEST).read_text()


def test_a_router_of_the_new_version_does_not_pass_for_one_of_an_older(asked_once, routed_once):
    with pytest.raises(ValidationError, match="experts asked or combined are of version 4"):
        Manifest.model_validate(text_of(asked_once) | {"schema_version": 3})
    router = read_manifest(routed_once).router
    policy = router.policy.model_copy(update={"combine": "logits"})
    combined = with_router(read_manifest(routed_once), router.model_copy(update={"policy": policy}))
    assert combined.schema_version == 4
    assert Manifest.model_validate_json(to_json(combined)).router.policy.combine == "logits"
    assert with_router(combined, router).schema_version == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": "text", "form": None}, "features text need a classifier"),
        ({"classifier": "logistic", "form": None}, "a fitted router has outside_above and file"),
        ({"form": None}, "form goes with perplexity"),
        ({"file": {"name": ROUTER, "bytes": 1, "sha256": ""}}, "classifier none has no file"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(asked_once, change, message):
    data = text_of(asked_once)
    with pytest.raises(ValidationError, match=message):
        Manifest.model_validate(data | {"router": data["router"] | change})


def test_a_router_is_changed_for_one_that_asks_and_back(routed, mediator):
    before = all_files(routed)
    run = mediator(
        "fit-router", "out", "--features", "perplexity", "--set", "form=posterior", "--set", "max_prompts=16"
    )
    assert run.code == 0, run.err
    record = read_manifest(routed).router
    assert (record.form, record.policy.rule, record.report.n_held_out) == ("posterior", "top_k", 6)
    assert not (routed / ROUTER).exists()
    assert mediator("verify", "out").code == 0
    mediator("fit-router", "out", "--policy", "rule=argmax", "--policy", "combine=hidden", "--set", "max_prompts=16")
    record = read_manifest(routed).router
    assert (record.features, record.form, record.policy.combine) == ("perplexity", "posterior", "hidden")
    assert mediator("fit-router", "out", "--features", "embedding_mean").code == 0
    after = all_files(routed)
    assert after[ROUTER] == before[ROUTER]
    assert after["README.md"] == before["README.md"]
    assert read_manifest(routed).router.policy.rule == "uncertainty"


def test_route_shows_what_the_experts_said(asked_once, monkeypatch, mediator):
    monkeypatch.chdir(asked_once.parent)
    run = mediator("route", "out", "two plus three", "film")
    assert "perplexity" in run.out
    assert "without a limit: the router was measured on no prompts" in run.out
    assert "a prompt of one token cannot be predicted" in run.out
    assert "dense expert alone" in run.out
    first, second = json.loads(mediator("route", "out", "two plus three", "film", "--json").out)["prompts"]
    assert min(first["perplexity"].values()) > 1
    assert (second["perplexity"], second["is_outside"]) == (None, True)


def test_commands_that_answer_take_a_way_to_combine(asked_once, monkeypatch, mediator, tmp_path):
    monkeypatch.chdir(asked_once.parent)
    (tmp_path / "a.jsonl").write_text('{"prompt": "two plus three", "answer": "apples"}\n')
    words = ("out", "two plus three", "--json", "--max-new-tokens", "2")
    plain = json.loads(mediator("generate", *words).out)["answers"][0]
    apart = json.loads(mediator("generate", *words, "--combine", "probabilities").out)["answers"][0]
    assert apart["mixture"] == plain["mixture"]
    run = mediator("evaluate", "out", "--tasks", tmp_path / "a.jsonl", "--json", "--combine", "logits")
    found = json.loads(run.out)["models"][0]["tasks"][0]["log_prob"]
    model, rows = open_bundle("out", combine="logits"), [Row(prompt="two plus three", answer="apples")]
    assert found == pytest.approx(score_rows(model, word_tokenizer(), rows)[0].log_prob, abs=1e-4)
    model.combine = "parameters"
    assert found != pytest.approx(score_rows(model, word_tokenizer(), rows)[0].log_prob, abs=1e-4)
    run = mediator("generate", *words, "--combine", "logit")
    assert (run.code, "did you mean 'logits'" in run.err) == (2, True)
