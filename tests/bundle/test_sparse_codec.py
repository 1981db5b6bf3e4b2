"""The sparse codec by itself: what is written is read back, and what is stored is the best that its type can do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mediator_cli.bundle.sparse import (
    aligned,
    decode_gaps,
    decode_values,
    encode_gaps,
    encode_values,
    index_codec,
    pack_bits,
    unpack_bits,
)

gaps = st.one_of(
    st.integers(0, 3), st.sampled_from([253, 254, 255, 256, 257, 509, 510, 511, 765]), st.integers(0, 3000)
)
positions = st.lists(gaps, max_size=40).map(
    lambda steps: np.array([sum(steps[: n + 1]) + n for n in range(len(steps))], np.int64)
)
finite = hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(-1e4, 1e4, width=32))


def same_bits(left, right):
    """Compare entry by entry, telling 0 from -0."""
    kind = f"u{left.itemsize}"
    return left.view(kind) == right.view(kind)


@given(positions)
def test_any_rising_positions_come_back(kept):
    assert decode_gaps(encode_gaps(kept, 0)).tolist() == kept.tolist()


@given(positions, st.lists(st.integers(0, 4000), max_size=5))
def test_encoding_in_several_slabs_equals_one(kept, cuts):
    whole, parts, start = encode_gaps(kept, 0), [], 0
    for low, high in zip([0, *sorted(cuts)], [*sorted(cuts), 10**9], strict=True):
        inside = kept[(kept >= low) & (kept < high)]
        if len(inside):
            parts.append(encode_gaps(inside, start))
            start = int(inside[-1]) + 1
    assert np.concatenate([np.empty(0, np.uint8), *parts]).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("first", "codes"),
    [(0, [0]), (1, [1]), (254, [254]), (255, [255, 0]), (256, [255, 1]), (509, [255, 254]), (510, [255, 255, 0])],
)
def test_escapes_stand_where_the_format_says(first, codes):
    assert encode_gaps(np.array([first]), 0).tolist() == codes
    assert decode_gaps(np.array(codes, np.uint8)).tolist() == [first]


def test_a_gap_counts_from_behind_the_last_position():
    assert encode_gaps(np.array([3, 4, 260]), 3).tolist() == [0, 0, 255, 0]


def test_all_positions_cost_a_zero_byte_each():
    assert encode_gaps(np.arange(1000), 0).tolist() == [0] * 1000


def test_nothing_kept_is_nothing_written():
    assert encode_gaps(np.empty(0, np.int64), 0).tolist() == []
    assert decode_gaps(np.empty(0, np.uint8)).tolist() == []


def test_escapes_at_the_end_keep_nothing():
    assert decode_gaps(np.array([2, 255, 255, 255], np.uint8)).tolist() == [2]


@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(bits):
    packed = pack_bits(np.array(bits, np.bool_))
    assert len(packed) == -(-len(bits) // 8)
    assert unpack_bits(packed, len(bits)).tolist() == bits


def test_the_first_entry_is_the_lowest_bit():
    assert pack_bits(np.array([True, False, False, True, False, False, False, False, True])).tolist() == [9, 1]


@given(finite)
def test_fp32_values_are_exact(values):
    stored = encode_values(values, "fp32", 1.0)
    assert stored.dtype == np.float32
    assert same_bits(decode_values(stored, "fp32", 1.0), values).all()


@given(finite, st.sampled_from([("bf16", torch.bfloat16), ("fp16", torch.float16)]))
def test_half_values_are_rounded_as_torch_does(values, codec):
    name, dtype = codec
    stored = encode_values(values, name, 1.0)
    rounded = torch.from_numpy(values).to(dtype)
    assert stored.dtype == np.uint16
    assert same_bits(stored, rounded.view(torch.uint16).numpy()).all()
    assert same_bits(decode_values(stored, name, 1.0), rounded.float().numpy()).all()


@pytest.mark.parametrize("codec", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_values_beyond_a_half_become_infinite_and_the_others_stay(codec):
    name, dtype = codec
    values = np.array([1.5, 3.4e38, -3.4e38, np.inf, -np.inf, 65504.0, 65519.0, 65520.0, -1e5, 6e-8, -0.0], np.float32)
    found = decode_values(encode_values(values, name, 1.0), name, 1.0)
    expected = torch.from_numpy(values).to(dtype).float().numpy()
    finite = np.isfinite(expected)
    assert same_bits(found[finite], expected[finite]).all()
    assert np.isinf(torch.from_numpy(encode_values(values, name, 1.0)).view(dtype).float().numpy()[~finite]).all()


def test_bf16_rounds_to_even():
    # 1 + 1/256 lies between 1 and 1 + 1/128; 1 + 3/256 between 1 + 1/128 and 1 + 2/128.
    values = np.array([1 + 1 / 256, 1 + 3 / 256], np.float32)
    assert decode_values(encode_values(values, "bf16", 1.0), "bf16", 1.0).tolist() == [1.0, 1 + 2 / 128]


@given(finite, st.floats(1e-3, 1e3))
def test_int8_values_are_off_by_half_a_step_at_most(values, scale):
    inside = values[np.abs(values) <= 127 * scale]
    decoded = decode_values(encode_values(inside, "int8", scale), "int8", scale)
    bound = 0.5 * scale * (1 + 1e-5)
    wide = inside.astype(np.float64)
    assert decoded.dtype == np.float32
    assert (np.abs(decoded - wide) <= bound + np.abs(wide) * 1e-6).all()


def test_int8_values_beyond_the_range_are_clipped_to_127_steps():
    stored = encode_values(np.array([1000.0, -1000.0, 1.26, -0.5], np.float32), "int8", 0.5)
    assert stored.dtype == np.int8
    assert stored.tolist() == [127, -127, 3, -1]


@given(finite)
def test_signs_come_back_with_the_scale(values):
    values = values[values != 0]
    stored = encode_values(values, "sign", 0.25)
    assert stored.dtype == np.bool_
    decoded = decode_values(stored, "sign", 0.25)
    assert decoded.dtype == np.float32
    assert decoded.tolist() == (np.sign(values) * 0.25).tolist()


@pytest.mark.parametrize(("codec", "scale"), [("int8", 1e38), ("sign", 1e39), ("sign", -1e300)])
def test_a_scale_beyond_float32_gives_infinite_values_and_no_warning(codec, scale):
    stored = np.array([-127, 127], np.int8) if codec == "int8" else np.array([False, True])
    assert np.isinf(decode_values(stored, codec, scale)).all()


@given(st.integers(0, 10**6))
def test_bytes_are_rounded_up_to_a_multiple_of_eight(n):
    assert aligned(n) % 8 == 0
    assert 0 <= aligned(n) - n < 8


@pytest.mark.parametrize("density", [1e-4, 0.05, 0.125, 0.126, 0.5, 1.0])
def test_the_smaller_index_is_chosen(density):
    bytes_of = {"gaps": density, "bitmap": 1 / 8}
    assert bytes_of[index_codec(density)] == min(bytes_of.values())
