"""Methods on blocks, with the statistics that they declare found by plain numpy: what the engine has to do."""

from dataclasses import replace

import numpy as np
import pytest

from mediator_cli.methods.registry import methods, resolve_method
from mediator_cli.methods.statistics import Position, Select, Slab

METHODS = methods()
# Statistics of whole matrices are tested with the engine.
OF_ELEMENTS = {name: method for name, method in METHODS.items() if method.scope == "element"}
CASES = [(name, preset) for name, method in OF_ELEMENTS.items() for preset in (None, *method.presets)]
# Presets that drop, trim or select nothing would not show whether their statistics are right.
SOME = {"density": 0.5, "trim_density": 0.2, "select_topk": 0.5}
SOME_OF = {"ramplus_tl": {"epsilon": 0.01, "alpha": 10.0}}
PLACES = {s.name for method in METHODS.values() for s in method.statistics if isinstance(s, Position)}
ROW, BLOCK = 70, 1000
SIZE = 60 * ROW


def resolved(case):
    name, preset = case
    fields = METHODS[name].schema.model_fields
    given = {key: value for key, value in SOME.items() if key in fields} | SOME_OF.get(name, {})
    return resolve_method(name, preset, given, str)


each_case = pytest.mark.parametrize("case", CASES, ids=[f"{name}-{preset or 'defaults'}" for name, preset in CASES])


def whole(method, seed=0):
    """Three experts, or as many as the method takes, as one slab."""
    generator = np.random.default_rng(seed)
    n = min(3, method.method.n_inputs[1] or 3)
    inputs = generator.standard_normal((n, SIZE), np.float32) * np.float32(0.01)
    inputs[:, ::7] = 0
    uniforms = generator.random((n, SIZE), np.float32) if method.method.random else None
    return Slab(inputs, 0.2 + generator.random(n), method.params, {}, uniforms)


def blocks(slab, size=BLOCK):
    """Cut a slab, its uniform numbers and what its entries got from their rows."""
    for start in range(0, slab.inputs.shape[1], size):
        window = np.s_[:, start : start + size]
        statistics = {
            name: value[window] if value.shape == slab.inputs.shape else value
            for name, value in slab.statistics.items()
        }
        statistics |= {name: statistics[name] + [start, 0] for name in PLACES & set(statistics)}
        uniforms = None if slab.uniforms is None else slab.uniforms[window]
        yield replace(slab, inputs=slab.inputs[window], uniforms=uniforms, statistics=statistics)


def selected(statistic, slab):
    """Sort what is ranked."""
    n = int(slab.statistics[statistic.among][0]) if statistic.among else SIZE
    k = statistic.count(slab.params, n)
    ranked = np.concatenate([statistic.of(block) for block in blocks(slab)], axis=1)
    ordered = np.sort(ranked if statistic.signed else abs(ranked))
    assert ordered.shape == (1 if statistic.joint else len(slab.inputs), SIZE)
    limits = np.inf if k <= 0 else 0.0 if k >= SIZE + statistic.smallest else ordered[:, -k]
    return np.broadcast_to(np.float32(limits), len(ordered))


def summed(statistic, slab):
    found = [statistic.block(block) for block in blocks(slab)]
    for block in found:
        assert block.shape == statistic.shape(len(slab.inputs))
        assert block.dtype == np.float64
    return sum(found)


def found(statistic, slab):
    if isinstance(statistic, Position):
        return np.array([0, SIZE])
    return selected(statistic, slab) if isinstance(statistic, Select) else summed(statistic, slab)


def with_statistics(method, slab):
    slab = replace(slab, statistics=beside(method, slab))
    for statistic in method.needed_statistics():
        for _ in range(statistic.rounds(len(slab.inputs)) if isinstance(statistic, Select) else 1):
            value = found(statistic, slab)
            slab = replace(slab, statistics={**slab.statistics, statistic.name: value})
    return slab


def beside(method, slab):
    """What goes with the entries: what they get from their rows, and second moments."""
    moments = {"moments": slab.inputs**2} if method.method.needs_moments else {}
    return {**method.find_in_rows(slab.inputs, ROW), **moments}


def merged(method, slab, size):
    parts = [method(b.inputs, b.weights, b.statistics, b.uniforms) for b in blocks(slab, size)]
    return np.concatenate(parts)


@each_case
def test_blocks_with_statistics_give_what_one_call_gives(case):
    method = resolved(case)
    slab = whole(method)
    expected = method(slab.inputs, slab.weights, beside(method, slab), slab.uniforms)
    assert np.count_nonzero(expected) > SIZE / 20
    np.testing.assert_allclose(merged(method, with_statistics(method, slab), BLOCK), expected, rtol=1e-5, atol=1e-8)


@each_case
def test_slabs_change_no_bit(case):
    method = resolved(case)
    slab = with_statistics(method, whole(method))
    first = merged(method, slab, SIZE)
    for size in (1, 1000, 1023, 1025, 3000):
        assert np.array_equal(first.view(np.int32), merged(method, slab, size).view(np.int32))


@each_case
def test_statistics_matter(case):
    method = resolved(case)
    slab, other = whole(method), whole(method, seed=1)
    names = {s.name for s in (*method.needed_statistics(), *method.method.rows)} | {"moments"}
    found, foreign = with_statistics(method, slab), with_statistics(method, other)
    assert set(found.statistics) <= names
    if not found.statistics:
        return
    mixed = replace(found, statistics=foreign.statistics)
    assert not np.array_equal(merged(method, mixed, SIZE), merged(method, found, SIZE))


@each_case
def test_rows_are_ranked_by_themselves(case):
    method = resolved(case)
    slab = whole(method)
    found = method.find_in_rows(slab.inputs, ROW)
    assert bool(found) == method.needs_rows
    for name, value in found.items():
        assert value.shape == slab.inputs.shape
        last = method.find_in_rows(slab.inputs[:, -ROW:], ROW)[name]
        assert np.array_equal(value[:, -ROW:], last)
        has_own_rows = method.row_length(ROW) != ROW
        assert has_own_rows == np.array_equal(value, method.find_in_rows(slab.inputs, SIZE)[name])


@pytest.mark.parametrize("length", [1, 5])
@each_case
def test_tensors_without_entries_have_no_rows(case, length):
    method = resolved(case)
    empty = np.zeros((2, 0), np.float32)
    assert all(value.shape == (2, 0) for value in method.find_in_rows(empty, length).values())
