"""`analyze-conflicts --sample`: an estimate from some blocks, with bounds that hold, which no merge uses."""

import json

import numpy as np
import pytest
import torch
from conftest import CONFIG, shapes, write_checkpoint

from mediator_cli import Settings, load_recipe, make_plan
from mediator_cli.bundle.conflict_report import ConflictReport
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.conflict import drawn_pieces
from mediator_cli.engine.streams import Streams
from mediator_cli.pipeline.conflicts import preview_assignment
from mediator_cli.pipeline.survey import analyze_conflicts, sample_conflicts

MEASURES = ("sign", "any_sign", "cosine", "overlap")
SIDE = 256
"""Columns of the larger matrices: 40 blocks each."""


@pytest.fixture
def larger(workshop):
    """Layers with a matrix of 40 blocks, over which the experts agree less and less, beside small tensors."""
    base = {name: torch.zeros(4, dtype=torch.bfloat16) for name in shapes()}
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)]
    generator = torch.Generator().manual_seed(0)
    for name in names:
        base[name] = torch.zeros(40 * BLOCK // SIDE, SIDE, dtype=torch.bfloat16)
    write_checkpoint(workshop.folder / "base", base, CONFIG)
    common = {name: torch.randn(base[name].shape, generator=generator) for name in names}
    rows = torch.arange(40 * BLOCK // SIDE)[:, None] / (40 * BLOCK // SIDE)
    for who in ("a", "b"):
        tuned = {name: tensor + 1 for name, tensor in base.items()}
        for at, name in enumerate(names):
            own = torch.randn(base[name].shape, generator=generator)
            tuned[name] = (common[name] * (1 - rows) + (at + 1) * rows * own).bfloat16()
        write_checkpoint(workshop.folder / who, tuned, CONFIG)
    return workshop


def plan_of(workshop, seed=0, **conflict):
    return make_plan(load_recipe(workshop.recipe(seed=seed, conflict=conflict)))


def errors(sampled, exact, unit):
    return {name: abs(getattr(sampled.units[unit], name) - getattr(exact.units[unit], name)) for name in MEASURES}


@pytest.mark.parametrize("denoise", ["none", {"keep_above_std": 0.5}, {"top_fraction": 0.3}])
def test_bounds_hold_for_nearly_all_samples(larger, denoise):
    exact, hits, n_seeds = analyze_conflicts(plan_of(larger, denoise=denoise), Settings(workers=2)), 0, 25
    for seed in range(n_seeds):
        sampled = sample_conflicts(plan_of(larger, seed, denoise=denoise), 0.3, Settings(workers=2))
        for unit in ("model.layers.0", "model.layers.1", "model.layers.2"):
            bound = sampled.sample.bounds[unit].sign
            assert 0.0005 < bound < 0.2
            hits += errors(sampled, exact, unit)["sign"] <= bound
    # Chance alone leaves fewer than 60 of 75 less than once in 10⁶ if 95 of 100 hold; thresholds err on top.
    assert hits >= 60


def test_a_sample_of_nearly_all_is_nearly_exact_and_counts_the_whole(larger):
    plan = plan_of(larger, denoise="none")
    exact, sampled = analyze_conflicts(plan), sample_conflicts(plan, 0.999, Settings(workers=1))
    assert sampled.sample.share == 0.999
    for unit, scores in exact.units.items():
        assert sampled.units[unit].model_dump() == pytest.approx(scores.model_dump(), abs=1e-12)
        assert set(sampled.sample.bounds[unit].model_dump().values()) == {0.0}
    for name, record in exact.tensors.items():
        assert sampled.tensors[name].size == record.size
        assert sampled.tensors[name].both == record.both


def test_small_tensors_are_read_whole_and_counts_are_scaled_up(larger):
    plan = plan_of(larger, denoise="none")
    exact, sampled = analyze_conflicts(plan), sample_conflicts(plan, 0.1, Settings(workers=1))
    assert sampled.tensors["model.norm.weight"] == exact.tensors["model.norm.weight"]
    name = "model.layers.1.mlp.up_proj.weight"
    assert 0 < abs(sampled.tensors[name].any_opposite - exact.tensors[name].any_opposite) < 0.1 * 40 * BLOCK
    assert sampled.tensors[name].both[0][1] == pytest.approx(exact.tensors[name].both[0][1], rel=0.02)


def test_a_sample_is_the_same_for_any_workers_and_another_for_another_seed(larger):
    plan = plan_of(larger)
    first = sample_conflicts(plan, 0.2, Settings(workers=1))
    assert sample_conflicts(plan, 0.2, Settings(workers=3)) == first
    assert sample_conflicts(plan_of(larger, 1), 0.2, Settings(workers=1)) != first


def test_only_the_drawn_blocks_are_read(larger, monkeypatch):
    read, deltas = [], Streams.deltas
    monkeypatch.setattr(Streams, "deltas", lambda self, piece: (read.append(piece), deltas(self, piece))[1])
    monkeypatch.setattr("mediator_cli.pipeline.survey.tell_doubts", lambda plan, streams, notify: ())
    plan = plan_of(larger, denoise="none")
    sample_conflicts(plan, 0.1, Settings(workers=1))
    wanted = [piece for t in plan.tensors for piece in drawn_pieces(0, t.name, t.size, 0.1)]
    assert sorted(map(str, read)) == sorted(map(str, wanted))
    assert sum(piece.size for piece in read if piece.size == BLOCK) == 3 * 4 * BLOCK
    assert len({piece.start for piece in wanted if piece.tensor == "model.layers.0.mlp.up_proj.weight"}) == 4


def test_tensors_without_entries_have_no_conflict(workshop):
    for who in ("base", "a", "b"):
        tensors = {name: torch.full((4,), float(len(who)), dtype=torch.bfloat16) for name in shapes()}
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(0, 4, dtype=torch.bfloat16)
        write_checkpoint(workshop.folder / who, tensors, CONFIG)
    report = sample_conflicts(plan_of(workshop), 0.5, Settings(workers=1))
    assert report.tensors["model.layers.1.mlp.up_proj.weight"].both == ((0, 0), (0, 0))
    assert set(report.units) == set(report.sample.bounds)


def test_the_command_tells_of_an_estimate_with_bounds(larger, mediator):
    larger.recipe()
    run = mediator("analyze-conflicts", "recipe.yaml", "--sample", "0.2", "--plot", "heat.html")
    assert run.code == 0, run.err
    assert "estimate, from 20 % of the weights, of conflict (sign, in %) between a, b" in run.out
    row = next(line for line in run.out.splitlines() if line.startswith(" model.layers.2"))
    assert "±" in row
    assert "--conflicts" not in run.out
    assert "an estimate</h1>" in (larger.folder / "heat.html").read_text()
    report = ConflictReport.model_validate_json((larger.folder / "conflicts.json").read_text())
    preview = preview_assignment(plan_of(larger), report)
    at = preview.table.rows.index("model.layers.2")
    assert preview.bounds[at] == report.sample.bounds["model.layers.2"].sign
    assert f"{100 * preview.scores[at]:.1f} ±{100 * preview.bounds[at]:.1f}" in row


def test_the_bound_is_that_of_the_measure(larger):
    plan = plan_of(larger, measure="cosine")
    report = sample_conflicts(plan, 0.2, Settings(workers=1))
    preview = preview_assignment(plan, report)
    at = preview.table.rows.index("model.layers.2")
    assert preview.bounds[at] == report.sample.bounds["model.layers.2"].cosine / 2
    assert np.isclose(preview.scores[at], (1 - report.units["model.layers.2"].cosine) / 2)


def test_exact_is_the_default_and_tells_no_bounds(larger, mediator):
    larger.recipe()
    run = mediator("analyze-conflicts", "recipe.yaml", "--plot", "heat.html")
    assert "±" not in run.out + (larger.folder / "heat.html").read_text()
    assert "estimate" not in run.out
    assert json.loads((larger.folder / "conflicts.json").read_text())["sample"] is None


def test_a_merge_refuses_an_estimate(larger, mediator, refused):
    larger.recipe()
    assert mediator("analyze-conflicts", "recipe.yaml", "--sample", "0.2").code == 0
    words = ("merge", "recipe.yaml", "-o", "out", "--conflicts", "conflicts.json")
    refused("conflicts.json", "is an estimate from 0.2 of the weights", "without --sample", *words)


@pytest.mark.parametrize("share", ["0", "1", "-0.5", "20", "nan"])
def test_a_share_is_between_none_and_all(workshop, refused, share):
    workshop.recipe()
    words = ("analyze-conflicts", "recipe.yaml", "--sample", share)
    refused("--sample", "is no share between 0 and 1", "--sample 0.05", *words)


def test_one_expert_has_nothing_to_disagree_with(workshop, refused):
    workshop.recipe(experts=[{"name": "a", "model": "./a"}])
    words = ("analyze-conflicts", "recipe.yaml", "--sample", "0.1")
    refused("recipe.yaml:3 experts", "conflict needs at least two experts", "add an expert", *words)
