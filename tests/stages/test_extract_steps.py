"""Which entries a sparse expert keeps, and with which scale it stores them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mediator_cli import read_bundle
from mediator_cli.bundle.sparse import decode_values, encode_values
from mediator_cli.engine.select import select_magnitudes
from mediator_cli.engine.streams import Piece, uniform_slab
from mediator_cli.stages.extract import (
    keep_largest,
    keep_random,
    kept_count,
    scale_candidates,
    scale_errors,
    sign_sums,
    step_sums,
)


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [(0.1, 100, 10), (0.1, 104, 10), (0.1, 106, 11), (0.001, 10, 1), (1.0, 7, 7), (0.5, 1, 1), (0.3, 0, 0)],
)
def test_the_kept_count_is_the_nearest_whole_number(density, size, count):
    assert kept_count(density, size) == count


@settings(max_examples=60)
@given(hnp.arrays(np.int8, 40, elements=st.integers(-3, 3)), st.integers(1, 40))
def test_exactly_the_count_is_kept_with_ties(data, count):
    delta = torch.from_numpy(data).float()
    (threshold,) = select_magnitudes([Piece("t", 0, 40)], lambda piece: delta[None], [count], map)
    mask = keep_largest(delta, threshold.value, count - threshold.n_above)
    n_nonzero = int((delta != 0).sum())
    assert int(mask.sum()) == min(count, n_nonzero)
    dropped, kept = delta[~mask].abs(), delta[mask].abs()
    assert not len(dropped) or not len(kept) or dropped.max() <= kept.min()


def test_the_first_of_equal_entries_are_kept():
    delta = torch.tensor([2.0, -3.0, -2.0, 2.0, 1.0])
    assert keep_largest(delta, 2.0, 2).tolist() == [True, True, True, False, False]
    assert keep_largest(delta, 2.0, 0).tolist() == [False, True, False, False, False]


def test_zeros_are_never_kept():
    assert keep_largest(torch.tensor([0.0, -0.0, 1.0]), 0.0, 3).tolist() == [False, False, True]
    assert keep_random(torch.tensor([0.0, 1.0]), torch.zeros(2), 0.5).tolist() == [False, True]


def test_random_entries_are_kept_below_the_density():
    uniforms = torch.tensor([0.0, 0.29, 0.3, 0.9])
    assert keep_random(torch.ones(4), uniforms, 0.3).tolist() == [True, True, False, False]


def merged(workshop, extract, **fields):
    """Merge with everything routed; the bundle and each expert's delta from the dense tensor."""
    extract = {"rescale": 1.0, **extract}
    out = workshop.merge(assign={"rule": "all"}, extract=extract, output={"dtype": "float32"}, **fields)
    bundle = read_bundle(out)
    deltas = {
        expert: {name: (tensor.float() - bundle.dense(name)).flatten() for name, tensor in tensors.items()}
        for expert, tensors in workshop.experts.items()
    }
    return bundle, deltas


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_the_largest_entries_are_kept_in_every_tensor(workshop, density):
    bundle, deltas = merged(workshop, {"density": density, "values": "fp32"})
    for expert, tensors in deltas.items():
        for name, delta in tensors.items():
            sparse = bundle.experts[expert].read(name)
            count = min(max(1, round(density * len(delta))), int((delta != 0).sum()))
            largest = delta.abs().topk(count).values
            assert sparse.values.abs().sort(descending=True).values.tolist() == largest.tolist()
            assert torch.equal(sparse.values, delta[sparse.positions])


def test_random_entries_are_those_of_the_seed_and_rescaled(workshop):
    bundle, deltas = merged(workshop, {"density": 0.25, "select": "random", "values": "fp32", "rescale": True}, seed=11)
    for expert, tensors in deltas.items():
        for name, delta in tensors.items():
            mask = (uniform_slab(11, expert, Piece(name, 0, len(delta))) < 0.25) & (delta != 0)
            sparse = bundle.experts[expert].read(name)
            assert torch.equal(sparse.positions, torch.nonzero(mask).flatten())
            assert torch.equal(sparse.values, delta[mask] * 4.0)


@pytest.mark.parametrize(
    ("select", "rescale", "factor"), [("magnitude", True, 4.0), ("random", False, 1.0), ("magnitude", 2.5, 2.5)]
)
def test_rescale_is_a_choice(workshop, select, rescale, factor):
    extract = {"density": 0.25, "select": select, "rescale": rescale, "values": "fp32"}
    bundle, deltas = merged(workshop, extract)
    sparse = bundle.experts["a"].read("model.embed_tokens.weight")
    assert len(sparse.positions) > 10
    assert torch.equal(sparse.values, deltas["a"]["model.embed_tokens.weight"][sparse.positions] * factor)


values = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-4, 4, width=32)).map(torch.from_numpy)


@settings(max_examples=100)
@given(values.filter(lambda v: v.abs().max() > 1e-3))
def test_scale_errors_are_those_of_the_codec(data):
    scales = scale_candidates(data.abs().max().item())
    errors = scale_errors(data, scales).tolist()
    for scale, error in zip(scales.tolist(), errors, strict=True):
        decoded = decode_values(encode_values(data, "int8", scale), "int8", scale).double()
        assert (decoded - data.double()).square().sum().item() == pytest.approx(error, rel=1e-3, abs=1e-9)


def test_candidates_start_with_the_whole_range():
    scales = scale_candidates(127.0)
    assert scales[0] == 1.0
    assert (scales.diff() < 0).all()
    assert scales[-1] == pytest.approx(0.1)


def int8_error(kept, scale):
    return np.square(np.clip(np.round(kept / scale), -127, 127) * scale - kept).sum()


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_the_int8_scale_is_better_than_every_candidate(workshop, density):
    bundle, deltas = merged(workshop, {"density": density, "values": "int8"})
    for name, delta in deltas["b"].items():
        spec, sparse = bundle.experts["b"].tensors[name], bundle.experts["b"].read(name)
        kept = delta[sparse.positions].double().numpy()
        # The bound is the top of the bucket of 2**16 neighbours that holds the largest magnitude.
        bits = int(delta.abs().max().view(torch.int32)) | 0xFFFF
        bound = float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))
        best = min(int8_error(kept, scale) for scale in scale_candidates(bound).tolist())
        assert int8_error(kept, spec.scale) <= best * (1 + 1e-9)
        assert spec.scale not in scale_candidates(bound).tolist()


@settings(max_examples=100)
@given(values.filter(lambda v: v.abs().max() > 1e-3), st.floats(0.3, 1.2))
def test_refining_an_int8_scale_never_makes_it_worse(data, clip):
    scale = clip * data.abs().max().item() / 127
    inner, norm = step_sums(data, scale).tolist()
    kept = data.double().numpy()
    assert int8_error(kept, inner / norm) <= int8_error(kept, scale) * (1 + 1e-9) + 1e-18


def test_outliers_are_clipped_where_that_loses_less():
    data = torch.cat([torch.linspace(-1, 1, 10_001), torch.tensor([1.3])])
    scales = scale_candidates(1.3)
    best = float(scales[scale_errors(data, scales).argmin()])
    assert best < 1.3 / 127


@settings(max_examples=100)
@given(values.filter(lambda v: bool((v != 0).all())), st.floats(0.5, 1.5))
def test_the_sign_scale_has_the_least_squared_error(data, factor):
    total, count = sign_sums(data).tolist()
    best, wide = total / count, data.double()
    error = (wide.sign() * best - wide).square().sum()
    assert error <= (wide.sign() * best * factor - wide).square().sum() + 1e-9


def test_the_sign_scale_is_the_mean_magnitude_of_what_is_kept(workshop):
    bundle, deltas = merged(workshop, {"density": 0.2, "values": "sign"})
    for name, delta in deltas["a"].items():
        spec, sparse = bundle.experts["a"].tensors[name], bundle.experts["a"].read(name)
        kept = delta[sparse.positions].double()
        assert spec.scale == pytest.approx(kept.abs().mean().item(), rel=1e-12)
        assert torch.equal(sparse.values, kept.sign().float() * torch.tensor(spec.scale).float())


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "sign"])
def test_the_energy_in_the_manifest_is_that_of_what_is_stored(workshop, codec):
    bundle, deltas = merged(workshop, {"density": 0.3, "values": codec})
    record = {sparse.expert: sparse for sparse in bundle.manifest.sparse}["a"]
    unit = "model.layers.1"
    names = [name for name in deltas["a"] if name.startswith(unit)]
    energy = sum(deltas["a"][name].double().square().sum() for name in names)
    error = 0.0
    for name in names:
        rest, sparse = deltas["a"][name].double(), bundle.experts["a"].read(name)
        rest[sparse.positions] -= sparse.values.double()
        error += rest.square().sum()
    assert record.units[unit].energy == pytest.approx(float(1 - error / energy), abs=2e-6)
    assert record.units[unit].n_kept == sum(len(bundle.experts["a"].read(name).positions) for name in names)


@pytest.mark.parametrize(("density", "factor"), [(1.0, 1.0), (0.25, 0.25**-0.4)])
def test_the_largest_entries_are_amplified_unless_told(workshop, density, factor):
    bundle, deltas = merged(workshop, {"density": density, "values": "fp32", "rescale": None})
    sparse = bundle.experts["a"].read("model.embed_tokens.weight")
    expected = deltas["a"]["model.embed_tokens.weight"][sparse.positions] * factor
    torch.testing.assert_close(sparse.values, expected, rtol=1e-6, atol=0)


def test_the_energy_kept_is_told_before_amplifying(workshop):
    energies = {}
    for rescale in (1.0, 4.0):
        folder = workshop.merge(f"out{rescale}", assign={"rule": "all"}, extract={"rescale": rescale, "values": "fp32"})
        (units,) = [s.units for s in read_bundle(folder).manifest.sparse if s.expert == "a"]
        energies[rescale] = [unit.energy for unit in units.values()]
    assert energies[1.0] == pytest.approx(energies[4.0], abs=1e-5)
    assert all(0 < energy < 1 for energy in energies[1.0])
