"""Gates: weights of experts that a model makes of its own hidden states, compared with plain loops over tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_library import LAYERS, random_change, tiny_bench

from mediator_cli.bundle.gates_record import GATES, GateRule
from mediator_cli.errors import BundleError
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.runtime.gates_file import read_gates, write_gates
from mediator_cli.runtime.gating import gate_places, gate_sizes, set_gates
from mediator_cli.runtime.held import give_experts
from mediator_cli.runtime.open import load_dense

NAMES = ("alpha", "beta", "gamma", "delta")
PROMPTS = ([1, 3, 7, 8, 4], [5, 6, 9, 12, 20, 33, 4], [30, 4])


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return tiny_bench(tmp_path_factory.mktemp("gates"), len(NAMES))


@pytest.fixture
def model(bench):
    give_experts(bench.model, bench.library.experts)
    yield bench.model
    give_experts(bench.model, {})


def make_gates(model, rule, k=1, seed=0, scale=1.0, places=None):
    torch.manual_seed(seed)
    sizes = places or (gate_sizes(model) if rule.at == "module" else gate_places(model))
    gates = {
        name: Gate(scale * torch.randn(len(NAMES), k, size), scale * torch.randn(len(NAMES)))
        for name, size in sizes.items()
    }
    return Gates("test", rule, NAMES, gates)


def padded(rows):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for at, row in enumerate(rows):
        ids[at, width - len(row) :], mask[at, width - len(row) :] = torch.tensor(row), 1
    return ids, mask


@torch.no_grad()
def logits_of(model, ids, mask, **more):
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **more).logits


def naive_weights(gate, rule, h):
    """Choose for one hidden state [in], expert by expert."""
    if rule.reads == "unit":
        h = h / h.norm().clamp(min=1e-12)
    if rule.reads == "normalised":
        h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
    scores = []
    for directions, bias in zip(gate.directions, gate.bias, strict=True):
        products = [float(d @ h) for d in directions]
        score = {"linear": products[0], "absolute": abs(products[0]), "length": sum(p * p for p in products) ** 0.5}
        scores.append((score[rule.score] + float(bias)) / rule.temperature)
    kept = sorted(range(len(scores)), key=lambda at: -scores[at])[: rule.top_k or len(scores)]
    found = torch.zeros(len(scores))
    values = torch.tensor([scores[at] for at in kept])
    found[kept] = {"softmax": values.softmax(0), "free": values, "sigmoid": values.sigmoid()}[rule.weights]
    return found


@dataclass
class Naive:
    """Hooks that make a plain model mix experts for one token after the other; `read` holds what layers chose."""

    gates: Gates
    experts: dict
    is_prompt: torch.Tensor
    read: dict = field(default_factory=dict)

    def choose(self, name, x):
        """Choose for states x [rows, tokens, in]; [rows, tokens, experts]."""
        gate, rule = self.gates.by_name[name], self.gates.rule
        if rule.per == "token":
            return torch.stack([torch.stack([naive_weights(gate, rule, token) for token in row]) for row in x])
        own = [naive_weights(gate, rule, row[kept].mean(0)) for row, kept in zip(x, self.is_prompt, strict=True)]
        return torch.stack(own)[:, None].expand(-1, x.shape[1], -1)

    def adds(self, name):
        """Make the hook of the matrix `name`."""
        deltas = [change.get(name) for change in self.experts.values()]

        def hook(_, args, output):
            weights = self.choose(name, args[0]) if self.gates.rule.at == "module" else self.above(name)
            for at, delta in enumerate(deltas):
                if delta is not None:
                    output = output + weights[..., at : at + 1] * (args[0] @ (delta.b @ delta.a).t())
            return output

        return hook

    def above(self, name):
        return next(weights for place, weights in self.read.items() if name.startswith(f"{place}."))

    def looks(self, place):
        """Make the hook before a layer."""

        def hook(_, args, kwargs):
            self.read[place] = self.choose(place, args[0] if args else kwargs["hidden_states"])

        return hook


@torch.no_grad()
def naive_logits(base, experts, gates, ids, mask, is_prompt):
    """Answer by a plain model whose linear layers add each token's own mixture."""
    plain, naive = load_dense(base), Naive(gates, experts, is_prompt)
    changed = {name for change in experts.values() for name in change}
    for path, module in plain.named_modules():
        if f"{path}.weight" in changed:
            module.register_forward_hook(naive.adds(f"{path}.weight"))
        if gates.rule.at == "layer" and path in gates.by_name:
            module.register_forward_pre_hook(naive.looks(path), with_kwargs=True)
    return logits_of(plain, ids, mask)


RULES = {
    "arrow": GateRule(score="absolute", top_k=2),
    "smile": GateRule(score="length", top_k=1),
    "phatgoose": GateRule(reads="normalised", top_k=2),
    "unit": GateRule(reads="unit", temperature=0.1),
    "alone": GateRule(weights="sigmoid"),
    "layer": GateRule(at="layer", reads="normalised", top_k=3),
    "sequence": GateRule(per="sequence"),
    "smear": GateRule(reads="normalised", at="layer", per="sequence"),
    "wemoe": GateRule(at="layer", per="sequence", weights="free"),
}


@pytest.mark.parametrize("name", RULES)
def test_gates_equal_a_loop_over_tokens(bench, model, name):
    rule = RULES[name]
    gates = make_gates(model, rule, k=3 if rule.score == "length" else 1, scale=0.5)
    ids, mask = padded(PROMPTS)
    is_prompt = mask.bool()
    is_prompt[0, -1] = is_prompt[1, -3:] = False
    set_gates(model, gates)
    with model.reading(is_prompt):
        found = logits_of(model, ids, mask)
    expected = naive_logits(bench.library.base, bench.library.experts, gates, ids, mask, is_prompt)
    # Padding is no token of anybody's.
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", ["module", "layer"])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_gates_without_preference_mix_all_experts_alike(model, at, per):
    ids, mask = padded(PROMPTS)
    with model.mixing(dict.fromkeys(NAMES, 0.25)):
        expected = logits_of(model, ids, mask)
    set_gates(model, make_gates(model, GateRule(at=at, per=per), scale=0.0))
    torch.testing.assert_close(logits_of(model, ids, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["arrow", "layer", "sequence", "smear"])
def test_generation_equals_one_pass_over_the_same_tokens(model, rule):
    set_gates(model, make_gates(model, RULES[rule], scale=0.7))
    ids, mask = padded(PROMPTS)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, output_logits=True, eos_token_id=None,
        return_dict_in_generate=True,
    )  # fmt: skip
    whole = torch.cat([mask, torch.ones(len(ids), 6, dtype=torch.int64)], dim=1)
    is_prompt = whole.bool()
    is_prompt[:, ids.shape[1] :] = False
    with model.reading(is_prompt):
        at_once = logits_of(model, made.sequences, whole)
    torch.testing.assert_close(torch.stack(made.logits, 1), at_once[:, ids.shape[1] - 1 : -1], rtol=1e-4, atol=1e-4)
    for at, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert alone[0, len(prompt) :].tolist() == made.sequences[at, ids.shape[1] :].tolist()


@pytest.mark.parametrize("how", [{"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}])
def test_padded_prompts_generate_as_alone_in_every_way(model, how):
    """Beams multiply rows; a static cache hides where padding is."""
    set_gates(model, make_gates(model, RULES["sequence"], scale=0.7))
    ids, mask = padded(PROMPTS)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None} | how
    made = model.generate(ids, attention_mask=mask, **settings)
    n = len(made) // len(PROMPTS)
    for at, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **settings)
        assert alone[:, len(prompt) :].tolist() == made[at * n : (at + 1) * n, ids.shape[1] :].tolist()


def test_sequences_of_two_calls_do_not_share_their_choice(model):
    set_gates(model, make_gates(model, RULES["sequence"], scale=2.0))
    first, second = ([logits_of(model, *padded([p])) for p in order] for order in (PROMPTS, PROMPTS[::-1]))
    for one, other in zip(first, second[::-1], strict=True):
        assert torch.equal(one, other)


def test_a_mixture_by_hand_comes_before_gates(model):
    ids, mask = padded(PROMPTS)
    with model.mixing("beta"):
        expected = logits_of(model, ids, mask)
    set_gates(model, make_gates(model, RULES["smear"]))
    gated = logits_of(model, ids, mask)
    with model.mixing("beta"):
        assert torch.equal(logits_of(model, ids, mask), expected)
    assert torch.equal(logits_of(model, ids, mask), gated)
    assert not torch.allclose(gated, expected)


def test_taking_gates_out_leaves_no_trace(model):
    ids, mask = padded(PROMPTS)
    with model.mixing("dense"):
        dense = logits_of(model, ids, mask)
    for rule in ("layer", "arrow"):
        set_gates(model, make_gates(model, RULES[rule]))
        assert not torch.allclose(logits_of(model, ids, mask), dense)
    set_gates(model, None)
    assert model.gating is None
    assert not any(mixer.choose or mixer.parts for mixer in model.opened.mixers)
    assert not any(model.get_submodule(path)._forward_pre_hooks for path in gate_places(model))
    with model.mixing("dense"):
        assert torch.equal(logits_of(model, ids, mask), dense)


def test_route_tells_what_gates_choose_on_average(model):
    gates = make_gates(model, GateRule(at="layer", per="sequence"), scale=0.0)
    for gate in gates.by_name.values():
        gate.bias[:] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    set_gates(model, gates)
    routing = model.route(PROMPTS)
    torch.testing.assert_close(torch.from_numpy(routing.weights), torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3))
    with pytest.raises(BundleError, match="prompt 2: is empty"):
        model.route([[3], []])


def test_places_are_layers_or_parts_of_them(model):
    assert gate_places(model) == {f"model.layers.{n}": 16 for n in range(LAYERS)}
    assert gate_places(model, ("mlp",)) == {f"model.layers.{n}.mlp": 16 for n in range(LAYERS)}
    assert gate_places(model, ("ffn",)) == {}


def test_gates_of_a_part_choose_for_it_alone(bench, model):
    """Experts that change MLPs alone need no gates elsewhere; one gate may stand at every layer."""
    inside = {
        name: {n: d for n, d in random_change(2, rank=2 + at).items() if ".mlp." in n} for at, name in enumerate(NAMES)
    }
    give_experts(model, inside)
    rule = GateRule(at="layer", per="sequence", weights="free")
    torch.manual_seed(0)
    shared = Gate(torch.randn(len(NAMES), 1, 16) * 0.3, torch.full((len(NAMES),), 0.5))
    gates = Gates("test", rule, NAMES, dict.fromkeys(gate_places(model, ("mlp",)), shared))
    set_gates(model, gates)
    ids, mask = padded(PROMPTS)
    found = logits_of(model, ids, mask)
    expected = naive_logits(bench.library.base, inside, gates, ids, mask, mask.bool())
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def break_gates(gates, model, how):
    by_name = dict(gates.by_name)
    name, gate = next(iter(by_name.items()))
    if how == "missing":
        del by_name[name]
    elif how == "unknown":
        by_name["model.layers.9.mlp.up_proj.weight"] = gate
    elif how == "width":
        by_name[name] = Gate(gate.directions[..., 1:], gate.bias)
    elif how == "directions":
        by_name[name] = Gate(gate.directions.expand(-1, 2, -1), gate.bias)
    elif how == "bias":
        by_name[name] = Gate(gate.directions, gate.bias[1:])
    names = gates.experts[::-1] if how == "order" else gates.experts
    return Gates(gates.method, gates.rule, names, by_name)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "has no gate"),
        ("unknown", "the model has nothing there that mixes"),
        ("width", "reads 15 numbers and chooses among 4, not 16 and 4"),
        ("directions", "has 2 directions for each expert, 1 for this score"),
        ("bias", "reads 16 numbers"),
        ("order", "choose among other experts"),
    ],
)
def test_gates_that_do_not_fit_are_refused(model, how, message):
    gates = make_gates(model, GateRule())
    with pytest.raises(BundleError, match=message):
        set_gates(model, break_gates(gates, model, how))
    assert model.gating is None
    assert not any(mixer.choose for mixer in model.opened.mixers)


def described(record, names=NAMES):
    return SimpleNamespace(gates=record, experts=[SimpleNamespace(name=name) for name in names])


def test_gates_are_read_as_they_were_written(model, tmp_path):
    gates = make_gates(model, RULES["smile"], k=2)
    record = write_gates(tmp_path, gates)
    again = read_gates(tmp_path, described(record))
    assert (again.method, again.rule, again.experts) == (gates.method, gates.rule, gates.experts)
    assert set(again.by_name) == set(gates.by_name)
    for name, gate in gates.by_name.items():
        assert torch.equal(again.by_name[name].directions, gate.directions)
        assert torch.equal(again.by_name[name].bias, gate.bias)
    ids, mask = padded(PROMPTS)
    set_gates(model, gates)
    before = logits_of(model, ids, mask)
    set_gates(model, again)
    assert torch.equal(logits_of(model, ids, mask), before)
    assert read_gates(tmp_path, described(None)) is None


def spoil(file, how):
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-8])
        return
    if how == "gone":
        file.unlink()
        return
    arrays = load_file(file)
    name = next(name for name in arrays if name.endswith(".directions"))
    header = {"format": "mediator.gates", "version": "2" if how == "newer" else "1"}
    if how == "missing":
        del arrays[name]
    elif how == "nan":
        arrays[name][0, 0, 0] = float("nan")
    elif how == "experts":
        arrays[name] = arrays[name][:3].contiguous()
    elif how == "dtype":
        arrays[name] = arrays[name].half()
    save_file(arrays, file, header)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "gates.safetensors"),
        ("gone", "gates.safetensors"),
        ("newer", "is not a file of gates that this version reads"),
        ("missing", "array is missing"),
        ("nan", "holds NaN or infinite values"),
        ("experts", "for 4 experts"),
        ("dtype", "for 4 experts"),
    ],
)
def test_damaged_files_of_gates_are_refused(model, tmp_path, how, message):
    record = write_gates(tmp_path, make_gates(model, GateRule()))
    spoil(tmp_path / GATES, how)
    with pytest.raises(BundleError, match=message):
        read_gates(tmp_path, described(record))


def test_gates_of_other_experts_are_refused(model, tmp_path):
    record = write_gates(tmp_path, make_gates(model, GateRule()))
    with pytest.raises(BundleError, match=r"gates\.experts"):
        read_gates(tmp_path, described(record, NAMES[::-1]))
