"""A Mixture of Experts of the demo's experts, as a user makes and asks it."""

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


def _mediator(*words: object) -> str:
    command = [sys.executable, "-m", "mediator_cli", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_gates_from_prompts_let_each_task_find_its_expert(tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    told = json.loads(
        _mediator("merge", "recipes/smollm2/moe.yaml", "-o", folder, "--set", "moe.gates.prompts=8", "--json")
    )
    assert told["moe"]["format"] == "mixtral"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    right = told["moe"]["gates"]["agreement"].values()
    assert sum(right) / len(right) > 0.5, "four experts: a quarter is chance"
    _mediator("verify", folder)
    tasks = [part for name in ("maths", "sentiment") for part in ("--tasks", DEMO / "data" / f"{name}.test.jsonl")]
    (found,) = json.loads(_mediator("evaluate", folder, *tasks, "--limit", 10, "--json"))["models"]
    shares = {task["task"]: task["accuracy"] for task in found["tasks"]}
    assert shares["maths"] >= 0.4, "the plain mean answers a tenth"
    assert shares["sentiment"] >= 0.6
