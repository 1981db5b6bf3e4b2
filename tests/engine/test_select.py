"""The exact k-th largest magnitude, by a sample and counting: against sorting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine import select as module
from mediator_cli.engine.select import Ranked, select, select_signed
from mediator_cli.engine.streams import Inputs, Piece
from mediator_cli.engine.sweep import carry_out

special = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1.0, -1.0, 1.0000001, 65504.0]
numbers = st.one_of(st.sampled_from(special), st.floats(width=32, allow_nan=False, allow_infinity=False))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 60))
rows = st.one_of(
    hnp.arrays(np.float32, shapes, elements=numbers),
    hnp.arrays(np.int8, shapes, elements=st.integers(-2, 2)).map(lambda array: array.astype(np.float32)),
    hnp.arrays(np.float32, shapes, elements=numbers, fill=st.just(np.float32(0))),
)


def cut_rows(data, cut):
    """Stream rows [n, m] in pieces of `cut` entries; count how often each entry is read in passes over all."""
    size = data.shape[1]
    parts = [Piece("t", start, min(start + cut, size)) for start in range(0, size, cut)]
    return Ranked(lambda piece: Inputs(data[:, piece.start : piece.stop], None), parts, lambda _, i: i.rows, len(data))


def find(data, ranks, cut=None, workers=1):
    """Select several ranks of each row."""
    data = np.ascontiguousarray(data, np.float32)
    return carry_out(select(cut_rows(data, cut or data.shape[1]), ranks), workers, lambda n: None)


def find_one(data, ks, cut=None, workers=1):
    return [found for (found,) in find(data, [[k] for k in ks], cut, workers)]


def assert_exact(data, ranks, found):
    for row, ks, thresholds in zip(np.abs(data), ranks, found, strict=True):
        ordered = np.sort(row)[::-1]
        for k, threshold in zip(ks, thresholds, strict=True):
            exact = ordered[k - 1]
            assert threshold.value == exact
            assert threshold.n_above == np.count_nonzero(row > exact)
            assert threshold.n_equal == np.count_nonzero(row == exact)


@settings(max_examples=60)
@given(rows, st.data())
def test_selection_equals_sorting(data, draw):
    n, m = data.shape
    ranks = [draw.draw(st.lists(st.integers(1, m), min_size=1, max_size=4)) for _ in range(n)]
    assert_exact(data, ranks, find(data, ranks, draw.draw(st.integers(-(-m // 3), m))))


@pytest.mark.parametrize("table", [1 << 4, 1 << 18])
@pytest.mark.parametrize("sigmas", [3.0, 0.0])
@settings(max_examples=60)
@given(rows, st.data())
def test_selection_by_a_sample_that_leads_astray_equals_sorting(sigmas, table, data, draw):
    n, m = data.shape
    ranks = [draw.draw(st.lists(st.integers(1, m), min_size=1, max_size=4)) for _ in range(n)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_SAMPLE", 4)
        patched.setattr(module, "_RUN", 2)
        patched.setattr(module, "_SIGMAS", sigmas)
        patched.setattr(module, "_EXACT", table)
        patched.setattr(module, "_SHARED", table)
        assert_exact(data, ranks, find(data, ranks, draw.draw(st.integers(-(-m // 5), m))))


@settings(max_examples=40)
@given(hnp.arrays(np.int8, 50, elements=st.integers(-3, 3)), st.integers(1, 50))
def test_ties_are_counted(data, k):
    row = data.astype(np.float32)
    (threshold,) = find_one(row[None], [k], 20)
    assert threshold.value == np.sort(np.abs(row))[50 - k]
    assert threshold.n_above < k <= threshold.n_above + threshold.n_equal


def test_denormals_are_told_apart():
    tiny = np.array([[1e-45, 3e-45, 4e-45, 0.0]], np.float32)
    assert [find_one(tiny, [k])[0].value for k in (1, 2, 3, 4)] == tiny[0, [2, 1, 0, 3]].tolist()


def test_neighbours_in_the_last_bit_are_told_apart():
    one = np.float32(1)
    data = np.array([[one, np.nextafter(one, np.float32(2)), np.nextafter(one, np.float32(0))]])
    assert [find_one(data, [k])[0].value for k in (1, 2, 3)] == np.sort(data[0])[::-1].tolist()


def test_k_zero_and_k_beyond_the_stream():
    data = np.array([[1.0, -3.0, 2.0]], np.float32)
    none, (beyond,) = find_one(data, [0])[0], find_one(data, [4])
    assert (none.value, none.n_above) == (float("inf"), 0)
    assert (beyond.value, beyond.n_above) == (0.0, 3)


@pytest.mark.parametrize("cut", [999, 65536, 100_000])
def test_pieces_and_threads_change_nothing(cut):
    data = np.random.default_rng(0).standard_normal((2, 9000 if cut < 1000 else 150_000), np.float32)
    threaded = find_one(data, [7, 4000], cut, workers=3)
    assert threaded == find_one(data, [7, 4000])
    assert_exact(data, [[7], [4000]], [[each] for each in threaded])


@pytest.mark.parametrize("ranks", [[1], [5, 1, 9], [3, 1, 200, 77, 500, 42, 6, 6, 41]])
def test_several_ranks_are_found_as_one_by_one(ranks):
    data = np.random.default_rng(1).standard_normal((2, 3000)).round(1).astype(np.float32)
    wanted = [ranks, ranks[::-1]]
    assert_exact(data, wanted, find(data, wanted, 700))


@pytest.mark.parametrize("kind", ["normal", "few values", "mostly zero", "rising", "one large at the end"])
def test_streams_larger_than_the_sample(kind):
    size = 6 * BLOCK + 123
    rng = np.random.default_rng(2)
    data = {
        "normal": lambda: rng.standard_normal(size),
        "few values": lambda: rng.integers(-3, 4, size),
        "mostly zero": lambda: np.where(rng.random(size) < 0.01, rng.standard_normal(size), 0),
        "rising": lambda: np.arange(size) * 1e-5,
        "one large at the end": lambda: np.where(np.arange(size) == size - 1, 7.0, 1e-3),
    }[kind]()
    data = np.stack([data, -data[::-1]]).astype(np.float32)
    ranks = [1, 2, size // 100, size // 3, size - 1, size]
    assert_exact(data, [ranks, ranks], find(data, [ranks, ranks], 2 * BLOCK, workers=2))


def test_a_sample_that_does_not_mislead_needs_one_pass():
    data = np.random.default_rng(3).standard_normal((1, 8 * BLOCK)).astype(np.float32)
    read = []
    stream = cut_rows(data, BLOCK)
    counted = Ranked(lambda piece: read.append(piece) or stream.source(piece), stream.parts, stream.of, 1)
    carry_out(select(counted, [[data.size // 5]]), 1, lambda n: None)
    assert sorted(piece.start for piece in read if piece.size == BLOCK) == [piece.start for piece in stream.parts]
    assert sum(piece.size for piece in read if piece.size < BLOCK) <= module._SAMPLE


@settings(max_examples=60)
@given(rows, st.data())
def test_selection_of_signed_values_equals_sorting(data, draw):
    n, m = data.shape
    ranks = [draw.draw(st.lists(st.integers(1, m), min_size=1, max_size=4))] * n
    found = carry_out(select_signed(cut_rows(data, draw.draw(st.integers(-(-m // 3), m))), ranks), 1, lambda n: None)
    for row, ks, thresholds in zip(data, ranks, found, strict=True):
        for k, threshold in zip(ks, thresholds, strict=True):
            exact = np.sort(row)[::-1][k - 1]
            assert threshold.value == exact
            assert threshold.n_above == np.count_nonzero(row > exact)
            assert threshold.n_equal == np.count_nonzero(row == exact)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9999])
def test_signed_values_larger_than_the_sample(share):
    data = np.random.default_rng(0).standard_normal((2, 5 * BLOCK), np.float32)
    k = 1 + int(share * 5 * BLOCK)
    found = carry_out(select_signed(cut_rows(data, BLOCK), [[k]] * 2), 2, lambda n: None)
    assert [row[0].value for row in found] == np.sort(data)[:, -k].tolist()
