"""Slabs in float32: the values that torch gives, whatever the slabs, and whether all of them are finite."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored_tensors import BY_NAME, read_stored

from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.read import STORED_DTYPES, FullReader, MappedReader, open_files, read_floats
from mediator_cli.checkpoint.spans import Part, Span
from mediator_cli.errors import CheckpointError

FLOATS = ["F16", "BF16", "F32", "F64"]
CUTS = ([], [1], [0, 1, 2, 3], [32768], [7, 30_000, 32_768, 33_000, 69_999], list(range(0, 70_000, 1024)))


def finite_values(dtype):
    """Draw 70,000 entries of a dtype: of 16 bits all that are finite, of others any bits that are finite in float32."""
    rng = np.random.default_rng(0)
    if dtype == "BOOL":
        return torch.from_numpy(rng.integers(0, 2, 70_000).astype(bool))
    if dtype == "F64":
        # From below the smallest float32 to just below the largest, and ties between neighbours.
        values = rng.standard_normal(70_000) * 10.0 ** rng.uniform(-50, 37, 70_000)
        values[::7] = 1 + 2.0**-24 * rng.integers(0, 9, 10_000)
        return torch.from_numpy(values)
    if dtype in ("F16", "BF16"):
        drawn = torch.from_numpy(np.resize(rng.permutation(1 << 16).astype(np.uint16), 70_000)).view(BY_NAME[dtype])
    else:
        drawn = torch.from_numpy(rng.integers(0, 256, 70_000 * 8, np.uint8)).view(BY_NAME[dtype])[:70_000].clone()
    if dtype in FLOATS:
        drawn[~drawn.isfinite()] = 0.5
    return drawn


def write(file, **tensors):
    save_file(tensors, file)
    return {info.name: info for info in read_header(file).tensors}


def bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


def test_every_dtype_is_known_by_its_width():
    assert STORED_DTYPES.keys() == BY_NAME.keys()
    assert all(STORED_DTYPES[name].itemsize == dtype.itemsize for name, dtype in BY_NAME.items())


@pytest.mark.parametrize("dtype", BY_NAME)
def test_slabs_of_every_dtype_are_parts_of_the_whole(tmp_path, dtype):
    made = finite_values(dtype)
    tensors = write(tmp_path / "m", a=made, other=torch.ones(3))
    whole = made.float().numpy()
    assert np.isfinite(whole).all()
    with open_files([tmp_path / "m"]) as descriptors:
        reader = FullReader(descriptors, tensors)
        for cuts in CUTS:
            out = np.full(70_002, 7, np.float32)
            for start, stop in pairwise([0, *cuts, 70_000]):
                assert reader.read_into("a", start, stop, out[1 + start : 1 + stop]) is True
            assert np.array_equal(bits(out[1:-1]), bits(whole)), cuts
            assert out[0] == out[-1] == 7
        assert torch.equal(read_stored(descriptors, tensors["a"]).view(torch.uint8), made.view(torch.uint8))


def test_float16_has_all_its_subnormal_numbers(tmp_path):
    raw = np.concatenate([np.arange(1024), 0x8000 + np.arange(1024)]).astype(np.uint16)
    tensors = write(tmp_path / "m", a=torch.from_numpy(raw).view(torch.float16))
    with open_files([tmp_path / "m"]) as descriptors:
        found = read_floats(FullReader(descriptors, tensors), "a", 0, 2048)
    steps = np.arange(1024) * 2.0**-24
    assert np.array_equal(bits(found), bits(np.concatenate([steps, -steps])))
    assert np.signbit(found[1024])


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 3, 4)])
def test_scalars_and_empty_tensors_are_read(tmp_path, shape):
    made = torch.arange(float(torch.Size(shape).numel())).view(shape) + 1
    tensors = write(tmp_path / "m", a=made.bfloat16(), b=made)
    with open_files([tmp_path / "m"]) as descriptors:
        for name in "ab":
            found = read_floats(FullReader(descriptors, tensors), name, 0, made.numel())
            assert found.tolist() == made.flatten().tolist()


BAD = {
    (dtype, value): torch.tensor(float(value), dtype=torch.float64).to(BY_NAME[dtype])
    for dtype in FLOATS
    for value in ("inf", "-inf", "nan")
} | {("F64", value): torch.tensor(float(value), dtype=torch.float64) for value in ("3.5e38", "-1e300")}


@pytest.mark.parametrize(("dtype", "value"), BAD)
@pytest.mark.parametrize("place", [0, 1023, 1024, 2046, 4999])
def test_one_entry_that_is_not_finite_is_told(tmp_path, dtype, value, place):
    made = torch.ones(5000, dtype=BY_NAME[dtype])
    made[place] = BAD[dtype, value]
    tensors = write(tmp_path / "m", a=made)
    out = np.empty(5000, np.float32)
    with open_files([tmp_path / "m"]) as descriptors:
        reader = FullReader(descriptors, tensors)
        assert reader.read_into("a", 0, 5000, out) is False
        assert reader.read_into("a", place, place + 1, out[:1]) is False
        assert reader.read_into("a", 0, place, out[:place]) is True
        assert reader.read_into("a", place + 1, 5000, out[place + 1 :]) is True


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_are_finite(tmp_path, dtype):
    largest = min(torch.finfo(BY_NAME[dtype]).max, torch.finfo(torch.float32).max)
    made = torch.tensor([largest, -largest], dtype=torch.float64).to(BY_NAME[dtype])
    tensors = write(tmp_path / "m", a=made)
    out = np.empty(2, np.float32)
    with open_files([tmp_path / "m"]) as descriptors:
        assert FullReader(descriptors, tensors).read_into("a", 0, 2, out)
    assert out.tolist() == [largest, -largest]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "I8"])
def test_a_file_cut_while_it_is_read_is_an_error(tmp_path, dtype):
    tensors = write(tmp_path / "m", a=torch.ones(1000).to(BY_NAME[dtype]))
    with open_files([tmp_path / "m"]) as descriptors:
        (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-1])
        reader = FullReader(descriptors, tensors)
        assert read_floats(reader, "a", 0, 999).tolist() == [1.0] * 999
        with pytest.raises(CheckpointError, match="the file ends before its last tensor") as caught:
            read_floats(reader, "a", 500, 1000)
    assert caught.value.problems[0].place == f"{tmp_path / 'm'}: a"
    assert caught.value.problems[0].hint == "did another process change it?"


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    with (
        pytest.raises(CheckpointError, match="cannot read: no such file"),
        open_files([tmp_path / "none"]),
    ):
        pass


@dataclass(frozen=True)
class Arrays:
    """A source in memory."""

    tensors: dict

    def read_into(self, name, start, stop, out):
        out[:] = self.tensors[name][start:stop]
        return bool(np.isfinite(out).all())


RNG = np.random.default_rng(0)
SOURCES = {
    source: {tensor: RNG.standard_normal(40).astype(np.float32) for tensor in ("u", "v")} for source in ("base", "x")
}
PARTS = st.builds(Part, st.sampled_from(["base", "x"]), st.sampled_from(["u", "v"]), st.integers(0, 30))
SPANS = st.lists(st.builds(Span, st.integers(1, 10), st.lists(PARTS, min_size=1, max_size=4).map(tuple)), max_size=6)


def mapped(layout, sources=SOURCES, own="x"):
    return MappedReader(own, {name: Arrays(tensors) for name, tensors in sources.items()}, layout)


def by_hand(spans, sources=SOURCES):
    found = [np.zeros(0, np.float32)]
    for span in spans:
        runs = [sources[p.source][p.tensor][p.start : p.start + span.size] for p in span.parts]
        mean = sum(run.astype(np.float64) for run in runs) / len(runs)
        found.append(runs[0] if len(runs) == 1 else mean.astype(np.float32))
    return np.concatenate(found)


@given(SPANS, st.lists(st.integers(0, 60), max_size=5))
def test_a_mapped_tensor_is_its_spans_in_a_row(spans, cuts):
    whole = by_hand(spans)
    reader = mapped({"w": tuple(spans)})
    out = np.full(len(whole) + 1, 7, np.float32)
    for start, stop in pairwise([0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]):
        assert reader.read_into("w", start, stop, out[start:stop]) is True
    assert np.array_equal(bits(out[:-1]), bits(whole))
    assert out[-1] == 7


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_span_of_several_parts_is_their_mean(parts):
    made = [Part("base", "u", 0), Part("x", "u", 5), Part("x", "v", 1)][:parts]
    found = read_floats(mapped({"w": (Span(10, tuple(made)),)}), "w", 2, 9)
    runs = [SOURCES[p.source][p.tensor][p.start + 2 : p.start + 9] for p in made]
    assert np.array_equal(found, np.mean(runs, axis=0, dtype=np.float64).astype(np.float32))


def test_a_tensor_without_a_layout_is_its_own_sources():
    assert np.array_equal(read_floats(mapped({}), "u", 3, 8), SOURCES["x"]["u"][3:8])
    assert np.array_equal(read_floats(mapped({}, own="base"), "u", 3, 8), SOURCES["base"]["u"][3:8])


def test_a_mapped_tensor_tells_of_its_own_entries_alone_whether_they_are_finite():
    bad = np.array([1, np.inf, np.nan, 1, 3e38, -np.inf], np.float32)
    sources = {"x": {"u": bad, "v": np.array([1, -np.inf, 1, 1, 3e38, 1], np.float32)}}
    u, v = Part("x", "u", 0), Part("x", "v", 0)
    spans = {"one": [(u,)], "two": [(u, v)], "turned": [(v, u)], "in front": [(u,), (v,)], "behind": [(v,), (u,)]}
    reader = mapped({name: tuple(Span(6, parts) for parts in made) for name, made in spans.items()}, sources)
    for name, made in spans.items():
        size = 6 * len(made)
        out = np.empty(size, np.float32)
        finite = [reader.read_into(name, n, n + 1, out[n : n + 1]) for n in range(size)]
        assert finite == np.isfinite(out).tolist(), name
        for start in range(size):
            for stop in range(start, size + 1):
                assert reader.read_into(name, start, stop, out[start:stop]) is all(finite[start:stop]), name


def test_a_mean_fits_where_the_sum_does_not():
    sources = {"x": {"u": np.full(2, 3e38, np.float32)}}
    out = np.empty(2, np.float32)
    assert mapped({"w": (Span(2, 3 * (Part("x", "u", 0),)),)}, sources).read_into("w", 0, 2, out)
    assert out.tolist() == sources["x"]["u"].tolist()
