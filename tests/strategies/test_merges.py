"""Merges through the catalogue: what is folded is what a recipe, or the same method on dense deltas, gives."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_adapter
from safetensors.torch import save_file
from tiny_library import TASKS, random_change, tensor_shapes, tiny_bench

from mediator_cli import load_recipe, make_plan, merge
from mediator_cli.bundle.factors import FactorDelta, as_delta
from mediator_cli.checkpoint.adapter.factors import read_factors
from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.source import open_checkpoint
from mediator_cli.errors import MediatorError
from mediator_cli.methods.registry import resolve_method
from mediator_cli.strategies._fitting import GRID, climb
from mediator_cli.strategies.fitting import run
from mediator_cli.strategies.library import Library, scaled
from mediator_cli.strategies.registry import get_strategy

CATALOGUE = (
    "merge_core_space", "merge_cross_terms", "merge_dare", "merge_knots", "merge_robust", "merge_svd", "merge_ties",
    "merge_uniform", "merge_wudi",
)  # fmt: skip
KEEPS_EQUALS = {
    "merge_core_space": {"merge": "mean"}, "merge_cross_terms": {}, "merge_dare": {"density": 1.0}, "merge_knots": {},
    "merge_robust": {"density": 1.0}, "merge_svd": {}, "merge_ties": {"density": 1.0}, "merge_uniform": {},
    "merge_wudi": {"solve": "exact"},
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return tiny_bench(tmp_path_factory.mktemp("library"), 4, 3)


def fit(bench, name, **parameters):
    return run(get_strategy(name, "test"), bench, {"scale": 1.0} | parameters)


def folded(fitted):
    (change,) = fitted.folded
    return {name: (delta.b.double() @ delta.a.double()).numpy() for name, delta in change.items()}


def deltas_of(library, tensor):
    """Make the dense deltas of all experts, [n, out, in]; zeros where one leaves the tensor as it is."""
    zero = torch.zeros(library.shapes[tensor])
    own = [change.get(tensor) for change in library.experts.values()]
    return np.stack([(zero if delta is None else delta.b @ delta.a).double().numpy() for delta in own])


def with_experts(bench, experts, scalings=None):
    return replace(bench, library=Library(bench.library.base, experts, tensor_shapes(), scalings or {}), found={})


def assert_close(found, expected, rtol=2e-5):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=rtol * max(abs(values).max(), 1e-3), rtol=0)


def test_uniform_is_the_mean_of_the_products(bench):
    expected = {name: 0.7 * deltas_of(bench.library, name).mean(0) for name in tensor_shapes()}
    assert_close(folded(fit(bench, "merge_uniform", scale=0.7)), expected)


def test_folded_weights_are_those_of_the_dense_model_and_the_change(bench):
    fitted = fit(bench, "merge_uniform")
    modules = dict(bench.model.named_modules())
    before = {name: modules[name.removesuffix(".weight")].weight.detach().clone() for name in tensor_shapes()}
    with bench.answering(fitted) as model:
        for name, dense in before.items():
            now = model.get_submodule(name.removesuffix(".weight")).weight.detach()
            expected = dense.double().numpy() + deltas_of(bench.library, name).mean(0)
            np.testing.assert_allclose(now.numpy(), expected, atol=1e-6)
    assert all(torch.equal(modules[name.removesuffix(".weight")].weight, dense) for name, dense in before.items())


def test_cross_terms_average_a_and_b_apart(bench):
    found, n = folded(fit(bench, "merge_cross_terms", scale=0.5)), len(bench.library.experts)
    for tensor, (rows, columns) in tensor_shapes().items():
        a, b = np.zeros((4, columns)), np.zeros((rows, 4))
        for change in bench.library.experts.values():
            if tensor in change:
                own = change[tensor]
                a[: len(own.a)] += own.a.numpy() / n
                b[:, : len(own.a)] += own.b.numpy() / n
        np.testing.assert_allclose(found[tensor], 0.5 * b @ a, atol=1e-6)


def test_cross_terms_weigh_both_factors_by_the_root_of_a_scaling(bench):
    experts = {"one": random_change(1), "two": random_change(1, rank=1)}
    scalings = {"one": dict.fromkeys(experts["one"], 4.0)}
    given = {"one": scaled(experts["one"], 4.0), "two": experts["two"]}
    found = folded(fit(with_experts(bench, given, scalings), "merge_cross_terms"))
    for tensor, one in experts["one"].items():
        two = experts["two"][tensor]
        a, b = 2 * one.a.numpy(), 2 * one.b.numpy()
        a[:1] += two.a.numpy()
        b[:, :1] += two.b.numpy()
        np.testing.assert_allclose(found[tensor], b @ a / 4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "given", "method", "params"),
    [
        ("merge_knots", {"density": 0.5}, "knots", {"density": 0.5, "lambda": 1.0, "trim": "tensor"}),
        ("merge_knots", {}, "knots", {"lambda": 1.0}),
        ("merge_wudi", {"solve": "exact"}, "wudi", {"solve": "exact"}),
    ],
)
def test_methods_in_bases_give_what_they_give_on_dense_deltas(bench, name, given, method, params):
    resolved = resolve_method(method, None, params, str)
    found = folded(fit(bench, name, **given))
    for tensor in tensor_shapes():
        dense = deltas_of(bench.library, tensor).astype(np.float32)
        expected = resolved(dense, np.full(len(dense), 0.25 if name == "merge_wudi" else 1.0))
        np.testing.assert_allclose(found[tensor], expected, atol=2e-4 * abs(expected).max())


def test_steps_of_wudi_lower_its_loss_and_end_near_the_minimum(bench):
    def loss(found):
        total = 0.0
        for tensor, merged in found.items():
            for delta in deltas_of(bench.library, tensor):
                total += np.square((4 * merged - delta) @ delta.T).sum() / max(np.square(delta).sum(), 1e-12)
        return total

    start, few, many, least = (
        loss(folded(fit(bench, "merge_wudi", **given)))
        for given in (
            {"steps": 1}, {"steps": 30}, {"steps": 600}, {"solve": "exact"},
        )
    )  # fmt: skip
    assert least < many < few < start
    assert many - least < 0.02 * (start - least)


def test_ties_on_deltas_is_that_of_the_paper(bench):
    found = folded(fit(bench, "merge_ties", rank=64, density=0.3))
    for tensor in tensor_shapes():
        expected = naive_ties(deltas_of(bench.library, tensor), 0.3)
        np.testing.assert_allclose(found[tensor], expected, atol=1e-5 * abs(expected).max())


def naive_ties(deltas, density):
    """Trim to int(n · density) entries, elect signs by the sum, average what agrees; entry by entry."""
    kept = np.zeros_like(deltas)
    for own, flat in zip(kept.reshape(len(kept), -1), deltas.reshape(len(deltas), -1), strict=True):
        largest = np.argsort(-abs(flat), kind="stable")[: int(density * flat.size)]
        own[largest] = flat[largest]
    merged = np.zeros(deltas.shape[1:])
    for at in np.ndindex(merged.shape):
        values = kept[(slice(None), *at)]
        agreeing = [value for value in values if value and (value > 0) == (values.sum() >= 0)]
        merged[at] = np.mean(agreeing) if agreeing else 0.0
    return merged


@pytest.mark.parametrize("name", ["merge_ties", "merge_svd"])
def test_what_is_cut_is_the_nearest_of_its_rank_and_the_energy_is_told(bench, name):
    whole, cut = fit(bench, name, rank=64), fit(bench, name, rank=2)
    left = total = 0.0
    for tensor, dense in folded(whole).items():
        u, s, vt = np.linalg.svd(dense)
        left, total = left + np.square(s[:2]).sum(), total + np.square(s).sum()
        np.testing.assert_allclose(folded(cut)[tensor], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5 * s[0])
    assert whole.facts["energy"] == pytest.approx(1.0, abs=1e-6)
    assert cut.facts["energy"] == pytest.approx(left / total, rel=1e-4)
    assert left < 0.99 * total
    assert cut.facts["rank"] == 2


def write_library(folder, bench, ranks=(2, 3), alphas=(1, 12)):
    """Write experts as PEFT does, with scalings that are not alike, and read them as a library does."""
    experts, scalings = {}, {}
    tensors = open_checkpoint(bench.library.base).tensors
    for at, (name, rank, alpha) in enumerate(zip(TASKS, ranks, alphas, strict=False)):
        weights = {}
        for tensor, delta in random_change(at, rank=rank).items():
            path = f"base_model.model.{tensor.removesuffix('.weight')}"
            weights |= {f"{path}.lora_A.weight": delta.a, f"{path}.lora_B.weight": delta.b}
        write_adapter(folder / name, seed=0, rank=rank, lora_alpha=alpha)
        save_file(weights, folder / name / "adapter_model.safetensors")
        factors = read_factors(open_adapter(folder / name, tensors))
        experts[name] = {tensor: as_delta(own) for tensor, own in factors.items()}
        scalings[name] = {tensor: own.scaling for tensor, own in factors.items()}
    return with_experts(bench, experts, scalings)


def merged_by_recipe(folder, bench, average, weight):
    experts = [{"name": name, "model": f"./{name}", "weight": weight} for name in bench.library.names]
    recipe = {"version": 1, "base": str(bench.library.base), "experts": experts, "average": average, "seed": bench.seed}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    out = merge(make_plan(load_recipe(folder / "recipe.yaml")), folder / "out")
    return read_factors(open_adapter(out, open_checkpoint(bench.library.base).tensors))


@pytest.mark.parametrize(
    ("name", "given", "average", "weight"),
    [
        ("merge_ties", {"act_on": "factors"}, {"method": "lora_ties"}, 1.0),
        ("merge_ties", {"rank": 3}, {"method": "lora_ties", "act_on": "delta", "rank": 3}, 1.0),
        ("merge_dare", {"act_on": "factors"}, {"method": "lora_dare_ties"}, 1.0),
        (
            "merge_dare", {"combine": "linear", "rank": 5},
            {"method": "lora_dare_linear", "act_on": "delta", "rank": 5}, 0.5,
        ),
        ("merge_core_space", {}, {"method": "core_space"}, 0.5),
        ("merge_svd", {}, {"method": "lora_svd"}, 0.5),
        ("merge_robust", {}, {"method": "robustmerge", "fuse_weight": 1.0}, 0.5),
        ("merge_cross_terms", {}, {"method": "lora_linear"}, 0.25),
    ],
)  # fmt: skip
def test_the_result_is_that_of_a_recipe(tmp_path, bench, name, given, average, weight):
    own = write_library(tmp_path, bench)
    expected = merged_by_recipe(tmp_path, own, average, weight)
    (change,) = fit(own, name, **given).folded
    assert change.keys() == expected.keys()
    for tensor, factors in expected.items():
        assert torch.equal(change[tensor].a, torch.from_numpy(factors.a)), tensor
        assert torch.equal(change[tensor].b, torch.from_numpy(factors.b)), tensor


@pytest.mark.parametrize("name", CATALOGUE)
def test_equal_experts_merge_to_one_of_them_where_nothing_is_dropped(bench, name):
    one = random_change(1)
    # WUDI keeps one of them, and its half is what is taken as the mean of two.
    scale = 2.0 if name == "merge_wudi" else 1.0
    found = folded(fit(with_experts(bench, {"one": one, "same": one}), name, scale=scale, **KEEPS_EQUALS[name]))
    assert_close(found, {tensor: (delta.b @ delta.a).numpy() for tensor, delta in one.items()}, rtol=1e-4)


@pytest.mark.parametrize("name", CATALOGUE)
def test_one_expert_experts_of_zero_and_many_of_them(bench, name):
    one = random_change(3)
    found = folded(fit(with_experts(bench, {"one": one}), name, **KEEPS_EQUALS[name]))
    assert_close(found, {tensor: (delta.b @ delta.a).numpy() for tensor, delta in one.items()}, rtol=1e-4)
    zero = {tensor: FactorDelta(delta.a, delta.b * 0) for tensor, delta in random_change(1).items()}
    assert not any(
        values.any() for values in folded(fit(with_experts(bench, {"one": zero, "two": zero}), name)).values()
    )
    many = fit(with_experts(bench, {f"e{at}": random_change(at) for at in range(24)} | {"zero": zero}), name)
    assert all(np.isfinite(values).all() and values.any() for values in folded(many).values())
    assert many.facts["rank"] <= max(sum(1 + at % 4 for at in range(24)) + 2, 16)


@pytest.mark.parametrize("name", [*CATALOGUE, "merge_learned", "merge_lorahub", "soup_greedy"])
def test_a_library_without_experts_is_refused(bench, name):
    with pytest.raises(MediatorError, match="none to combine"):
        run(get_strategy(name, "test"), with_experts(bench, {}), {})


def test_a_scale_cannot_be_tuned_without_rows(bench):
    blind = replace(bench, tasks=tuple(replace(task, valid=()) for task in bench.tasks), found={})
    with pytest.raises(MediatorError, match="none to fit on"):
        fit(blind, "merge_ties", scale=None)
    assert fit(blind, "merge_ties").facts["scales_tried"] == []


def test_a_rank_is_refused_where_factors_are_merged(bench):
    with pytest.raises(MediatorError, match="act_on: delta"):
        fit(bench, "merge_ties", act_on="factors", rank=4)


def test_the_scale_is_the_one_of_the_least_loss_that_was_tried(bench):
    fitted = fit(bench, "merge_uniform", scale=None, tuning_rows=2)
    rows = {task.name: task.valid[:2] for task in bench.seen}
    losses = {}
    for tried in fitted.facts["scales_tried"]:
        losses[tried["scale"]] = bench.loss(fit(bench, "merge_uniform", scale=tried["scale"]), rows)
        assert losses[tried["scale"]] == pytest.approx(tried["loss"], rel=1e-5)
    assert len(losses) > 2
    assert losses[fitted.facts["scale"]] == min(losses.values())
    assert_close(folded(fitted), folded(fit(bench, "merge_uniform", scale=fitted.facts["scale"])))


@pytest.mark.parametrize("best", GRID)
def test_a_loss_with_one_valley_is_followed_to_its_floor(best):
    seen = climb(GRID, lambda factor: abs(np.log(factor / best)))
    assert min(seen, key=seen.get) == best
    assert len(seen) <= abs(GRID.index(best) - GRID.index(1.0)) + 3


def test_the_seed_draws_what_dare_drops(bench):
    first, again = (folded(fit(bench, "merge_dare", density=0.5)) for _ in range(2))
    other = folded(fit(replace(bench, seed=1), "merge_dare", density=0.5))
    assert_close(first, again, rtol=0)
    assert any(not np.allclose(first[name], other[name]) for name in first)
