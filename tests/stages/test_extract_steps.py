"""Which entries a sparse expert keeps, and with which scale it stores them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mediator_cli import read_bundle
from mediator_cli.bundle.sparse import decode_values, encode_values
from mediator_cli.engine.streams import Piece, draw
from mediator_cli.stages.extract import kept_count, scale_candidates, scale_errors, sign_sums, step_sums


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [(0.1, 100, 10), (0.1, 104, 10), (0.1, 106, 11), (0.001, 10, 1), (1.0, 7, 7), (0.5, 1, 1), (0.3, 0, 0)],
)
def test_the_kept_count_is_the_nearest_whole_number(density, size, count):
    assert kept_count(density, size) == count


def merged(workshop, extract, **fields):
    """Merge with everything routed; the bundle and each expert's delta from the dense tensor."""
    extract = {"rescale": 1.0, **extract}
    out = workshop.merge(assign={"rule": "all"}, extract=extract, output={"dtype": "float32"}, **fields)
    bundle = read_bundle(out)
    deltas = {
        expert: {name: (tensor.float() - bundle.dense(name)).flatten().numpy() for name, tensor in tensors.items()}
        for expert, tensors in workshop.experts.items()
    }
    return bundle, deltas


def stored(bundle, expert, name):
    """Positions and values of a tensor of a sparse expert."""
    sparse = bundle.experts[expert].read(name)
    return sparse.positions.numpy(), sparse.values.numpy()


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_the_largest_entries_are_kept_in_every_tensor(workshop, density):
    bundle, deltas = merged(workshop, {"density": density, "values": "fp32"})
    for expert, tensors in deltas.items():
        for name, delta in tensors.items():
            positions, values = stored(bundle, expert, name)
            count = min(max(1, round(density * len(delta))), np.count_nonzero(delta))
            largest = np.sort(np.abs(delta))[::-1][:count]
            assert np.sort(np.abs(values))[::-1].tolist() == largest.tolist()
            assert np.array_equal(values, delta[positions])


def test_random_entries_are_those_of_the_seed_and_rescaled(workshop):
    bundle, deltas = merged(workshop, {"density": 0.25, "select": "random", "values": "fp32", "rescale": True}, seed=11)
    for expert, tensors in deltas.items():
        for name, delta in tensors.items():
            draw(11, expert, Piece(name, 0, len(delta)), uniforms := np.empty(len(delta), np.float32))
            mask = (uniforms < 0.25) & (delta != 0)
            positions, values = stored(bundle, expert, name)
            assert np.array_equal(positions, np.flatnonzero(mask))
            assert np.array_equal(values, delta[mask] * 4.0)


@pytest.mark.parametrize(
    ("select", "rescale", "factor"), [("magnitude", True, 4.0), ("random", False, 1.0), ("magnitude", 2.5, 2.5)]
)
def test_rescale_is_a_choice(workshop, select, rescale, factor):
    extract = {"density": 0.25, "select": select, "rescale": rescale, "values": "fp32"}
    bundle, deltas = merged(workshop, extract)
    positions, values = stored(bundle, "a", "model.embed_tokens.weight")
    assert len(positions) > 10
    assert np.array_equal(values, deltas["a"]["model.embed_tokens.weight"][positions] * np.float32(factor))


drawn_values = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-4, 4, width=32))


@settings(max_examples=100)
@given(drawn_values.filter(lambda v: np.abs(v).max() > 1e-3))
def test_scale_errors_are_those_of_the_codec(data):
    scales = scale_candidates(float(np.abs(data).max()))
    errors = scale_errors(data, scales).tolist()
    for scale, error in zip(scales.tolist(), errors, strict=True):
        decoded = decode_values(encode_values(data, "int8", scale), "int8", scale).astype(np.float64)
        assert np.square(decoded - data).sum() == pytest.approx(error, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 5000])
def test_sums_over_values_are_those_of_numpy(size):
    data = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    wide, scale = data.astype(np.float64), 0.02
    steps = np.clip(np.rint(wide / scale), -127, 127)
    np.testing.assert_allclose(scale_errors(data, np.array([scale])), [np.square(steps * scale - wide).sum()])
    np.testing.assert_allclose(step_sums(data, scale), [(wide * steps).sum(), (steps**2).sum()], rtol=1e-12)
    np.testing.assert_allclose(sign_sums(data), [np.abs(wide).sum(), size], rtol=1e-12)


def test_candidates_start_with_the_whole_range():
    scales = scale_candidates(127.0)
    assert scales[0] == 1.0
    assert (np.diff(scales) < 0).all()
    assert scales[-1] == pytest.approx(0.1)


def int8_error(kept, scale):
    return np.square(np.clip(np.round(kept / scale), -127, 127) * scale - kept).sum()


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_the_int8_scale_is_better_than_every_candidate(workshop, density):
    bundle, deltas = merged(workshop, {"density": density, "values": "int8"})
    for name, delta in deltas["b"].items():
        spec = bundle.experts["b"].tensors[name]
        kept = delta[stored(bundle, "b", name)[0]].astype(np.float64)
        candidates = scale_candidates(np.abs(kept).max()).tolist()
        best = min(int8_error(kept, scale) for scale in candidates)
        assert int8_error(kept, spec.scale) <= best * (1 + 1e-9)
        assert spec.scale not in candidates


@settings(max_examples=100)
@given(drawn_values.filter(lambda v: np.abs(v).max() > 1e-3), st.floats(0.3, 1.2))
def test_refining_an_int8_scale_never_makes_it_worse(data, clip):
    scale = clip * float(np.abs(data).max()) / 127
    inner, norm = step_sums(data, scale).tolist()
    kept = data.astype(np.float64)
    assert int8_error(kept, inner / norm) <= int8_error(kept, scale) * (1 + 1e-9) + 1e-18


def test_outliers_are_clipped_where_that_loses_less():
    data = np.append(np.linspace(-1, 1, 10_001), 1.3).astype(np.float32)
    scales = scale_candidates(1.3)
    best = float(scales[scale_errors(data, scales).argmin()])
    assert best < 1.3 / 127


@settings(max_examples=100)
@given(drawn_values.filter(lambda v: bool((v != 0).all())), st.floats(0.5, 1.5))
def test_the_sign_scale_has_the_least_squared_error(data, factor):
    total, count = sign_sums(data).tolist()
    best, wide = total / count, data.astype(np.float64)
    error = np.square(np.sign(wide) * best - wide).sum()
    assert error <= np.square(np.sign(wide) * best * factor - wide).sum() + 1e-9


def test_the_sign_scale_is_the_mean_magnitude_of_what_is_kept(workshop):
    bundle, deltas = merged(workshop, {"density": 0.2, "values": "sign"})
    for name, delta in deltas["a"].items():
        spec = bundle.experts["a"].tensors[name]
        positions, values = stored(bundle, "a", name)
        kept = delta[positions].astype(np.float64)
        assert spec.scale == pytest.approx(np.abs(kept).mean(), rel=1e-12)
        assert np.array_equal(values, np.sign(kept).astype(np.float32) * np.float32(spec.scale))


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "sign"])
def test_the_energy_in_the_manifest_is_that_of_what_is_stored(workshop, codec):
    bundle, deltas = merged(workshop, {"density": 0.3, "values": codec})
    record = {sparse.expert: sparse for sparse in bundle.manifest.sparse}["a"]
    unit = "model.layers.1"
    names = [name for name in deltas["a"] if name.startswith(unit)]
    energy = sum(np.square(deltas["a"][name], dtype=np.float64).sum() for name in names)
    error = 0.0
    for name in names:
        rest, (positions, values) = deltas["a"][name].astype(np.float64), stored(bundle, "a", name)
        rest[positions] -= values
        error += np.square(rest).sum()
    assert record.units[unit].energy == pytest.approx(float(1 - error / energy), abs=2e-6)
    assert record.units[unit].n_kept == sum(len(stored(bundle, "a", name)[0]) for name in names)


@pytest.mark.parametrize(("density", "factor"), [(1.0, 1.0), (0.25, 0.25**-0.4)])
def test_the_largest_entries_are_amplified_unless_told(workshop, density, factor):
    bundle, deltas = merged(workshop, {"density": density, "values": "fp32", "rescale": None})
    positions, values = stored(bundle, "a", "model.embed_tokens.weight")
    expected = deltas["a"]["model.embed_tokens.weight"][positions] * factor
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_the_energy_kept_is_told_before_amplifying(workshop):
    energies = {}
    for rescale in (1.0, 4.0):
        folder = workshop.merge(f"out{rescale}", assign={"rule": "all"}, extract={"rescale": rescale, "values": "fp32"})
        (units,) = [s.units for s in read_bundle(folder).manifest.sparse if s.expert == "a"]
        energies[rescale] = [unit.energy for unit in units.values()]
    assert energies[1.0] == pytest.approx(energies[4.0], abs=1e-5)
    assert all(0 < energy < 1 for energy in energies[1.0])
