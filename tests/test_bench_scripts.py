"""The benchmark runs end to end on tiny checkpoints; how long anything takes is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mediator_cli import load_recipe, make_plan

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
MEMORY = 1 << 30


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.slow
def test_benchmark_end_to_end(tmp_path):
    command = [sys.executable, str(SCRIPTS / "bench_peers.py"), "--size", "tiny", "--job", "linear", "--repeat", "1"]
    files = ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json")]
    done = subprocess.run([*command, *files], check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"machine", "versions", "command"} < found.keys()
    (job,) = found["jobs"]
    assert (job["job"], job["experts"], job["peer"], job["times_faster"]) == ("linear", 4, None, None)
    for name in ("ours", "again", "floor", "full_floor"):
        assert job[name]["wall"] > 0
        assert job[name]["peak"] > 0
        assert job[name]["read"] >= job["input_bytes"]
        assert job[name]["written"] > 0.9 * job["input_bytes"] / 5
    assert job["ratio"] > 0
    assert job["full_ratio"] > 0
    assert "| linear |" in done.stdout
    left = {path.name for path in (tmp_path / "work" / "tiny").iterdir()}
    assert left == {"base", *(f"expert{n}" for n in range(4)), "recipe-4.yaml"}


@pytest.fixture
def inputs(tmp_path):
    from benchmark.checkpoints import make_inputs

    return make_inputs(tmp_path, "tiny", 6, MEMORY)


def test_checkpoints_have_the_shapes_and_differ_a_little(inputs):
    from benchmark.shapes import SIZES

    base, *experts = (load_file(file) for file in inputs.files)
    assert {name: tuple(tensor.shape) for name, tensor in base.items()} == SIZES["tiny"].shapes()
    assert all(tensor.dtype == torch.bfloat16 for tensor in base.values())
    weight = base["model.embed_tokens.weight"].float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    for expert in experts:
        delta = expert["model.embed_tokens.weight"].float() - weight
        assert delta.std().item() == pytest.approx(0.001, rel=0.02)
        assert abs(delta.mean().item()) < 0.0001


def test_experts_beyond_four_share_files(inputs):
    assert inputs.experts == ("expert0", "expert1", "expert2", "expert3", "link4-4", "link5-4")
    assert (inputs.n_links, inputs.n_bytes) == (2, 7 * inputs.files[0].stat().st_size)
    assert inputs.files[5].samefile(inputs.files[1])
    assert len({file.stat().st_ino for file in inputs.files}) == 5


def test_sizes_are_those_of_the_models():
    from benchmark.shapes import SIZES

    counts = {name: size.parameters for name, size in SIZES.items() if name != "tiny"}
    assert counts == {"0.5B": 494_032_768, "1.5B": 1_543_714_304, "3B": 3_085_938_688}


def test_a_full_disk_is_said_at_once(tmp_path):
    from benchmark.checkpoints import check_room

    with pytest.raises(SystemExit, match=r"needs .* GB, .* GB are free; choose another disk"):
        check_room(tmp_path, 5, 1 << 60)


def test_every_job_is_a_recipe(inputs):
    from benchmark.checkpoints import write_recipe
    from benchmark.jobs import JOBS

    for job in JOBS.values():
        command = job.command(["mediator"], "recipe.yaml", "out", 5)
        changes = [value for flag, value in pairwise(command) if flag == "--set"]
        assert len(changes) == len(job.settings)
        make_plan(load_recipe(write_recipe(inputs), changes))
    assert "assign.k=2" in JOBS["routed-40"].command(["mediator"], "recipe.yaml", "out", 5)


def test_a_failed_process_ends_the_run_with_its_words():
    from benchmark.measure import run

    with pytest.raises(SystemExit, match=r"exit code 3: sh -c(.|\n)*no such luck"):
        run(["sh", "-c", "echo no such luck >&2; exit 3"])


def test_bytes_and_memory_of_a_process_are_counted_with_its_children(tmp_path):
    from benchmark.measure import run

    file = tmp_path / "zeros"
    found = run(["sh", "-c", f"head -c 3000000 /dev/zero > {file}; cat {file} > /dev/null"])
    assert found.read >= 6_000_000
    assert found.written >= 6_000_000
    assert found.wall > 0
    assert found.peak > 0


def test_law_and_large_merge_follow_from_points_on_a_line():
    from benchmark.curve import LARGE_PARAMETERS, fit, large
    from benchmark.measure import Run
    from benchmark.rounds import Outcome

    def point(experts, model):
        n_in = (experts + 1) * model
        ours = Run(wall=0.5 + 2e-9 * (n_in + model), cpu=1.0, peak=1, read=2 * n_in, written=model)
        return Outcome("ties", "0.5B", experts, 0, n_in, model, 1.0, (1.0,), ours, ours, ours, ours, 1.0, 1.0, None, ())

    outcomes = [point(experts, 10**9) for experts in (2, 4, 8, 16)]
    found = fit(outcomes)
    assert (found.start, found.per_byte) == pytest.approx((0.5, 2e-9))
    assert found.worst < 1e-9
    computed, model = large(found, outcomes), 2 * LARGE_PARAMETERS
    assert computed.compute == pytest.approx(0.5 + 2e-9 * 10 * model)
    assert computed.disk == pytest.approx((18 + 1) * model / 2e9)
