"""A library of the demo's adapters, compared and grown as a user does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "demo"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DEMO / "experts").exists(), reason="needs the demo's experts: make demo-experts"),
]
RECIPE = f"""
version: 1
kind: compare
base: {DEMO}/base
experts:
  - {{name: sarcasm, model: {DEMO}/experts/sarcasm}}
  - {{name: sentiment, model: {DEMO}/experts/sentiment}}
tasks:
  sarcasm: {{valid: {DEMO}/data/sarcasm.valid.jsonl, test: {DEMO}/data/sarcasm.test.jsonl}}
  sentiment: {{valid: {DEMO}/data/sentiment.valid.jsonl, test: {DEMO}/data/sentiment.test.jsonl}}
  maths: {{test: {DEMO}/data/maths.test.jsonl}}
rows: {{valid: 30, test: 20}}
strategies: [base, oracle, merge_uniform, ensemble_learned, {{name: mediator, classifier: ridge}}]
"""


def _mediator(*words: object) -> str:
    command = [sys.executable, "-m", "mediator_cli", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def _exact(found: dict, names: tuple[str, ...]) -> float:
    shares = {task["task"]: task["accuracy"] for task in found["tasks"]}
    return sum(shares[name] for name in names) / len(names)


def test_a_library_is_compared_written_asked_and_grown(tmp_path: Path) -> None:
    recipe, library = tmp_path / "compare.yaml", tmp_path / "library"
    recipe.write_text(RECIPE + f"output: {{path: {tmp_path}/results}}\n")
    report = json.loads(_mediator("compare", recipe, "--json", "--write", "mediator", library))
    seen = {result["name"]: result["seen"]["accuracy"] for result in report["results"]}
    assert seen["oracle"] > 0.6 > seen["base"] + 0.4, "each adapter knows its own task"
    assert seen["mediator"] >= seen["oracle"] - 0.1, "the router tells headlines from reviews"
    assert seen["mediator"] > seen["merge_uniform"]
    _mediator("verify", library)

    tasks = [part for name in ("sarcasm", "sentiment") for part in ("--tasks", DEMO / "data" / f"{name}.test.jsonl")]
    (found,) = json.loads(_mediator("evaluate", library, *tasks, "--limit", 20, "--json"))["models"]
    assert _exact(found, ("sarcasm", "sentiment")) == pytest.approx(seen["mediator"], abs=0.051)

    before = {file.name: file.read_bytes() for file in (library / "experts").iterdir()}
    _mediator("extract-lora", DEMO / "base", DEMO / "experts/maths", "--rank", 64, "-o", tmp_path / "maths-lora")
    prompts = DEMO / "data" / "maths.train.jsonl"
    _mediator("add-expert", library, "--name", "maths", "--model", tmp_path / "maths-lora", "--prompts", prompts)
    _mediator("verify", library)
    assert all((library / "experts" / name).read_bytes() == data for name, data in before.items())
    routed = json.loads(_mediator("route", library, "Tom has 12 apples and buys 5 more. How many now?", "--json"))
    assert routed["prompts"][0]["probabilities"]["maths"] > 0.5
    _mediator("remove-expert", library, "--name", "maths")
    _mediator("verify", library)
    assert {file.name: file.read_bytes() for file in (library / "experts").iterdir()} == before
