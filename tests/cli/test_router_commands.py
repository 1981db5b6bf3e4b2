"""`mediator fit-router`, `mediator route`, and what the other commands tell of a router."""

import json

import pytest
from conftest import ROUTE_ALL, edit_json, with_prompts
from tiny_tokens import SUMS, task_prompts, write_prompts

from mediator_cli.bundle.manifest import read_manifest


def test_merge_tells_of_the_router(shop, mediator):
    shop.recipe(experts=with_prompts(), **ROUTE_ALL)
    run = mediator("merge", "recipe.yaml", "-o", "out", "--json")
    assert json.loads(run.out)["router"] == read_manifest(shop.folder / "out").router.report.model_dump(mode="json")
    run = mediator("merge", "recipe.yaml", "-o", "out", "--overwrite")
    assert "of 12 held-out prompts" in run.out
    assert "fit router: " in run.err


def test_merge_says_why_there_is_no_router(shop, mediator):
    shop.recipe(experts=with_prompts(), assign={"rule": "top_k", "k": 0})
    run = mediator("merge", "recipe.yaml", "-o", "out")
    assert "warning: no router is fitted: no unit is routed" in run.err


def test_inspect_shows_the_router(routed, mediator):
    run = mediator("inspect", "out")
    assert "embedding_mean, 8 features" in run.out
    assert "uncertainty(sure=0.1, cover=0.9), outside: dense" in run.out
    assert json.loads(mediator("inspect", "out", "--json").out)["manifest"]["router"]["experts"] == ["a", "b"]


def test_route_answers_in_json(routed, shop, mediator):
    write_prompts(shop.folder / "more.jsonl", ["dull film plot"])
    report = json.loads(mediator("route", "out", "two plus three", "--file", "more.jsonl", "--json").out)
    first, second = report["prompts"]
    assert (first["prompt"], second["prompt"]) == ("two plus three", "dull film plot")
    assert first["probabilities"]["a"] > 0.5 > second["probabilities"]["a"]
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    assert first["is_outside"] == (first["score"] > first["outside_above"])
    assert set(first["mixture"]) == {"a", "b"}


def test_route_shows_probabilities_uncertainty_score_and_mixture(shop, mediator):
    shop.merge(
        "out", experts=with_prompts(), router={"policy": {"rule": "fixed", "weights": {"a": 1, "b": 0.25}}}, **ROUTE_ALL
    )
    report = json.loads(mediator("route", "out", "two", "--json").out)["prompts"][0]
    run = mediator("route", "out", "two")
    lines = [line.split() for line in run.out.splitlines()]
    share = report["probabilities"]["a"]
    assert ["a", f"{share:.3f}", *(["█" * round(share * 20)] if round(share * 20) else [])] in lines
    assert ["uncertainty", f"{report['uncertainty']:.3f}"] in lines
    assert ["mixture", "a", "1.00", "+", "b", "0.25"] in lines


def test_fit_router_keeps_what_is_not_asked_otherwise(routed, mediator):
    run = mediator("fit-router", "out", "--policy", "rule=top_k", "--policy", "k=1", "--json")
    assert run.code == 0, run.err
    mediator("fit-router", "out", "--classifier", "ridge")
    record = read_manifest(routed).router
    assert (record.features, record.classifier, record.policy.rule, record.policy.k) == (
        "embedding_mean",
        "ridge",
        "top_k",
        1,
    )
    assert json.loads(run.out)["policy"] == record.policy.model_dump()
    assert mediator("verify", "out").code == 0


def test_fit_router_moves_between_features(routed, mediator):
    assert mediator("fit-router", "out", "--features", "hidden_mean", "--layer", "2").code == 0
    assert mediator("fit-router", "out", "--layer", "1").code == 0
    assert read_manifest(routed).router.layer == 1
    assert mediator("fit-router", "out", "--features", "text").code == 0
    assert (read_manifest(routed).router.features, read_manifest(routed).router.layer) == ("text", None)


@pytest.mark.parametrize(
    ("words", "place", "message", "hint"),
    [
        (("--prompts", "c=a.jsonl"), "--prompts", "no expert 'c'", "known: a, b"),
        (("--prompts", "a.jsonl"), "--prompts", "'a.jsonl' is not NAME=FILE", "NAME=FILE"),
        (("--prompts", "a=gone.jsonl"), "gone.jsonl", "cannot read", "check"),
        (("--prompts", "a=b.jsonl"), "prompts", "a and b share 60 of 60 prompts", "its own task"),
        (("--features", "hidden"), "--features", "should be 'embedding_mean'", "--help"),
        (("--features", "hidden_mean"), "", "features 'hidden_mean' needs layer", "--help"),
        (("--features", "hidden_mean", "--layer", "4"), "the dense expert", "has no decoder layer 4", "another layer"),
        (("--policy", "rule"), "--policy", "'rule' is not FIELD=VALUE", "FIELD=VALUE"),
        (("--policy", "rule=["), "--policy", "a value is not YAML", "quote it"),
        (("--policy", "rule=top_k"), "--policy", "rule 'top_k' needs k", "--help"),
        (("--policy", "rule=top_k", "--policy", "k=3"), "--policy k", "3 experts are to be mixed", "2 or less"),
        (("--policy", "rule=fixed", "--policy", "weights={c: 1}"), "--policy weights", "no expert 'c'", "known: a, b"),
    ],
)
def test_fit_router_refuses_what_does_not_fit(routed, refused, words, place, message, hint):
    refused(place, message, hint, "fit-router", "out", *words)


@pytest.mark.parametrize(
    ("words", "place", "message", "hint"),
    [
        (("out",), "", "there is no prompt to route", "--file"),
        (("out", "two", " "), "prompt 2", "is empty", "some text"),
        (("out", "--file", "gone.jsonl"), "gone.jsonl", "cannot read", "check the path"),
        (("base", "two"), "base", "has no routing_manifest.json", "is it a bundle?"),
    ],
)
def test_route_refuses_what_it_cannot_route(routed, refused, words, place, message, hint):
    refused(place, message, hint, "route", *words)


def test_route_of_a_bundle_without_a_router_names_the_next_command(shop, refused):
    shop.merge("out", **ROUTE_ALL)
    refused("out", "the bundle has no router", "mediator fit-router", "route", "out", "two")


def test_a_prompt_longer_than_the_context_is_refused_where_the_model_has_to_read_it(shop, refused, mediator):
    for name in ("base", "a", "b"):
        edit_json(shop.folder / name / "config.json", max_position_embeddings=16)
    shop.merge("out", experts=with_prompts(), router={"features": "hidden_mean", "layer": 1}, **ROUTE_ALL)
    refused("prompt 1", "has 17 tokens, the model reads 16 at most", "embedding_mean", "route", "out", "two " * 17)
    assert mediator("route", "out", "two " * 16).code == 0


def test_long_prompts_are_left_out_of_the_fit_with_a_word(shop, mediator):
    for name in ("base", "a", "b"):
        edit_json(shop.folder / name / "config.json", max_position_embeddings=16)
    write_prompts(shop.folder / "a.jsonl", [*task_prompts(SUMS), "two " * 17])
    shop.recipe(experts=with_prompts(), router={"features": "hidden_mean", "layer": 1}, **ROUTE_ALL)
    run = mediator("merge", "recipe.yaml", "-o", "out")
    assert "warning: 1 prompts without tokens or of more than 16 are left out" in run.err
    assert read_manifest(shop.folder / "out").notices == ("1 prompts without tokens or of more than 16 are left out",)
