"""`mediator compress-moe` as a user meets it."""

from __future__ import annotations

import json

import pytest
from tiny_mixtures import make_mixture


@pytest.fixture
def here(workshop):
    """A workshop with a Mixtral of four experts and rows of two tasks."""
    make_mixture(workshop.folder / "moe", n_experts=4)
    for name in ("a", "b"):
        rows = [{"prompt": f"two plus {word}", "answer": "three"} for word in ("two", "three", "apples", "left")]
        (workshop.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workshop.folder


def test_the_command_says_what_became_of_the_experts(here, mediator):
    run = mediator("compress-moe", "moe", "--experts", 3, "--rows", "a.jsonl", "b.jsonl")
    assert run.code == 0, run.err
    assert "dropped" in run.out
    assert "experts a layer" in run.out
    assert "moe-reap-3" in run.out
    report = json.loads((here / "moe-reap-3" / "compression.json").read_text())
    assert report["calibration"]["n_rows"] == 8
    assert [file["name"] for file in report["calibration"]["files"]] == ["a.jsonl", "b.jsonl"]
    assert mediator("compress-moe", "moe", "--experts", 3, "--rows", "a.jsonl").code == 2
    run = mediator("compress-moe", "moe", "--experts", 3, "--rows", "a.jsonl", "--overwrite", "--json", "--tokens", 20)
    assert json.loads(run.out)["calibration"]["n_tokens"] == 20


def test_the_plan_reads_no_weight_and_writes_nothing(here, mediator):
    before = sorted(here.iterdir())
    told = json.loads(mediator("compress-moe", "moe", "--keep", 0.5, "--plan", "--json").out)
    assert (told["before"]["n_experts"], told["after"]["n_experts"], told["after"]["top_k"]) == (4, 2, 2)
    assert told["after"]["bytes"] < told["before"]["bytes"]
    assert "parameters a token passes" in mediator("compress-moe", "moe", "--keep", 0.5, "--plan").out
    assert sorted(here.iterdir()) == before


def test_refusals_of_the_command(here, refused):
    refused("--rows", "there is nothing to calibrate on", "--rows FILE", "compress-moe", "moe", "--experts", 2)
    refused("no.jsonl", "is no file of rows", "--rows", "compress-moe", "moe", "--rows", "a.jsonl", "no.jsonl")
    refused("--experts", "9 experts shall be left", "choose 1 to 3", "compress-moe", "moe", "--experts", 9)
    refused(
        f"{here / 'base'}", "is no Mixture of Experts", "formats are", "compress-moe", here / "base", "--experts", 2
    )
