"""Routers that are learned: what they begin with, their gradients, that they find the right expert."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_library import random_change, teach, tensor_shapes, tiny_bench
from torch.nn import functional

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.errors import RecipeError
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.runtime.open import load_dense
from mediator_cli.runtime.tokens import prompt_tokens
from mediator_cli.strategies._train import Schedule, _share, train
from mediator_cli.strategies.batches import answer_loss, make_batch, read_examples
from mediator_cli.strategies.fitting import run
from mediator_cli.strategies.library import Library, scaled, summed
from mediator_cli.strategies.registry import get_strategy
from mediator_cli.strategies.strategy import ByTask, Fitted

NAMES = ("alpha", "beta", "gamma")
ALL_OVER = 1
"""Expert 1 of the tiny library changes all of attention, 2 the MLP."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Three experts, each trained a little on its own task; all change the MLPs, one attention too."""
    made = tiny_bench(tmp_path_factory.mktemp("taught"), len(NAMES), 10, n_held_out=0)
    starts = [random_change(2, rank=3), random_change(6, rank=2), random_change(2, rank=4) | random_change(1, rank=2)]
    taught = {task.name: teach(made, start, task, 15) for task, start in zip(made.seen, starts, strict=True)}
    return replace(made, library=Library(made.library.base, taught, tensor_shapes()), found={})


def fit(bench, name, **parameters):
    return run(get_strategy(name, "test"), bench, parameters)


def oracle(bench):
    return Fitted(experts=bench.library.experts, decision=ByTask({name: {name: 1.0} for name in NAMES}))


def shares_of_own(bench, fitted):
    """How much gates give each task's own expert on new prompts, on average over places."""
    found = []
    with bench.answering(fitted) as model:
        for at, task in enumerate(bench.seen):
            prompts = [list(p.ids) for p in prompt_tokens(bench.tokenizer, [row.prompt for row in task.test])]
            found.append(model.route(prompts).weights[:, at].mean())
    return found


@pytest.mark.parametrize("name", ["route_smear", "route_sequence", "route_token"])
def test_gates_begin_alike_and_learn_to_tell_tasks_apart(bench, name):
    zeros = {"start": "zeros"} | ({} if name == "route_smear" else {"top_k": None})
    before = fit(bench, name, steps=0, **zeros)
    uniform = fit(bench, "merge_uniform")
    assert bench.loss(before) == pytest.approx(bench.loss(uniform), rel=1e-3)
    after = fit(bench, name, steps=35, rows=12, rate=0.06, **zeros)
    assert after.facts["last_loss"] < after.facts["first_loss"]
    gained = (bench.loss(before) - bench.loss(after)) / (bench.loss(before) - bench.loss(oracle(bench)))
    assert gained > (0.2 if name == "route_token" else 0.6)
    if name != "route_token":
        assert min(shares_of_own(bench, after)) > 0.45


def test_sequence_gates_may_begin_at_the_averages_of_prompts(bench):
    started = fit(bench, "route_sequence", steps=0)
    zeros = fit(bench, "route_sequence", steps=0, start="zeros", top_k=None)
    assert bench.loss(started) < bench.loss(zeros)
    learned = fit(bench, "route_sequence", steps=10, rows=12, rate=0.02)
    assert bench.loss(learned) < bench.loss(started)


def test_learning_is_the_same_every_time_and_goes_with_the_seed(bench):
    one, again, other = (
        fit(replace(bench, seed=seed, found={}), "route_smear", steps=3).decision.by_name for seed in (0, 0, 1)
    )
    assert all(torch.equal(gate.directions, again[name].directions) for name, gate in one.items())
    assert not all(torch.equal(gate.directions, other[name].directions) for name, gate in one.items())
    assert not any(gate.directions.requires_grad for gate in one.values())


def naive_gradients(bench, expert, batch):
    """Give the gradients of gates at zero, in a plain model that adds σ(v·x) times what the expert adds."""
    plain = load_dense(bench.library.base).requires_grad_(requires_grad=False)
    vectors = {}

    def hook_of(name, delta):
        vectors[name] = torch.zeros(delta.a.shape[1], requires_grad=True)
        matrix = delta.b @ delta.a

        def hook(_, args, output):
            return output + torch.sigmoid(args[0] @ vectors[name])[..., None] * (args[0] @ matrix.t())

        return hook

    for name, delta in bench.library.experts[expert].items():
        plain.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook_of(name, delta))
    positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
    logits = plain(input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions).logits
    kept = logits[:, -batch.targets.shape[1] :].flatten(0, 1)
    loss = functional.cross_entropy(kept, batch.targets.flatten(), ignore_index=-100, reduction="sum")
    (loss / len(batch.ids)).backward()
    return {name: vector.grad for name, vector in vectors.items()}


def test_gradients_of_an_experts_own_gate_are_those_of_a_plain_model(bench):
    task = bench.seen[0]
    batch = make_batch(read_examples(bench.model, bench.tokenizer, task.valid[:4]))
    vectors = {
        n: torch.zeros(1, 1, d.a.shape[1], requires_grad=True) for n, d in bench.library.experts["alpha"].items()
    }
    gates = Gates(
        "t", GateRule(weights="sigmoid"), ("alpha",), {n: Gate(v, torch.zeros(1)) for n, v in vectors.items()}
    )
    with bench.answering(Fitted(experts={"alpha": bench.library.experts["alpha"]}, decision=gates)) as model:
        answer_loss(model, batch).backward()
    for name, expected in naive_gradients(bench, "alpha", batch).items():
        torch.testing.assert_close(vectors[name].grad.flatten(), expected, rtol=1e-3, atol=1e-5)


def test_phatgoose_learns_each_gate_alone_and_lets_them_compete(bench):
    fitted = fit(bench, "route_phatgoose", steps=3, rows=4, rate=0.01)
    assert (fitted.decision.rule.reads, fitted.decision.rule.top_k) == ("normalised", 2)
    alone = replace(bench, library=bench.library.subset(["beta"]), found={})
    single = fit(alone, "route_phatgoose", steps=3, rows=4, rate=0.01).decision
    for name, gate in fitted.decision.by_name.items():
        for at, expert in enumerate(NAMES):
            own = gate.directions[at, 0]
            if name not in bench.library.experts[expert]:
                assert not own.any()
                continue
            # Layer-normed over √d: length 1 and mean 0.
            assert float(own.norm()) == pytest.approx(1, abs=1e-3)
            assert float(own.mean()) == pytest.approx(0, abs=1e-5)
        if name in single.by_name:
            torch.testing.assert_close(gate.directions[1], single.by_name[name].directions[0])
    assert set(fitted.facts) == set(NAMES)


def test_wemoe_begins_as_task_arithmetic(bench):
    start = fit(bench, "route_wemoe", scale=0.4, steps=0)
    merged = Fitted(folded=(summed([(change, 0.4) for change in bench.library.experts.values()]),))
    assert bench.loss(start) == pytest.approx(bench.loss(merged), rel=1e-3)
    assert bench.loss(fit(bench, "route_e_wemoe", scale=0.4, rank=9, steps=0)) == pytest.approx(
        bench.loss(merged), rel=1e-3
    )
    assert {name.split(".")[3] for change in start.experts.values() for name in change} == {"mlp"}
    assert {name.split(".")[3] for name in start.folded[0]} == {"self_attn"}
    learned = fit(bench, "route_wemoe", scale=0.4, steps=25, rows=12, rate=0.05)
    assert bench.loss(learned) < 0.8 * bench.loss(start)


def test_e_wemoe_has_one_gate_and_small_experts(bench):
    fitted = fit(bench, "route_e_wemoe", rank=1, steps=3, rate=0.01)
    first, *others = fitted.decision.by_name.values()
    assert others
    assert all(gate is first for gate in others)
    assert first.directions.any()
    assert {len(delta.a) for change in fitted.experts.values() for delta in change.values()} == {1}


def test_wemoe_without_mlps_is_refused(bench):
    attention = {name: random_change(1) for name in NAMES}
    bare = replace(bench, library=Library(bench.library.base, attention, tensor_shapes()), found={})
    with pytest.raises(RecipeError, match="no expert changes the MLP of any layer"):
        fit(bare, "route_wemoe")


@pytest.mark.parametrize("name", ["route_smear", "route_wemoe"])
def test_learning_without_rows_is_refused(bench, name):
    bare = replace(bench, tasks=tuple(replace(task, valid=()) for task in bench.tasks), found={})
    with pytest.raises(RecipeError, match="no validation rows"):
        fit(bare, name)


def test_the_rate_rises_and_falls():
    shares = [_share(step, 20) for step in range(20)]
    assert shares[:2] == [0.5, 1.0]
    assert shares[2] == 1.0
    assert shares[-1] == pytest.approx(1 / 18)
    assert all(one >= other for one, other in pairwise(shares[1:]))


def test_what_is_not_learned_stays(bench):
    """Experts, base and other gates are as before, bit for bit."""
    experts = {name: scaled(change, 1.0) for name, change in bench.library.experts.items()}
    base = {name: value.clone() for name, value in bench.model.state_dict().items()}
    gate = Gate(torch.zeros(3, 1, 16), torch.zeros(3, requires_grad=True))
    rule = GateRule(at="layer", per="sequence")
    gates = Gates("t", rule, NAMES, {f"model.layers.{n}": gate for n in range(2)})
    examples = read_examples(bench.model, bench.tokenizer, bench.seen[0].valid)
    losses = list(train(bench, Fitted(experts=experts, decision=gates), [gate.bias], examples, Schedule(3, 4, 0.1)))
    assert len(losses) == 3
    assert gate.bias.detach().abs().min() > 0
    assert not gate.directions.any()
    assert all(torch.equal(value, base[name]) for name, value in bench.model.state_dict().items())
    for name, change in experts.items():
        assert all(torch.equal(delta.b, bench.library.experts[name][n].b) for n, delta in change.items())
