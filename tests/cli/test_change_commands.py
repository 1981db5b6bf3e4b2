"""`mediator add-expert` and `mediator remove-expert`, as a person calls them."""

import json

import pytest
from conftest import ROUTE_ALL, all_files, fine_tune, write_checkpoint
from tiny_tokens import WORDS, task_prompts, write_prompts

from mediator_cli.bundle.manifest import read_manifest

ADD = ("add-expert", "out", "--name", "c", "--model", "c")


@pytest.fixture
def growing(shop, routed):
    """A bundle of a and b, and a third expert with prompts."""
    write_checkpoint(shop.folder / "c", fine_tune(shop.base, 7))
    write_prompts(shop.folder / "c.jsonl", task_prompts(tuple(WORDS[15:])))
    return shop


def test_an_expert_is_added_asked_and_taken_out(growing, mediator):
    run = mediator(*ADD, "--prompts", "c.jsonl")
    assert run.code == 0, run.err
    rows = [line.split() for line in run.out.splitlines()]
    assert ["experts", "a,", "b", "a,", "b,", "c"] in rows
    assert any(row[:3] == ["router", "right", "on"] and row[-4:] == ["of", "18", "held-out", "prompts"] for row in rows)
    assert "of how c differs from the dense expert" in run.out
    assert "router        logistic fitted anew on the prompts of all experts" in run.out
    assert "Next: mediator verify out   ·   mediator route out" in run.out
    assert "extract expert: " in run.err
    assert "warning: the dense expert stays as it was merged: c has no part in it" in run.err
    found = json.loads(mediator("route", "out", "and the is", "--json").out)["prompts"][0]
    assert max(found["probabilities"], key=found["probabilities"].get) == "c"
    assert mediator("verify", "out").code == 0
    assert "c added" in mediator("inspect", "out").out
    run = mediator("remove-expert", "out", "--name", "a")
    assert run.code == 0, run.err
    assert "warning: the dense expert still has its part of a, as it was merged" in run.err
    assert [source.name for source in read_manifest(growing.folder / "out").experts] == ["b", "c"]
    assert mediator("verify", "out").code == 0


def test_both_answer_in_json(growing, mediator):
    run = mediator(*ADD, "--prompts", "c.jsonl", "--json", "-q")
    facts = json.loads(run.out)
    manifest = read_manifest(growing.folder / "out")
    assert (facts["change"], facts["expert"], facts["after"]["digest"]) == ("added", "c", manifest.digest)
    assert facts["before"]["experts"] == ["a", "b"]
    assert facts["after"]["sizes"]["sparse"] > facts["before"]["sizes"]["sparse"]
    assert facts["after"]["router"]["report"]["n_held_out"] == 18
    assert 0 < facts["energy_kept"] < 1
    assert run.err == ""
    facts = json.loads(mediator("remove-expert", "out", "--name", "c", "--json", "-q").out)
    assert (facts["change"], facts["energy_kept"], facts["after"]["experts"]) == ("removed", None, ["a", "b"])


def test_prompts_of_others_that_are_gone_can_be_given(growing, mediator, refused):
    (growing.folder / "a.jsonl").rename(growing.folder / "moved.jsonl")
    words = (*ADD, "--prompts", "c.jsonl")
    refused("--prompts", "those of a are not there", "or --no-router and fit one later", *words)
    run = mediator(*words, "--prompts", "a=moved.jsonl")
    assert run.code == 0, run.err
    noted = {source.name: source.prompts.name for source in read_manifest(growing.folder / "out").experts}
    assert noted == {"a": "moved.jsonl", "b": "./b.jsonl", "c": "c.jsonl"}


OUT = ("add-expert", "out", "--model", "c", "--name")
PROMPTS = "--prompts"
REFUSED = {
    "two files": ((*ADD, PROMPTS, "c.jsonl", PROMPTS, "c=a.jsonl"), PROMPTS, "two files are given for c", ""),
    "name taken": ((*OUT, "a"), "--name", "names must differ", "remove-expert"),
    "no bundle": (("add-expert", "base", *OUT[2:], "c"), "base", "has no routing_manifest.json", "merge"),
    "not there": (("remove-expert", "out", "--name", "x"), "--name", "no expert 'x'", "known: a, b"),
    "whose prompts": (("remove-expert", "out", "--name", "a", PROMPTS, "a.jsonl"), PROMPTS, "is not NAME=FILE", "NAME"),
    "no model": (("add-expert", "out", "--name", "c", "--model", "x/y/z"), "--model", "no such folder", ""),
    "memory": ((*ADD, "--memory", "much"), "--memory", "", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_refused_in_a_line(growing, refused, case):
    words, place, message, hint = REFUSED[case]
    refused(place, message, hint, *words)


def test_without_a_router_none_is_fitted(growing, mediator):
    before = all_files(growing.folder / "out")
    run = mediator(*ADD, "--no-router")
    assert run.code == 0
    assert "the bundle has no router now; `mediator fit-router` fits one" in run.err
    assert "no router" in run.out
    assert mediator("fit-router", "out", "--prompts", "c=c.jsonl").code == 0
    assert read_manifest(growing.folder / "out").router.experts == ("a", "b", "c")
    assert mediator("verify", "out").code == 0
    after = all_files(growing.folder / "out")
    assert set(after) - set(before) == {"experts/c.safetensors"}


def test_a_mixture_of_experts_cannot_be_changed(growing, refused, monkeypatch):
    import mediator_cli.pipeline.change.run as changes

    real = changes.read_manifest
    monkeypatch.setattr(changes, "read_manifest", lambda folder: real(folder).model_copy(update={"moe": "an MoE"}))
    hint = "with `kind: moe`"
    refused("out", "is a Mixture of Experts", hint, *ADD, "--prompts", "c.jsonl")
    refused("out", "is a Mixture of Experts", hint, "remove-expert", "out", "--name", "a")


def test_static_bundles_have_nothing_to_change(growing, mediator, refused):
    growing.recipe(assign={"rule": "none"}, extract=ROUTE_ALL["extract"])
    assert mediator("merge", "recipe.yaml", "-o", "static").code == 0
    refused("static", "no unit is routed", "assign.rule=all", "add-expert", "static", "--name", "c", "--model", "c")
