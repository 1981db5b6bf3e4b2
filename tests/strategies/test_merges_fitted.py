"""Merges whose weights are found on validation rows: by gradients, without them, or one expert after the other."""

from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from tiny_library import random_change, teach, tensor_shapes, tiny_bench

from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.errors import MediatorError
from mediator_cli.strategies.bench import open_bench
from mediator_cli.strategies.fitting import run
from mediator_cli.strategies.library import Library, scaled, summed
from mediator_cli.strategies.merge_lorahub import combined, search
from mediator_cli.strategies.registry import get_strategy
from mediator_cli.strategies.strategy import Fitted

N_ROWS = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Experts of different ranks and targets, each the best at its own task."""
    untaught = tiny_bench(tmp_path_factory.mktemp("taught"), 3, N_ROWS)
    starts = {task: random_change(at + 1, rank=4 - at) for at, task in enumerate(untaught.library.names)}
    taught = {task.name: teach(untaught, starts[task.name], task, 20) for task in untaught.seen}
    return with_experts(untaught, taught)


def fit(bench, name, **parameters):
    return run(get_strategy(name, "test"), bench, parameters)


def only(bench, task):
    """Leave validation rows to one task alone."""
    tasks = tuple(own if own.name == task else replace(own, valid=()) for own in bench.tasks)
    return replace(bench, tasks=tasks, found={})


def with_experts(bench, experts):
    return replace(bench, library=Library(bench.library.base, experts, tensor_shapes()), found={})


def at_once(fitted, **facts):
    """Leave out how long it took."""
    return {name: value for name, value in fitted.facts.items() if name != "seconds"} | facts


def assert_same(one, other, atol=1e-6):
    assert one.keys() == other.keys()
    for name, delta in one.items():
        torch.testing.assert_close(delta.b @ delta.a, other[name].b @ other[name].a, atol=atol, rtol=0)


@pytest.mark.parametrize("per", ["model", "layer"])
@pytest.mark.parametrize("weights", ["softmax", "free"])
def test_learned_weights_answer_better_than_those_they_start_from(bench, per, weights):
    start = bench.loss(fit(bench, "merge_uniform"))
    fitted = fit(bench, "merge_learned", per=per, weights=weights, steps=25, batch=18)
    assert fitted.facts["losses"][0] == pytest.approx(start, rel=1e-4)
    assert bench.loss(fitted) < start - 0.1
    total = sum(fitted.facts["weights"].values())
    assert total == pytest.approx(1.0) if weights == "softmax" else total != pytest.approx(1.0, abs=1e-3)


def test_the_learned_weights_are_those_that_are_folded(bench):
    fitted = fit(bench, "merge_learned", per="layer", steps=5)
    expected = {}
    for layer, weights in fitted.facts["weights_by_layer"].items():
        for name, delta in summed([(bench.library.experts[name], w) for name, w in weights.items()]).items():
            if name.startswith(f"{layer}."):
                expected[name] = delta
    assert_same(fitted.folded[0], expected)
    assert set(fitted.facts["weights_by_layer"]) == {"model.layers.0", "model.layers.1"}
    one = fit(bench, "merge_learned", steps=5)
    parts = [(bench.library.experts[name], weight) for name, weight in one.facts["weights"].items()]
    assert_same(one.folded[0], summed(parts))


def test_the_gradient_of_learned_weights_is_that_of_a_naive_forward(bench):
    """One step of Adam goes by its rate against the sign of the gradient, here by finite differences of the loss."""
    fitted = fit(bench, "merge_learned", weights="free", steps=1, learning_rate=0.01, batch=18)
    for name, weight in fitted.facts["weights"].items():
        losses = []
        for step in (-0.01, 0.01):
            weights = {other: 1 / 3 + step * (other == name) for other in bench.library.names}
            losses.append(
                bench.loss(Fitted(folded=(summed([(bench.library.experts[n], w) for n, w in weights.items()]),)))
            )
        assert weight - 1 / 3 == pytest.approx(-0.01 * np.sign(losses[1] - losses[0]), rel=1e-3)


@pytest.mark.parametrize("weights", ["softmax", "free"])
def test_weights_per_layer_start_from_those_of_the_model_and_fit_better(bench, weights):
    given = {"weights": weights, "batch": 18, "learning_rate": 0.05}
    model = fit(bench, "merge_learned", steps=15, **given)
    layers = fit(bench, "merge_learned", per="layer", steps=30, **given)
    assert layers.facts["losses"][:15] == pytest.approx(model.facts["losses"], rel=1e-5)
    assert layers.facts["losses"][15] == pytest.approx(bench.loss(model), rel=1e-4)
    assert bench.loss(layers) < bench.loss(model) - 0.01


@pytest.mark.parametrize("task", ["alpha", "beta", "gamma"])
def test_the_expert_of_the_only_task_is_found(bench, task):
    for name, given in (("merge_learned", {"steps": 12}), ("soup_greedy", {"most": 1})):
        weights = fit(only(bench, task), name, **given).facts["weights"]
        assert max(weights, key=weights.get) == task


def test_lorahub_finds_the_expert_of_the_only_task(bench):
    weights = fit(only(bench, "alpha"), "merge_lorahub", rows=3, tries=20).facts["weights"]
    assert max(weights, key=weights.get) == "alpha"


@pytest.mark.parametrize("name", ["merge_learned", "merge_lorahub", "soup_greedy"])
def test_the_same_seed_finds_the_same(bench, name):
    given = {"merge_learned": {"steps": 4}, "merge_lorahub": {"tries": 8}, "soup_greedy": {"most": 2}}[name]
    first, again = (fit(bench, name, **given) for _ in range(2))
    assert at_once(first) == at_once(again)
    assert_same(first.folded[0], again.folded[0], atol=0)


def test_the_seed_draws_the_batches(bench):
    first = fit(bench, "merge_learned", steps=3, batch=2)
    other = fit(replace(bench, seed=1), "merge_learned", steps=3, batch=2)
    assert first.facts["losses"] != other.facts["losses"]


def test_tasks_count_alike_however_many_rows_they_have(bench):
    few = tuple(replace(task, valid=task.valid[:1]) if task.name == "alpha" else task for task in bench.tasks)
    own = replace(bench, tasks=few, found={})
    fitted = fit(own, "merge_learned", steps=1, batch=18)
    assert fitted.facts["losses"][0] == pytest.approx(own.loss(fit(own, "merge_uniform")), rel=1e-4)


def test_equal_experts_share_their_weight(bench):
    one = bench.library.experts["alpha"]
    twins = with_experts(bench, {"one": one, "same": one, "beta": bench.library.experts["beta"]})
    for name, given in (("merge_learned", {"steps": 10}), ("merge_learned", {"steps": 10, "per": "layer"})):
        weights = fit(twins, name, **given).facts["weights"]
        assert weights["one"] == pytest.approx(weights["same"], abs=1e-5)


@pytest.mark.parametrize("name", ["merge_learned", "merge_lorahub", "soup_greedy"])
def test_one_expert_and_experts_of_zero(bench, name):
    given = {"merge_learned": {"steps": 2}, "merge_lorahub": {"tries": 4}, "soup_greedy": {"most": 2}}[name]
    alone = fit(with_experts(bench, {"alpha": bench.library.experts["alpha"]}), name, **given)
    assert bench.loss(alone) < bench.loss(Fitted())
    zero = {tensor: FactorDelta(delta.a, delta.b * 0) for tensor, delta in random_change(1).items()}
    nothing = with_experts(bench, {"one": zero, "two": zero})
    assert bench.loss(fit(nothing, name, **given)) == pytest.approx(bench.loss(Fitted()), rel=1e-6)


@pytest.mark.parametrize("name", ["merge_learned", "merge_lorahub", "soup_greedy"])
def test_nothing_is_found_without_rows(bench, name):
    with pytest.raises(MediatorError, match="none to fit on"):
        fit(only(bench, "nothing"), name)


def test_a_matrix_outside_the_layers_has_no_weights_per_layer(bench):
    name = "model.embed_tokens.weight"
    rows, columns = bench.model.get_input_embeddings().weight.shape
    change = {name: FactorDelta(torch.ones(1, columns), torch.ones(rows, 1))}
    library = Library(bench.library.base, {"one": change, "two": change}, {name: (rows, columns)} | tensor_shapes())
    own = open_bench(library, bench.tasks)
    with pytest.raises(MediatorError, match="lies in no decoder layer"):
        fit(own, "merge_learned", per="layer")
    assert fit(own, "merge_learned", steps=1).facts["rank"] == 2


def test_lorahub_sums_a_and_b_apart(bench):
    weights = np.array([0.5, -1.25, 0.0])
    found = combined(bench.library, weights)
    changes = list(bench.library.experts.values())
    assert found.keys() == changes[0].keys() | changes[1].keys()
    for tensor, delta in found.items():
        rows, columns = bench.library.shapes[tensor]
        a, b = np.zeros((4, columns)), np.zeros((rows, 4))
        for change, weight in zip(changes, weights, strict=True):
            if tensor in change:
                rank = len(change[tensor].a)
                a[:rank] += weight * change[tensor].a.numpy()
                b[:, :rank] += weight * change[tensor].b.numpy()
        np.testing.assert_allclose((delta.b @ delta.a).numpy(), b @ a, atol=1e-5)


def test_lorahub_keeps_its_best_try(bench):
    fitted = fit(bench, "merge_lorahub", rows=3, tries=20)
    weights = np.array(list(fitted.facts["weights"].values()))
    rows = {task.name: task.valid[:3] for task in bench.seen}
    assert bench.loss(Fitted(), rows) == pytest.approx(fitted.facts["loss_at_start"], rel=1e-5)
    assert bench.loss(fitted, rows) == pytest.approx(fitted.facts["loss"], rel=1e-5)
    assert fitted.facts["loss"] < fitted.facts["loss_at_start"] - 0.5
    assert min(fitted.facts["values"]) == pytest.approx(fitted.facts["loss"] + 0.05 * abs(weights).mean(), rel=1e-5)
    assert fitted.facts["tries"] == len(fitted.facts["values"]) <= 20
    assert abs(weights).max() <= 1.5


@pytest.mark.parametrize("goal", [(0.3, -0.7, 1.1), (9.0, -9.0, 0.0)])
def test_the_search_goes_to_the_least_value_within_bounds(goal):
    tried = []

    def value(point):
        tried.append(point)
        return float(np.square(point - np.array(goal)).sum())

    best = search(value, 3, 80, 0.5)
    np.testing.assert_allclose(best, np.clip(goal, -1.5, 1.5), atol=0.02)
    assert np.array_equal(tried[0], np.zeros(3))
    assert len(tried) <= 80
    assert all((abs(point) <= 1.5).all() for point in tried)


def test_the_soup_is_the_best_that_one_more_expert_makes(bench):
    fitted = fit(bench, "soup_greedy", most=3, tuning_rows=N_ROWS)
    chosen, names = fitted.facts["chosen"], bench.library.names
    losses = {
        soup: bench.loss(Fitted(folded=(summed([(bench.library.experts[n], 1 / len(soup)) for n in soup]),)))
        for size in (1, 2, 3)
        for soup in combinations_with_replacement(names, size)
    }
    for size in range(1, len(chosen) + 1):
        before = chosen[: size - 1]
        ways = {name: losses[tuple(sorted([*before, name], key=names.index))] for name in names}
        assert min(ways, key=ways.get) == chosen[size - 1]
        assert ways[chosen[size - 1]] == pytest.approx(fitted.facts["losses"][size], rel=1e-5)
    assert fitted.facts["losses"][1:] == sorted(fitted.facts["losses"][1:], reverse=True)
    assert bench.loss(fitted) == pytest.approx(fitted.facts["losses"][-1], rel=1e-5)


def test_a_soup_begins_with_an_expert_and_takes_none_that_does_harm(bench):
    harm = scaled(bench.library.experts["alpha"], -1.0)
    assert bench.loss(Fitted(folded=(harm,))) > bench.loss(Fitted())
    alone = fit(with_experts(bench, {"harm": harm}), "soup_greedy", tuning_rows=N_ROWS)
    assert alone.facts["chosen"] == ["harm"]
    both = with_experts(bench, {"harm": harm, "alpha": bench.library.experts["alpha"]})
    assert "harm" not in fit(both, "soup_greedy", tuning_rows=N_ROWS).facts["chosen"]
