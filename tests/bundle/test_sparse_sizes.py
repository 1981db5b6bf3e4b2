"""The bound of a sparse expert's bytes: never too small, and tight where it is used."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.bundle.sparse import (
    aligned,
    encode_gaps,
    encode_values,
    index_codec,
    most_bytes,
    most_override_bytes,
    pack_bits,
)
from mediator_cli.bundle.sparse_file import HEADER_BYTES, entry_bytes, reserve_bytes

CODECS = ["fp32", "bf16", "fp16", "int8", "sign"]


def written(positions, size, values, index):
    """Count the bytes of the arrays that these positions are written as."""
    stored = encode_values(np.ones(len(positions), np.float32), values, 1.0)
    stored = pack_bits(stored) if values == "sign" else stored
    mask = np.zeros(size, np.bool_)
    mask[positions] = True
    where = pack_bits(mask) if index == "bitmap" else encode_gaps(positions, 0)
    return sum(aligned(array.nbytes) for array in (stored, where))


kept = st.integers(1, 3000).flatmap(
    lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1), max_size=min(size, 60)))
)


@given(kept, st.sampled_from(CODECS))
def test_no_choice_of_entries_takes_more_than_the_bound(drawn, values):
    size, chosen = drawn
    positions = np.array(sorted(chosen), np.int64)
    for index in ("gaps", "bitmap"):
        assert written(positions, size, values, index) <= most_bytes(size, len(positions), values, index)
    real = written(positions, size, values, index_codec(len(positions) / size))
    assert real <= most_bytes(size, len(positions), values, None)


@pytest.mark.parametrize("values", CODECS)
@pytest.mark.parametrize("n_kept", [1, 50, 255, 256, 1000])
def test_the_bound_is_reached_when_all_that_is_kept_stands_at_the_end(values, n_kept):
    size = 255 * 40 + 1000
    positions = np.arange(size - n_kept, size)
    assert written(positions, size, values, "gaps") == most_bytes(size, n_kept, values, "gaps")


@given(st.lists(kept, min_size=1, max_size=5), st.sampled_from(CODECS))
def test_bounds_of_shares_bound_the_sum(tensors, values):
    """Entries that all tensors keep together, shared out by size, bound what they take however they lie."""
    total, n = sum(size for size, _ in tensors), sum(len(chosen) for _, chosen in tensors)
    real = sum(written(np.array(sorted(c), np.int64), s, values, index_codec(len(c) / s)) for s, c in tensors)
    shares = [min(size, -(-n * size // total)) for size, _ in tensors]
    assert real <= sum(most_bytes(size, share, values, None) for (size, _), share in zip(tensors, shares, strict=True))


@pytest.mark.parametrize(
    ("density", "values", "slack"),
    [(0.05, "sign", 0.075), (0.1, "sign", 0.035), (0.05, "int8", 0.04), (0.05, "bf16", 0.03), (0.3, "sign", 0.001)],
)
def test_the_bound_is_tight_for_entries_without_a_pattern(density, values, slack):
    size = 400_000
    n_kept = int(density * size)
    positions = np.sort(np.random.default_rng(0).permutation(size)[:n_kept])
    index = index_codec(density)
    assert 1 <= most_bytes(size, n_kept, values, index) / written(positions, size, values, index) < 1 + slack


def test_overrides_take_a_position_and_a_value_each():
    for size in range(20):
        assert most_override_bytes(size, 2) == aligned(8 * size) + aligned(2 * size)


@given(st.lists(st.text("abc.é", max_size=40), max_size=6))
def test_headers_of_tensors_add_up(names):
    total = HEADER_BYTES + sum(entry_bytes(name) for name in names)
    assert total <= reserve_bytes(names) < total + 8
