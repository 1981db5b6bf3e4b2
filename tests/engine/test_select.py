"""The exact k-th largest magnitude, by counting bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mediator_cli.engine.pool import map_ordered
from mediator_cli.engine.select import count_lower, count_upper, select_magnitudes
from mediator_cli.engine.streams import Piece

special = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1.0, -1.0, 1.0000001, 65504.0]
numbers = st.one_of(st.sampled_from(special), st.floats(width=32, allow_nan=False, allow_infinity=False))
rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 60)), elements=numbers).map(torch.from_numpy)


def select(data, ks, cut=None, mapper=map):
    """Select from rows [n, m] streamed in pieces of `cut` entries."""
    cut = cut or data.shape[1]
    parts = [Piece("t", start, min(start + cut, data.shape[1])) for start in range(0, data.shape[1], cut)]
    return select_magnitudes(parts, lambda piece: data[:, piece.start : piece.stop], ks, mapper)


@settings(max_examples=40)
@given(rows, st.data())
def test_selection_equals_sorting(data, draw):
    n, m = data.shape
    ks = draw.draw(st.lists(st.integers(1, m), min_size=n, max_size=n))
    found = select(data, ks, draw.draw(st.integers(-(-m // 3), m)))
    for row, k, threshold in zip(data.abs(), ks, found, strict=True):
        exact = row.sort(descending=True).values[k - 1]
        assert threshold.value == exact.item()
        assert threshold.n_above == int((row > exact).sum())
        assert threshold.bound >= row.max().item()


@settings(max_examples=40)
@given(hnp.arrays(np.int8, 50, elements=st.integers(-3, 3)), st.integers(1, 50))
def test_ties_are_counted(data, k):
    row = torch.from_numpy(data).float()
    (threshold,) = select(row[None], [k], 20)
    assert threshold.value == row.abs().kthvalue(50 - k + 1).values.item()
    assert threshold.n_above < k <= threshold.n_above + int((row.abs() == threshold.value).sum())


def test_denormals_are_told_apart():
    tiny = torch.tensor([[1e-45, 3e-45, 4e-45, 0.0]])
    assert [select(tiny, [k])[0].value for k in (1, 2, 3, 4)] == tiny[0, [2, 1, 0, 3]].tolist()


def test_neighbours_in_the_last_bit_are_told_apart():
    one = torch.tensor(1.0)
    data = torch.stack([one, one.nextafter(torch.tensor(2.0)), one.nextafter(torch.tensor(0.0))])[None]
    assert [select(data, [k])[0].value for k in (1, 2, 3)] == data[0].sort(descending=True).values.tolist()


def test_k_zero_and_k_beyond_the_stream():
    data = torch.tensor([[1.0, -3.0, 2.0]])
    none, (beyond,) = select(data, [0])[0], select(data, [4])
    assert (none.value, none.n_above) == (float("inf"), 0)
    assert (beyond.value, beyond.n_above) == (0.0, 3)


def test_the_bound_is_close_to_the_largest():
    data = torch.tensor([[0.25, -300.0, 2.0]])
    assert 300.0 <= select(data, [1])[0].bound < 300.0 * (1 + 2**-6)


@pytest.mark.parametrize("cut", [999, 65536, 100_000])
def test_pieces_and_threads_change_nothing(cut):
    data = torch.randn(2, 9000 if cut < 1000 else 150_000, generator=torch.Generator().manual_seed(0))
    threaded = select(data, [7, 4000], cut, lambda function, parts: map_ordered(function, parts, 3))
    assert threaded == select(data, [7, 4000])
    for row, k, threshold in zip(data.abs(), (7, 4000), threaded, strict=True):
        assert threshold.value == row.topk(k).values[-1].item()


def test_counts_are_of_the_bits():
    # 1.0 is 0x3f800000, -1.5 is 0xbfc00000, the smallest denormal 0x00000001.
    data = torch.tensor([[1.0, -1.5, 1e-45, -1.0]])
    upper = count_upper(data)
    assert {int(n): int(upper[0, n]) for n in torch.nonzero(upper[0])} == {0x3F80: 2, 0x3FC0: 1, 0: 1}
    lower = count_lower(data, [0])
    assert {int(n): int(lower[0, n]) for n in torch.nonzero(lower[0])} == {1: 1}
