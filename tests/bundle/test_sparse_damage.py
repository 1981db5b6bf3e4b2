"""Whatever stands in a sparse expert's file, reading gives a result or says what is wrong, in bounded memory."""

import contextlib
import json
import tracemalloc

import pytest
from handmade import random_delta, write_sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mediator_cli.bundle.deltas import read_delta
from mediator_cli.bundle.digest import scan_tensors, sparse_digests
from mediator_cli.bundle.entries import check_entries
from mediator_cli.bundle.sparse_file import open_sparse_file
from mediator_cli.errors import BundleError, CheckpointError

often = settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ROOM = 4 << 20
"""Bytes that headers of this size and their error messages may take."""
PER_BYTE = 100
"""Bytes that a byte of a file may become: a bit that stands for an entry has a position and a value."""


def told(function, *args):
    """Call a function; None where it refuses in order."""
    with contextlib.suppress(BundleError, CheckpointError):
        return function(*args)
    return None


def read_all(file):
    """Open a file and do all that anyone does with it."""
    sparse = told(open_sparse_file, file)
    if sparse is None:
        return
    told(scan_tensors, list(sparse.arrays.values()), 1)
    told(sparse_digests, sparse)
    for name, spec in sparse.tensors.items():
        delta = told(read_delta, sparse, name)
        if delta is not None:
            assert len(delta.positions) == len(delta.values) == spec.n_kept
            assert not spec.n_kept or ((delta.positions >= 0).all() and int(delta.positions[-1]) < spec.size)
            check = told(check_entries, sparse, name)
            assert check is None


def bounded(file):
    """Read all in memory that the size of the file bounds."""
    tracemalloc.start()
    try:
        read_all(file)
        assert tracemalloc.get_traced_memory()[1] < ROOM + PER_BYTE * file.stat().st_size
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The bytes of small valid files of every code."""
    folder = tmp_path_factory.mktemp("intact")
    kinds = [("int8", "gaps"), ("sign", "bitmap"), ("bf16", "gaps"), ("fp32", "bitmap"), ("fp16", "gaps")]
    files = [folder / f"{codec}.safetensors" for codec, _ in kinds]
    for file, (codec, index) in zip(files, kinds, strict=True):
        write_sparse(file, random_delta(60, 0.6, 0), codec, 0.1, index, 2)
    return [file.read_bytes() for file in files]


@often
@given(data=st.data())
def test_damaged_bytes_never_give_another_error(intact, tmp_path, data):
    raw = bytearray(data.draw(st.sampled_from(intact)))
    used = len(raw) if data.draw(st.booleans()) else 420
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, used - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, len(raw) // 2, 10, 0]))])
    bounded(file)


@often
@given(raw=st.binary(max_size=200), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_bytes_at_all_never_give_another_error(tmp_path, raw, length):
    file = tmp_path / "any.safetensors"
    file.write_bytes((b"" if length is None else length.to_bytes(8, "little")) + raw)
    bounded(file)


sizes = st.one_of(st.integers(-1, 70), st.sampled_from([2**31, 2**63, 2**64, 10**30]))
scales = st.one_of(st.floats(), st.integers(-(10**20), 10**20), st.just(10**400), st.none(), st.text(max_size=3))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
specs = st.fixed_dictionaries(
    {
        "shape": st.lists(sizes, max_size=3),
        "n_kept": sizes,
        "index": st.sampled_from(["gaps", "bitmap"]),
        "values": st.sampled_from(["fp32", "bf16", "fp16", "int8", "sign"]),
    },
    optional={"scale": scales, "n_overrides": sizes},
)
arrays = st.fixed_dictionaries(
    {},
    optional={
        f"w.{kind}": st.tuples(st.sampled_from(dtypes), st.integers(0, 9))
        for kind, dtypes in {
            "values": ["F32", "BF16", "F16", "I8", "U8", "F64"],
            "gaps": ["U8", "I8"],
            "bitmap": ["U8", "BOOL"],
            "override_index": ["I64", "U64"],
            "override_values": ["F32", "BF16", "F64", "F8_E4M3"],
        }.items()
    },
)
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "BF16": 2, "F16": 2}


def header_of(arrays, tensors):
    entries, at = {}, 0
    for name, (dtype, count) in arrays.items():
        end = at + 8 * count
        entries[name] = {"dtype": dtype, "shape": [8 * count // WIDTHS.get(dtype, 1)], "data_offsets": [at, end]}
        at = end
    metadata = {"format": "mediator.sparse", "version": "1", "expert": "a", "tensors": tensors}
    return {"__metadata__": metadata, **entries}, at


@often
@given(arrays=arrays, spec=st.one_of(specs, specs, anything), data=st.data())
def test_any_specification_over_any_arrays_never_gives_another_error(tmp_path, arrays, spec, data):
    header, size = header_of(arrays, json.dumps({"w": spec}))
    text = json.dumps(header).encode()
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data.draw(st.binary(min_size=size, max_size=size)))
    bounded(file)


fields = st.one_of(
    st.tuples(st.just("scale"), st.one_of(st.floats(allow_nan=False, allow_infinity=False), scales)),
    st.tuples(st.sampled_from(["n_kept", "n_overrides"]), st.one_of(st.integers(0, 70), sizes)),
    st.tuples(st.just("shape"), st.lists(sizes, max_size=3)),
    st.tuples(st.just("index"), st.sampled_from(["gaps", "bitmap"])),
    st.tuples(st.just("values"), st.sampled_from(["fp32", "bf16", "fp16", "int8", "sign"])),
)


@often
@given(changes=st.lists(fields, min_size=1, max_size=2), data=st.data())
def test_another_specification_of_intact_arrays_never_gives_another_error(intact, tmp_path, changes, data):
    raw = data.draw(st.sampled_from(intact))
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    specs = json.loads(header["__metadata__"]["tensors"])
    header["__metadata__"]["tensors"] = json.dumps({"w": specs["w"] | dict(changes)})
    text = json.dumps(header).encode()
    file = tmp_path / "other.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    bounded(file)


@often
@given(header=anything, tensors=anything, inside=st.booleans())
def test_any_header_never_gives_another_error(tmp_path, header, tensors, inside):
    wrapped = header_of({}, json.dumps(tensors) if inside else tensors)[0] if inside else header
    text = json.dumps(wrapped).encode()
    file = tmp_path / "header.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    bounded(file)
