"""The sparse codec by itself: what is written is read back, and what is stored is the best that its type can do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mediator_cli.bundle.sparse import (
    decode_gaps,
    decode_values,
    encode_gaps,
    encode_values,
    index_codec,
    pack_bits,
    padded,
    same_bits,
    unpack_bits,
)

gaps = st.one_of(
    st.integers(0, 3), st.sampled_from([253, 254, 255, 256, 257, 509, 510, 511, 765]), st.integers(0, 3000)
)
positions = st.lists(gaps, max_size=40).map(
    lambda steps: torch.tensor([sum(steps[: n + 1]) + n for n in range(len(steps))], dtype=torch.int64)
)
finite = hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(-1e4, 1e4, width=32)).map(torch.from_numpy)


@given(positions)
def test_any_rising_positions_come_back(kept):
    assert torch.equal(decode_gaps(encode_gaps(kept, 0)), kept)


@given(positions, st.lists(st.integers(0, 4000), max_size=5))
def test_encoding_in_several_slabs_equals_one(kept, cuts):
    whole, parts, start = encode_gaps(kept, 0), [], 0
    for low, high in zip([0, *sorted(cuts)], [*sorted(cuts), 10**9], strict=True):
        inside = kept[(kept >= low) & (kept < high)]
        if len(inside):
            parts.append(encode_gaps(inside, start))
            start = int(inside[-1]) + 1
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.uint8), *parts]), whole)


@pytest.mark.parametrize(
    ("first", "codes"),
    [(0, [0]), (1, [1]), (254, [254]), (255, [255, 0]), (256, [255, 1]), (509, [255, 254]), (510, [255, 255, 0])],
)
def test_escapes_stand_where_the_format_says(first, codes):
    assert encode_gaps(torch.tensor([first]), 0).tolist() == codes
    assert decode_gaps(torch.tensor(codes, dtype=torch.uint8)).tolist() == [first]


def test_a_gap_counts_from_behind_the_last_position():
    assert encode_gaps(torch.tensor([3, 4, 260]), 3).tolist() == [0, 0, 255, 0]


def test_all_positions_cost_a_zero_byte_each():
    assert encode_gaps(torch.arange(1000), 0).tolist() == [0] * 1000


def test_nothing_kept_is_nothing_written():
    assert encode_gaps(torch.empty(0, dtype=torch.int64), 0).tolist() == []
    assert decode_gaps(torch.empty(0, dtype=torch.uint8)).tolist() == []


def test_escapes_at_the_end_keep_nothing():
    assert decode_gaps(torch.tensor([2, 255, 255, 255], dtype=torch.uint8)).tolist() == [2]


@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(bits):
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert len(packed) == -(-len(bits) // 8)
    assert unpack_bits(packed, len(bits)).tolist() == bits


def test_the_first_entry_is_the_lowest_bit():
    assert pack_bits(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist() == [9, 1]


@given(finite)
def test_fp32_values_are_exact(values):
    stored = encode_values(values, "fp32", 1.0)
    assert stored.dtype == torch.float32
    assert same_bits(decode_values(stored, "fp32", 1.0), values).all()


@given(finite, st.sampled_from([("bf16", torch.bfloat16), ("fp16", torch.float16)]))
def test_half_values_are_rounded_as_torch_does(values, codec):
    name, dtype = codec
    stored = encode_values(values, name, 1.0)
    assert stored.dtype == dtype
    assert same_bits(decode_values(stored, name, 1.0), values.to(dtype).float()).all()


def test_bf16_rounds_to_even():
    # 1 + 1/256 lies between 1 and 1 + 1/128; 1 + 3/256 between 1 + 1/128 and 1 + 2/128.
    values = torch.tensor([1 + 1 / 256, 1 + 3 / 256])
    assert decode_values(encode_values(values, "bf16", 1.0), "bf16", 1.0).tolist() == [1.0, 1 + 2 / 128]


@given(finite, st.floats(1e-3, 1e3))
def test_int8_values_are_off_by_half_a_step_at_most(values, scale):
    inside = values[values.abs() <= 127 * scale]
    decoded = decode_values(encode_values(inside, "int8", scale), "int8", scale)
    bound = 0.5 * scale * (1 + 1e-5)
    assert ((decoded.double() - inside.double()).abs() <= bound + inside.double().abs() * 1e-6).all()


def test_int8_values_beyond_the_range_are_clipped_to_127_steps():
    stored = encode_values(torch.tensor([1000.0, -1000.0, 1.26, -0.5]), "int8", 0.5)
    assert stored.dtype == torch.int8
    assert stored.tolist() == [127, -127, 3, -1]


@given(finite)
def test_signs_come_back_with_the_scale(values):
    values = values[values != 0]
    stored = encode_values(values, "sign", 0.25)
    assert stored.dtype == torch.bool
    assert torch.equal(decode_values(stored, "sign", 0.25), values.sign() * 0.25)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("n", range(10))
def test_padding_fills_to_eight_bytes(dtype, n):
    array = padded(torch.ones(n, dtype=dtype), 5)
    n_bytes = array.numel() * array.element_size()
    assert n_bytes % 8 == 0
    assert 0 <= n_bytes - n * array.element_size() < 8
    assert array[:n].tolist() == [1] * n
    assert array[n:].tolist() == [5] * (len(array) - n)


@pytest.mark.parametrize("density", [1e-4, 0.05, 0.125, 0.126, 0.5, 1.0])
def test_the_smaller_index_is_chosen(density):
    bytes_of = {"gaps": density, "bitmap": 1 / 8}
    assert bytes_of[index_codec(density)] == min(bytes_of.values())


def test_same_bits_tells_zeros_and_equal_nans():
    left = torch.tensor([0.0, 0.0, float("nan"), 1.0])
    right = torch.tensor([0.0, -0.0, float("nan"), 1.0000001])
    assert same_bits(left, right).tolist() == [True, False, True, False]
