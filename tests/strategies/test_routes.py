"""Routers that learn nothing: their directions against dense matrices, PEFT's own Arrow, and averages taken by hand."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from safetensors.torch import save_file
from tiny_library import random_change, tensor_shapes, tiny_bench, toy_rows
from transformers import LlamaForCausalLM

from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.errors import BundleError, RecipeError
from mediator_cli.runtime.gates import Gates
from mediator_cli.runtime.policy import mix
from mediator_cli.runtime.tokens import prompt_tokens
from mediator_cli.strategies._gates import Averages, contrast
from mediator_cli.strategies._svd import cut, right_vectors, svd
from mediator_cli.strategies.bench import open_bench
from mediator_cli.strategies.fitting import run
from mediator_cli.strategies.library import Library
from mediator_cli.strategies.registry import get_strategy
from mediator_cli.strategies.strategy import ByTask, Fitted

NAMES = ("alpha", "beta", "gamma", "delta")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Random experts of four ranks and four sets of targets."""
    return tiny_bench(tmp_path_factory.mktemp("random"), 4, 10)


def fit(bench, name, **parameters):
    return run(get_strategy(name, "test"), bench, parameters)


def dense(change):
    return {name: delta.b @ delta.a for name, delta in change.items()}


def naive_svd(change, name):
    _, s, vt = torch.linalg.svd((change[name].b @ change[name].a).double())
    return s.float(), vt.float()


def test_singular_values_of_factors_are_those_of_their_product(bench):
    for change in bench.library.experts.values():
        for name, delta in change.items():
            u, s, vt = svd(delta)
            expected, _ = naive_svd(change, name)
            torch.testing.assert_close(s, expected[: len(s)], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close((u * s) @ vt, delta.b @ delta.a, rtol=1e-4, atol=1e-5)


def test_a_cut_is_the_nearest_matrix_of_its_rank():
    torch.manual_seed(0)
    delta = FactorDelta(torch.randn(5, 9), torch.randn(7, 5))
    _, s, _ = svd(delta)
    for rank in (1, 2, 4):
        small = cut(delta, rank)
        assert len(small.a) == rank
        left = (small.b @ small.a - delta.b @ delta.a).norm()
        torch.testing.assert_close(left, s[rank:].norm(), rtol=1e-4, atol=1e-5)
    assert cut(delta, 5) is delta


def test_a_cut_of_many_factors_is_as_near():
    torch.manual_seed(0)
    falls = 0.9 ** torch.arange(60.0)
    delta = FactorDelta(torch.randn(60, 90) * falls[:, None], torch.randn(70, 60))
    _, s, _ = svd(delta)
    small = cut(delta, 6)
    assert small.a.shape == (6, 90)
    left = (small.b @ small.a - delta.b @ delta.a).norm()
    torch.testing.assert_close(left, s[6:].norm(), rtol=1e-3, atol=0.0)
    assert torch.equal(cut(delta, 6).b, small.b)


def test_directions_of_nothing_are_zeros():
    torch.manual_seed(0)
    a, b = torch.randn(1, 9), torch.randn(7, 1)
    twice = FactorDelta(torch.cat([a, a]), torch.cat([b, b], dim=1))
    found = right_vectors(twice, 3, 9)
    torch.testing.assert_close(found[0].abs(), (a[0] / a.norm()).abs())
    assert not found[1:].any()
    assert not right_vectors(None, 2, 9).any()
    assert not right_vectors(FactorDelta(a, torch.zeros(7, 1)), 2, 9).any()
    assert not right_vectors(FactorDelta(torch.zeros(0, 9), torch.zeros(7, 0)), 2, 9).any()


def test_arrow_knows_experts_by_their_first_right_singular_vectors(bench):
    gates = fit(bench, "route_arrow").decision
    assert (gates.rule.score, gates.rule.per, gates.rule.at, gates.rule.reads) == (
        "absolute",
        "token",
        "module",
        "input",
    )
    for name, gate in gates.by_name.items():
        for at, change in enumerate(bench.library.experts.values()):
            own = gate.directions[at, 0]
            if name not in change:
                assert not own.any()
                continue
            assert float((own @ naive_svd(change, name)[1][0]).abs()) == pytest.approx(1, abs=1e-4)
    assert set(gates.by_name) == {name for change in bench.library.experts.values() for name in change}


def write_adapter(folder, change, scaling):
    """Write an adapter as PEFT does; its b is that of the change without the scaling."""
    rank = len(next(iter(change.values())).a)
    targets = sorted({name.split(".")[-2] for name in change})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank * scaling,
              "target_modules": targets, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arrays = {}
    for name, delta in change.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        arrays[f"{stem}.lora_A.weight"] = delta.a.contiguous()
        arrays[f"{stem}.lora_B.weight"] = (delta.b / scaling).contiguous()
    save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.3), (4, 2.0)])
def test_arrow_answers_as_that_of_peft(bench, tmp_path, top_k, temperature):
    """PEFT takes adapters of one rank and the same targets alone, and 15 power iterations from a random start."""
    experts = {}
    for at, name in enumerate(NAMES):
        change = random_change(4 * at + 1, rank=2, size=0.3 * (1 + at))
        # A clear first singular value: power iterations stop after 15.
        experts[name] = {n: FactorDelta(d.a * torch.tensor([[3.0], [0.3]]), d.b) for n, d in change.items()}
        write_adapter(tmp_path / name, experts[name], 2.0)
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    base = LlamaForCausalLM.from_pretrained(bench.library.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = create_arrow_model(base, [str(tmp_path / name) for name in NAMES], config)
    ids = torch.tensor([[1, 3, 7, 8, 12, 30, 4, 22], [5, 6, 9, 12, 20, 33, 4, 2]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    ours = replace(bench, library=Library(bench.library.base, experts, tensor_shapes()), found={})
    with ours.answering(fit(ours, "route_arrow", top_k=top_k, temperature=temperature)) as model, torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_smile_cuts_experts_and_measures_inputs_in_their_space(bench):
    fitted = fit(bench, "route_smile", rank=2, gate_rank=2)
    for at, (expert, change) in enumerate(bench.library.experts.items()):
        for name, matrix in dense(change).items():
            u, s, vt = torch.linalg.svd(matrix)
            kept = dense(fitted.experts[expert])[name]
            torch.testing.assert_close(kept, (u[:, :2] * s[:2]) @ vt[:2], rtol=1e-4, atol=1e-5)
            directions = fitted.decision.by_name[name].directions[at]
            n = min(2, len(change[name].a))
            torch.testing.assert_close(directions.t() @ directions, vt[:n].t() @ vt[:n], rtol=1e-4, atol=1e-5)
    assert fitted.decision.rule.top_k == 1


def by_hand(bench, task, layer, take):
    """Average hidden states before a layer over the prompts of a task."""
    found = []
    for prompt in prompt_tokens(bench.tokenizer, [row.prompt for row in task.valid]):
        with bench.model.mixing("dense"), torch.no_grad():
            states = bench.model(input_ids=torch.tensor([list(prompt.ids)]), output_hidden_states=True).hidden_states
        found.append(take(states[layer][0].float()))
    return torch.stack(found)


def test_average_activation_is_the_mean_of_last_tokens(bench):
    gates = fit(bench, "route_average_activation", form="paper", seen="last", per="token", at="layer").decision
    for layer in (0, 1):
        directions = gates.by_name[f"model.layers.{layer}"].directions[:, 0]
        for at, task in enumerate(bench.seen):
            mean = by_hand(bench, task, layer, lambda states: states[-1]).mean(0)
            torch.testing.assert_close(directions[at], mean / mean.norm() / 4, rtol=1e-4, atol=1e-5)


def test_contrast_points_from_the_middle_to_each_expert(bench):
    """Of mean states, in units of their spread over all tokens; on average `margin` better than the others."""
    gates = fit(bench, "route_average_activation", at="layer", margin=3.0, n_examples=10).decision
    gate = gates.by_name["model.layers.1"]
    own = torch.stack([by_hand(bench, task, 1, lambda states: states.mean(0)).mean(0) for task in bench.seen])
    tokens = [
        by_hand(bench, replace(task, valid=(row,)), 1, lambda s: s)[0] for task in bench.seen for row in task.valid
    ]
    spread = torch.cat(tokens).std(0, unbiased=False)
    toward = (own - own.mean(0)) / spread
    directions = gate.directions[:, 0]
    cosines = torch.nn.functional.cosine_similarity(directions * spread, toward)
    torch.testing.assert_close(cosines, torch.ones(4), rtol=1e-3, atol=1e-3)
    scores = own @ directions.t() + gate.bias
    assert float(scores.diagonal().mean() - (scores.sum() - scores.trace()) / 12) == pytest.approx(3, rel=1e-3)
    torch.testing.assert_close(own.mean(0) @ directions.t() + gate.bias, torch.zeros(4), rtol=1e-3, atol=1e-3)


def test_experts_that_nothing_tells_apart_are_mixed_alike():
    alike = contrast(Averages(torch.ones(3, 5), torch.ones(5)), 5.0)
    assert not alike.directions.any()
    assert not alike.bias.any()
    single = contrast(Averages(torch.randn(1, 5), torch.ones(5)), 5.0)
    assert torch.isfinite(single.directions).all()


def test_twins_and_the_shared_expert_make_the_whole_expert(bench):
    fitted = fit(bench, "route_twin_merging", rank=16, scale=0.3, classifier="ridge")
    shared = dense(fitted.folded[0])
    for expert, change in bench.library.experts.items():
        own, twin = dense(change), dense(fitted.experts[expert])
        for name, share in shared.items():
            expected = own.get(name, torch.zeros_like(share))
            torch.testing.assert_close(share + twin[name], expected, rtol=1e-4, atol=1e-4)
    small = fit(bench, "route_twin_merging", rank=1, classifier="ridge").experts
    assert {len(delta.a) for change in small.values() for delta in change.values()} == {1}
    record = fitted.decision.record
    assert (record.features, record.layer, record.policy.rule, record.policy.outside) == (
        "hidden_mean", 2, "posterior", "ignore",
    )  # fmt: skip


def test_twins_are_weighed_by_what_the_shared_expert_reads(bench):
    """The features are those of the base with the shared expert in it."""
    fitted = fit(bench, "route_twin_merging", scale=0.5, classifier="ridge")
    rows = [task.test[0].prompt for task in bench.seen]
    prompts = [list(prompt.ids) for prompt in prompt_tokens(bench.tokenizer, rows)]
    with bench.answering(fitted) as model:
        with_shared = model.route(prompts)
    with bench.answering(replace(fitted, folded=())) as model:
        without = model.route(prompts)
    assert np.abs(with_shared.probabilities - without.probabilities).max() > 1e-3
    np.testing.assert_allclose(with_shared.weights, with_shared.probabilities, rtol=1e-5)


def test_a_router_of_prompts_chooses_as_the_oracle(bench):
    fitted = fit(bench, "route_prompt", rule="argmax", outside="ignore", features="text")
    oracle = Fitted(experts=bench.library.experts, decision=ByTask({name: {name: 1.0} for name in NAMES}))
    for task in bench.seen:
        found = [score.log_prob for score in bench.score(fitted, task, task.test)]
        expected = [score.log_prob for score in bench.score(oracle, task, task.test)]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert fitted.facts["accuracy"] == 1


@pytest.mark.parametrize("parameters", [{"features": "hidden_mean"}, {"features": "perplexity", "rule": "posterior"}])
def test_a_router_may_read_other_features(bench, parameters):
    fitted = fit(bench, "route_prompt", classifier="ridge", max_prompts=12, **parameters)
    assert fitted.decision.record.layer == (1 if parameters["features"] == "hidden_mean" else None)
    scores = bench.score(fitted, bench.seen[0], bench.seen[0].test[:3])
    assert np.isfinite([score.log_prob for score in scores]).all()


def test_a_layer_that_nothing_reads_is_refused(bench):
    with pytest.raises(RecipeError, match="features text have no layer"):
        fit(bench, "route_prompt", features="text", layer=1)


def test_the_mediator_gives_what_it_does_not_know_to_all_alike(bench):
    fitted = fit(bench, "mediator", features="text")
    held_out = next(task for task in bench.tasks if task.is_held_out)
    prompts = [list(p.ids) for p in prompt_tokens(bench.tokenizer, [row.prompt for row in held_out.test])]
    with bench.answering(fitted) as model:
        routing = model.route(prompts)
    assert routing.is_outside.any()
    np.testing.assert_allclose(routing.weights[routing.is_outside], 0.25)


def test_all_experts_alike_are_a_rule_for_what_is_outside():
    probabilities, outside = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([True, False])
    policy = PolicyRecord(rule="argmax", outside="uniform")
    assert mix(probabilities, outside, policy, ("a", "b")).tolist() == [[0.5, 0.5], [1.0, 0.0]]


def with_rows(bench, n):
    tasks = tuple(replace(task, train=(), valid=task.valid[:n]) for task in bench.tasks)
    return replace(bench, tasks=tasks, found={})


def test_few_rows_are_enough_for_averages_and_refused_for_routers(bench):
    few = with_rows(bench, 5)
    assert isinstance(fit(few, "route_average_activation").decision, Gates)
    with pytest.raises(BundleError, match="alpha has 5 usable prompts of its own, a router needs 8"):
        fit(few, "route_prompt")


def test_tasks_with_the_same_prompts_are_refused_by_routers_of_prompts(bench):
    rows = toy_rows("alpha", 20)
    alike = replace(bench, tasks=tuple(replace(task, train=(), valid=rows) for task in bench.seen), found={})
    with pytest.raises(BundleError, match="alpha and beta share 20 of 20 prompts"):
        fit(alike, "mediator")
    gates = fit(alike, "route_average_activation").decision
    assert not any(gate.directions.any() for gate in gates.by_name.values())


@pytest.mark.parametrize("name", ["route_prompt", "route_average_activation", "route_twin_merging"])
def test_experts_without_rows_are_named(bench, name):
    tasks = tuple(task for task in bench.tasks if task.name not in ("beta", "delta"))
    with pytest.raises(RecipeError) as caught:
        fit(replace(bench, tasks=tasks, found={}), name)
    assert [problem.place for problem in caught.value.problems] == ["beta", "delta"]


@pytest.mark.parametrize("name", ["route_arrow", "route_smile", "route_average_activation"])
def test_a_single_expert_always_answers(bench, name):
    alone = replace(bench, library=bench.library.subset(["gamma"]), found={})
    oracle = Fitted(experts=alone.library.experts, decision=ByTask({"gamma": {"gamma": 1.0}}))
    task = next(task for task in bench.seen if task.name == "gamma")
    found, expected = (
        [score.log_prob for score in bench.score(fitted, task, task.test)] for fitted in (fit(alone, name), oracle)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_duplicated_experts_share_what_they_get(bench):
    """Two of the same weigh the same, and what they answer together is what one would."""
    own = bench.library.experts["beta"]
    library = Library(bench.library.base, {"beta": own, "again": own}, tensor_shapes())
    gates = fit(replace(bench, library=library, found={}), "route_arrow").decision
    for gate in gates.by_name.values():
        assert torch.equal(gate.directions[0], gate.directions[1])


def test_fits_are_the_same_every_time(bench, tmp_path):
    again = open_bench(bench.library, bench.tasks)
    for name in ("route_arrow", "route_average_activation", "route_smile"):
        one, other = (fit(each, name).decision.by_name for each in (bench, again))
        assert all(torch.equal(gate.directions, other[key].directions) for key, gate in one.items())
