"""The calibration passes against hooks on the whole model."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from tiny_mixtures import LAYERS, load, make_mixture, make_rows, run

from mediator_cli.errors import CheckpointError
from mediator_cli.moe.compress.collect import collect, collect_in_sequence
from mediator_cli.moe.compress.job import Job
from mediator_cli.moe.compress.statistics import LayerStatistics
from mediator_cli.moe.layerwise import open_layerwise

KINDS = {"mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {"mlp_only_layers": [0]}}


@pytest.fixture(scope="module", params=KINDS)
def mixture(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures") / request.param
    return make_mixture(folder, request.param, **KINDS[request.param])


def heard(folder, rows) -> dict[int, np.ndarray]:
    """What the gates of each layer read, all rows after each other, noted by hooks on the whole model."""
    model, states = load(folder), {}
    for layer in range(LAYERS):
        block = model.model.layers[layer].mlp
        if hasattr(block, "gate"):
            states[layer] = []
            block.gate.register_forward_pre_hook(lambda _, inputs, n=layer: states[n].append(inputs[0].view(-1, 16)))
    with torch.no_grad():
        for row in rows.prompts:
            model(torch.tensor([row]))
    return {layer: torch.cat(parts).double().numpy() for layer, parts in states.items()}


def naive(folder, layer, states) -> LayerStatistics:
    """Sum over tokens one by one, in float64, with the arithmetic of a gated block written out."""
    model = load(folder)
    block, config = model.model.layers[layer].mlp, model.config
    gates, gate_up, down = (
        w.detach().double().numpy() for w in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    )
    n, hidden = gates.shape
    square, wide = (n, n), (n, hidden)
    shapes = {"n_tokens": 1, "n_routed": n, "saliency_sum": n, "logit_products": square, "cosine_sum": square}
    sums = {name: np.zeros(shape) for name, shape in {**shapes, "output_sum": wide, "gated_output_sum": wide}.items()}
    for x in states:
        z = gates @ x
        p = np.exp(z) / np.exp(z).sum()
        said = []
        for e in range(n):
            gate, up = np.split(gate_up[e] @ x, 2)
            said.append(down[e] @ (gate / (1 + np.exp(-gate)) * up))
        chosen = np.argsort(-p)[: config.num_experts_per_tok]
        total = p[chosen].sum() if getattr(config, "norm_topk_prob", True) else 1.0
        sums["n_tokens"] += 1
        sums["logit_products"] += np.outer(z, z)
        for e in chosen:
            sums["n_routed"][e] += 1
            sums["saliency_sum"][e] += p[e] / total * np.linalg.norm(said[e])
        for e in range(n):
            sums["output_sum"][e] += said[e]
            sums["gated_output_sum"][e] += p[e] * said[e]
            for f in range(n):
                sums["cosine_sum"][e, f] += said[e] @ said[f] / np.linalg.norm(said[e]) / np.linalg.norm(said[f])
    return LayerStatistics(**sums)


def assert_alike(found: LayerStatistics, expected: LayerStatistics, names=None) -> None:
    for name, value in asdict(expected).items():
        if names is None or name in names:
            assert np.allclose(getattr(found, name), value, rtol=2e-5, atol=2e-5), name


def test_the_pass_equals_hooks_on_the_whole_model(mixture):
    rows = make_rows()
    done = []
    found = collect(open_layerwise(mixture), rows.prompts, done.append, every_token=True).statistics
    states = heard(mixture, rows)
    assert list(found) == list(states) == ([1] if "qwen3" in mixture.name else [0, 1])
    assert sum(done) == LAYERS
    for layer, read in states.items():
        assert_alike(found[layer], naive(mixture, layer, read))


def test_a_pass_over_routed_tokens_alone_gives_the_same_of_what_it_gives(mixture):
    rows, model = make_rows(), open_layerwise(mixture)
    all_, some = (collect(model, rows.prompts, lambda n: None, every_token=every).statistics for every in (True, False))
    for layer, found in all_.items():
        assert_alike(some[layer], found, ("n_tokens", "n_routed", "saliency_sum", "logit_products"))
        assert not some[layer].output_sum.any()


@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_ream_measures_each_layer_behind_the_compressed_ones(mixture, tmp_path):
    rows, target = make_rows(), tmp_path / "out"
    found = collect_in_sequence(open_layerwise(mixture), rows.prompts, lambda n: None, Job("ream", 3, align=True))
    run(mixture, target, "ream", rows, experts=3)
    states = heard(target, rows)
    for layer in range(LAYERS):
        assert_alike(found.statistics[layer], naive(mixture, layer, states[layer]))
    assert not np.allclose(states[1], heard(mixture, rows)[1], atol=1e-3)


def test_gates_and_states_that_are_not_finite_are_refused(tmp_path):
    from tiny_mixtures import edit

    folder = make_mixture(tmp_path / "m")
    edit(folder, lambda t: t["model.layers.1.block_sparse_moe.gate.weight"].__setitem__((0, 0), float("nan")))
    with pytest.raises(CheckpointError, match="layer 1: its gates hold NaN"):
        run(folder, tmp_path / "out", "reap", experts=3)
    edit(folder, lambda t: t["model.embed_tokens.weight"].fill_(float("inf")))
    with pytest.raises(CheckpointError, match="layer 0: the states that its gates read hold NaN"):
        run(folder, tmp_path / "out", "reap", experts=3)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
