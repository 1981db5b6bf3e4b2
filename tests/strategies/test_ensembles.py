"""Ensembles and references: weights against an independent optimiser, and answers against naive ensembles."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny_library import taught_bench, toy_rows

from mediator_cli.errors import BundleError, CheckpointError
from mediator_cli.evaluate.tasks import Row
from mediator_cli.runtime.classify import fit_classifier, fit_shares, logits
from mediator_cli.runtime.tokens import answer_tokens, end_tokens, prompt_tokens
from mediator_cli.strategies._simplex import geometric_loss, minimise, mixture_loss
from mediator_cli.strategies._valid import valid_tokens
from mediator_cli.strategies.bench import Bench, mixture_for
from mediator_cli.strategies.fitting import run
from mediator_cli.strategies.registry import strategies
from mediator_cli.strategies.strategy import ByTask, Fitted, Fixed

NAMES = ("alpha", "beta", "gamma", "delta")
FEW = 3


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Four trained experts with a task each, and a held-out task."""
    return taught_bench()


def fit(bench: Bench, name: str, **parameters: Any) -> Fitted:
    return run(strategies()[name], bench, parameters)


@cache
def naive_log_probs(bench: Bench, task: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities at every token of valid answers [tokens, vocabulary, experts], one row and expert at a time."""
    rows = bench.tasks[task].valid[:FEW]
    prompts = prompt_tokens(bench.tokenizer, [row.prompt for row in rows])
    answers = answer_tokens(bench.tokenizer, prompts, [row.answer for row in rows])
    ends = end_tokens(bench.model, bench.tokenizer)[:1]
    found = []
    for name in bench.library.names:
        own = []
        with bench.answering(Fitted(bench.library.experts)) as model, model.mixing(name), torch.no_grad():
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = torch.tensor([[*prompt.ids, *answer, *ends]])
                logs = model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1].double().log_softmax(-1)
                own.append((logs, ids[0, len(prompt.ids) :]))
        found.append(own)
    stacked = [torch.stack([own[at][0] for own in found], -1) for at in range(len(rows))]
    return [(logs.numpy(), targets.numpy()) for logs, (_, targets) in zip(stacked, found[0], strict=True)]


def few(bench: Bench) -> dict[str, tuple[Row, ...]]:
    return {task.name: task.valid[:FEW] for task in bench.seen}


def naive_loss(bench: Bench, weights: np.ndarray, how: str) -> float:
    """Mean over tasks of the mean loss of a row, of a mixture of whole distributions."""
    means = []
    for at in range(len(bench.seen)):
        losses = []
        for logs, targets in naive_log_probs(bench, at):
            mixed = np.log(np.exp(logs) @ weights) if how == "probabilities" else logs @ weights
            mixed = mixed - np.log(np.exp(mixed).sum(-1, keepdims=True))
            losses.append(-mixed[np.arange(len(targets)), targets].sum())
        means.append(np.mean(losses))
    return float(np.mean(means))


def test_uniform_ensembles_are_means_of_whole_distributions(bench: Bench) -> None:
    equal = np.full(4, 0.25)
    uniform = fit(bench, "ensemble_uniform")
    rows = few(bench)
    assert bench.loss(uniform, rows) == pytest.approx(naive_loss(bench, equal, "probabilities"), abs=1e-4)
    geometric = fit(bench, "ensemble_geometric", weights="uniform")
    assert bench.loss(geometric, rows) == pytest.approx(naive_loss(bench, equal, "logits"), abs=1e-4)
    with_base = fit(bench, "ensemble_uniform", with_base=True)
    assert with_base.decision == Fixed(dict.fromkeys(NAMES, 0.2))


def test_learned_weights_are_those_of_an_independent_optimiser(bench: Bench) -> None:
    tokens = valid_tokens(bench)

    def loss(raw: np.ndarray) -> float:
        weights = np.exp(raw - np.logaddexp.reduce(raw))
        return -float(tokens.shares @ np.log(np.exp(tokens.log_probs[:, 1:]) @ weights))

    other = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8})
    fitted = fit(bench, "ensemble_learned")
    assert fitted.facts["loss"] == pytest.approx(other.fun, abs=2e-5)
    assert 0 <= fitted.facts["gap"] <= 1e-5
    expected = np.exp(other.x - np.logaddexp.reduce(other.x))
    weights = [fitted.facts["weights"].get(name, 0.0) for name in NAMES]
    np.testing.assert_allclose(weights, expected, atol=5e-3)
    # What the facts say is what the ensemble then does.
    assert bench.loss(fitted) == pytest.approx(fitted.facts["loss"], abs=1e-3)
    assert fitted.facts["loss"] < bench.loss(fit(bench, "ensemble_uniform")) - 0.1
    assert set(fitted.experts) == set(fitted.facts["weights"])


def test_learned_geometric_weights(bench: Bench) -> None:
    fitted = fit(bench, "ensemble_geometric")
    loss = bench.loss(fitted)
    assert fitted.combine == "logits"
    assert loss <= fitted.facts["bound"] + 1e-4
    assert loss < bench.loss(fit(bench, "ensemble_geometric", weights="uniform")) - 0.1
    given = np.array([fitted.facts["weights"].get(name, 0.0) for name in NAMES])
    assert bench.loss(fitted, few(bench)) == pytest.approx(naive_loss(bench, given, "logits"), abs=1e-4)


def test_the_bound_on_geometric_means_holds_and_is_exact_where_all_is_kept() -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal(size=(20, 30, 3)) * 2
    logs -= np.logaddexp.reduce(logs, axis=1, keepdims=True)
    shares = np.full(20, 1 / 20)
    wanted = logs[:, 0]
    for weights in rng.dirichlet(np.ones(3), size=5):
        mixed = logs @ weights
        exact = float(shares @ (np.logaddexp.reduce(mixed, axis=1) - mixed[:, 0]))
        whole = geometric_loss(wanted, shares, logs, np.full((20, 3), -np.inf))
        assert whole(weights)[0] == pytest.approx(exact)
        tail = np.logaddexp.reduce(logs[:, 10:], axis=1)
        part = geometric_loss(wanted, shares, logs[:, :10], tail)
        value, gradient = part(weights)
        assert value >= exact - 1e-12
        step = 1e-6 * np.eye(3)
        slopes = [(part(weights + s)[0] - part(weights - s)[0]) / 2e-6 for s in step]
        np.testing.assert_allclose(gradient, slopes, atol=1e-6)


def test_the_gap_bounds_what_is_left_to_gain() -> None:
    rng = np.random.default_rng(1)
    logs = np.log(rng.dirichlet(np.ones(6), size=50))
    loss = mixture_loss(logs, np.full(50, 1 / 50))
    best = minimise(loss, 6, tolerance=1e-9, most_steps=20000)
    for most in (0, 3, 10):
        found = minimise(loss, 6, tolerance=0.0, most_steps=most)
        assert found.loss - best.loss <= found.gap + 1e-9
    value, gradient = loss(best.weights)
    assert value == pytest.approx(-np.log(np.exp(logs) @ best.weights).mean())
    # The optimum: no member gains on the others, and those with less have no weight.
    assert (gradient >= gradient @ best.weights - 1e-8).all()


def test_weights_of_clusters_are_chosen_by_the_prompt(bench: Bench) -> None:
    fitted = fit(bench, "ensemble_clustered", clusters=4)
    told = {each["tasks"][0]: each["weights"] for each in fitted.facts["clusters"]}
    with bench.answering(fitted) as model:
        for task in bench.seen:
            prompts = prompt_tokens(bench.tokenizer, [row.prompt for row in task.test])
            weights = model.route([prompt.ids for prompt in prompts]).weights
            np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-5)
            away = {own: abs(weights.mean(0) - [told[own].get(name, 0.0) for name in NAMES]).sum() for own in told}
            assert min(away, key=lambda own: away[own]) == task.name
    assert bench.loss(fitted) < bench.loss(fit(bench, "ensemble_learned"))
    one = fit(bench, "ensemble_clustered", clusters=1)
    learned = fit(bench, "ensemble_learned").facts["weights"]
    with bench.answering(one) as model:
        weights = model.route([prompt.ids for prompt in prompts]).weights
    # With one cluster, prompts make no difference.
    np.testing.assert_allclose(weights, [[learned.get(name, 0.0) for name in NAMES]] * len(weights), atol=0.01)


def test_softmax_regression_on_shares() -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(3), 20)
    features = (rng.normal(size=(60, 5)) + labels[:, None]).astype(np.float32)
    plain, same = fit_classifier("logistic", features, labels, 3), fit_shares(features, np.eye(3)[labels])
    np.testing.assert_allclose(plain.coefficients, same.coefficients, atol=1e-3)
    # Where all rows have the same shares, so do all predictions.
    shares = np.tile([0.5, 0.3, 0.2], (60, 1))
    scores = logits(fit_shares(features, shares), features)
    np.testing.assert_allclose(np.exp(scores - np.logaddexp.reduce(scores, axis=1)[:, None]), shares, atol=1e-3)


@pytest.mark.parametrize("name", ["ensemble_learned", "ensemble_geometric"])
def test_generation_is_that_of_a_naive_ensemble(bench: Bench, name: str) -> None:
    fitted = fit(bench, name)
    rows = [task.test[0] for task in bench.tasks]
    prompts = [prompt.ids for prompt in prompt_tokens(bench.tokenizer, [row.prompt for row in rows])]
    weights = torch.tensor([fitted.decision.weights[own] for own in fitted.experts])
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    with bench.answering(fitted) as model:
        mask = (torch.arange(width) >= width - torch.tensor([[len(p)] for p in prompts])).long()
        found = model.generate(
            ids, attention_mask=mask, mixture=dict(fitted.decision.weights), max_new_tokens=5, do_sample=False
        )
        for prompt, row in zip(prompts, found, strict=True):
            tokens = list(prompt)
            for _ in range(5):
                logs = []
                for own in fitted.experts:
                    with model.mixing(own), torch.no_grad():
                        logs.append(model(input_ids=torch.tensor([tokens])).logits[0, -1].float())
                each = torch.stack(logs)
                mixed = weights @ (each.softmax(-1) if name == "ensemble_learned" else each)
                tokens.append(int(mixed.argmax()))
                if tokens[-1] == 2:
                    break
            assert row[width : width + len(tokens) - len(prompt)].tolist() == tokens[len(prompt) :]


def test_references(bench: Bench) -> None:
    assert fit(bench, "base") == Fitted() or not fit(bench, "base").experts
    oracle = fit(bench, "oracle")
    assert isinstance(oracle.decision, ByTask)
    assert [mixture_for(oracle, task) for task in bench.tasks] == [*({name: 1.0} for name in NAMES), "dense"]
    best = fit(bench, "expert_best")
    losses = {name: bench.loss(Fitted(bench.library.experts, decision=Fixed({name: 1.0}))) for name in NAMES}
    assert best.decision == Fixed({min(losses, key=lambda name: losses[name]): 1.0})
    assert best.facts["losses"] == pytest.approx({"dense": bench.loss(Fitted()), **losses}, abs=1e-4)


def changed(bench: Bench, **fields: Any) -> Bench:
    """Make a bench with other rows or experts, which shares nothing found."""
    return replace(bench, found={}, **fields)


def test_few_rows_and_tasks_that_are_all_alike(bench: Bench) -> None:
    few = changed(bench, tasks=tuple(replace(task, valid=task.valid[:5]) for task in bench.tasks))
    assert fit(few, "ensemble_learned").facts["gap"] <= 1e-5
    with pytest.raises(BundleError, match="5 usable prompts"):
        fit(few, "ensemble_clustered")
    rows = toy_rows("alpha", 10)
    alike = changed(bench, tasks=tuple(replace(task, valid=rows) for task in bench.seen))
    assert max(fit(alike, "ensemble_learned").facts["weights"], key=lambda name: name == "alpha") == "alpha"
    with pytest.raises(BundleError, match="no router can tell them apart"):
        fit(alike, "ensemble_clustered")


def test_one_expert_none_and_one_that_changes_nothing(bench: Bench) -> None:
    one = bench.with_library(bench.library.subset(["beta"]), dict.fromkeys(NAMES, "beta"))
    for name in ("ensemble_uniform", "ensemble_learned", "ensemble_geometric"):
        assert fit(one, name).decision == Fixed({"beta": 1.0})
    empty = replace(bench.library, experts={"alpha": {}, "beta": bench.library.experts["beta"]})
    still = changed(bench, library=empty, tasks=bench.tasks[:2])
    assert fit(still, "expert_best").facts["losses"]["alpha"] == fit(still, "expert_best").facts["losses"]["dense"]
    assert fit(still, "ensemble_learned").facts["weights"]["beta"] > 0.5
    none = changed(bench, library=replace(bench.library, experts={}))
    for name in ("ensemble_uniform", "ensemble_learned", "ensemble_geometric", "expert_best", "ensemble_clustered"):
        with pytest.raises(CheckpointError, match="none to combine"):
            fit(none, name)
    with pytest.raises(CheckpointError, match="is no expert of the library"):
        fit(none, "oracle")
    no_rows = changed(bench, tasks=tuple(replace(task, valid=()) for task in bench.tasks))
    with pytest.raises(CheckpointError, match="none to fit on"):
        fit(no_rows, "ensemble_learned")


def test_more_clusters_than_tasks_are_refused(bench: Bench) -> None:
    with pytest.raises(CheckpointError, match="9 of 4"):
        fit(bench, "ensemble_clustered", clusters=9)
