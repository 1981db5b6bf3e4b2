"""Cached log-probabilities of experts: mixtures of them are what the run time gives when it runs the mixture."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_library import taught_bench, tiny_bench

from mediator_cli.evaluate.score import RowScore
from mediator_cli.strategies import _sweep
from mediator_cli.strategies._sweep import find_rivals
from mediator_cli.strategies.bench import Bench
from mediator_cli.strategies.log_probs import cached_scores, expert_scores, sweep
from mediator_cli.strategies.strategy import ByTask, Fitted, Fixed


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Four trained experts, in float32."""
    return taught_bench()


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Three random experts in bfloat16, whose logits often tie."""
    return tiny_bench(tmp_path_factory.mktemp("coarse"), 3, 8, dtype=torch.bfloat16)


def mixture(bench: Bench, seed: int) -> dict[str, float]:
    """Draw weights that leave something to the base."""
    draw = Random(seed)
    found = {name: draw.random() for name in bench.library.names}
    return {name: 0.9 * value / sum(found.values()) for name, value in found.items()}


def same(found: list[RowScore], expected: list[RowScore], atol: float) -> None:
    assert [s.exact for s in found] == [s.exact for s in expected]
    assert [s.chosen_right for s in found] == [s.chosen_right for s in expected]
    assert [s.n_prompt_tokens for s in found] == [s.n_prompt_tokens for s in expected]
    np.testing.assert_allclose([s.log_prob for s in found], [s.log_prob for s in expected], atol=atol)


@pytest.mark.parametrize("seed", range(3))
def test_mixtures_are_those_that_the_run_time_gives(bench: Bench, seed: int) -> None:
    fitted = Fitted(bench.library.experts, decision=Fixed(mixture(bench, seed)), combine="probabilities")
    for task in bench.tasks:
        found = cached_scores(bench, fitted, task, "test")
        assert found is not None
        same(found, bench.score(fitted, task, task.test), 1e-4)


def test_mixtures_in_bfloat16(coarse: Bench) -> None:
    fitted = Fitted(coarse.library.experts, decision=Fixed(mixture(coarse, 1)), combine="probabilities")
    for task in coarse.tasks:
        found = cached_scores(coarse, fitted, task, "valid")
        assert found is not None
        same(found, coarse.score(fitted, task, task.valid), 1e-3)


@pytest.mark.parametrize("name", [None, "alpha", "delta"])
def test_one_expert_alone_is_that_expert_however_outputs_are_combined(bench: Bench, name: str | None) -> None:
    task = bench.tasks[0]
    fitted = Fitted(bench.library.experts, decision=Fixed({name: 1.0} if name else {}))
    found = cached_scores(bench, fitted, task, "test")
    assert found is not None
    same(found, bench.score(fitted, task, task.test), 1e-4)
    column = expert_scores(bench, task, "test").models.index(name or "dense")
    np.testing.assert_allclose(expert_scores(bench, task, "test").answers[:, column], [s.log_prob for s in found])


def test_mixtures_by_task_and_what_the_cache_cannot_know(bench: Bench) -> None:
    task, experts = bench.tasks[1], bench.library.experts
    by_task = Fitted(experts, decision=ByTask({"beta": {"beta": 1.0}}))
    found = cached_scores(bench, by_task, task, "valid")
    assert found is not None
    same(found, bench.score(by_task, task, task.valid), 1e-4)
    half = Fixed({"alpha": 0.5, "beta": 0.5})
    unknown = (
        Fitted(experts, decision=half),
        Fitted(experts, decision=half, combine="logits"),
        Fitted(experts, decision=Fixed({"alpha": 1.5}), combine="probabilities"),
        Fitted(folded=(experts["alpha"],)),
        Fitted({"alpha": experts["beta"]}, decision=Fixed({"alpha": 1.0})),
        Fitted(experts, decision=ByTask({"alpha": {}})),
    )
    assert [cached_scores(bench, fitted, task, "valid") for fitted in unknown] == [None] * len(unknown)


def test_experts_are_asked_once_and_not_again_on_a_part_of_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = expert_scores(bench, bench.tasks[0], "valid")
    monkeypatch.setattr("mediator_cli.strategies.log_probs.sweep_rows", None)
    assert expert_scores(bench, bench.tasks[0], "valid") is whole
    right = {task.name: "gamma" for task in bench.seen} | {"alpha": "alpha"}
    part = bench.with_library(bench.library.subset(["gamma", "alpha"]), right)
    found = expert_scores(part, part.tasks[0], "valid")
    assert found.models == ("dense", "gamma", "alpha")
    np.testing.assert_array_equal(found.answers, whole.answers[:, [0, 3, 1]])
    weights = np.array([0.2, 0.3, 0.5])
    same(found.mixed(weights).scores, whole.mixed(np.array([0.2, 0.5, 0, 0.3, 0])).scores, 1e-9)


def test_small_chunks_give_what_one_gives(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for task in bench.tasks for row in task.test]
    one = sweep(bench, rows, n_kept=8)
    monkeypatch.setattr(_sweep, "_LOGIT_BYTES", 20_000)
    many = sweep(bench, rows, n_kept=8)
    np.testing.assert_allclose(one.answers, many.answers, atol=1e-5)
    weights = one.vector(mixture(bench, 5))
    same(one.mixed(weights).scores, many.mixed(weights).scores, 1e-5)
    # Each place is a whole distribution: what is kept and the rest sum to 1.
    for scores in (one, many):
        kept = scores.tokens.kept
        assert kept is not None
        total = np.exp(kept.log_probs).sum(1) + np.exp(kept.tail)
        np.testing.assert_allclose(total, 1.0, atol=1e-5)
        assert len(kept.place) == len(scores.tokens.query)


def test_rows_that_are_not_certain_are_asked_for_real(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sweep, "_TOP", 1)
    fitted = Fitted(bench.library.experts, decision=Fixed(mixture(bench, 3)), combine="probabilities")
    doubtful = 0
    for task in bench.tasks:
        fresh = Bench(bench.model, bench.tokenizer, bench.library, bench.tasks)
        scores = expert_scores(fresh, task, "valid")
        mixed = scores.mixed(scores.vector(mixture(bench, 3)))
        real = bench.score(fitted, task, task.valid)
        # What counts as certain is right even with so little kept.
        pairs = zip(mixed.scores, real, mixed.is_certain, strict=True)
        assert all(found.exact == expected.exact for found, expected, is_certain in pairs if is_certain)
        doubtful += int((~mixed.is_certain).sum())
        found = cached_scores(fresh, fitted, task, "valid")
        assert found is not None
        same(found, real, 1e-4)
    assert doubtful > 0


def test_shares_below_zero_are_refused(bench: Bench) -> None:
    scores = expert_scores(bench, bench.tasks[0], "valid")
    with pytest.raises(ValueError, match="none is below"):
        scores.mixed(np.array([1.5, -0.5, 0, 0, 0]))


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n_models=st.integers(1, 4), is_coarse=st.booleans())
def test_no_mixture_prefers_what_is_left_out(seed: int, n_models: int, is_coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n_models, 30)) * 3
    if is_coarse:
        logits = np.round(logits)
    logs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    ids = np.unique(np.argsort(-logs, axis=1, kind="stable")[:, :6])
    bound = np.sort(logs, axis=1)[:, -6]
    wanted = np.array([int(rng.choice(ids if rng.random() < 0.7 else 30))])
    rivals, names = find_rivals(logs[:, ids].T, ids, logs[:, wanted].T, wanted, bound)
    assert wanted[0] not in names
    for weights in rng.dirichlet(np.full(n_models, 0.5), size=20):
        mixed = weights @ np.exp(logs.astype(np.float64))
        values = np.exp(rivals.astype(np.float64)) @ weights
        own = mixed[wanted[0]]
        beats = (values > own) | ((values == own) & (names < wanted[0]))
        # Where no rival, and not the bound either, is in front, the wanted token is the best of the vocabulary.
        if not beats.any():
            assert own >= mixed.max() - 1e-12
        if beats[names >= 0].any():
            assert mixed.max() >= own
