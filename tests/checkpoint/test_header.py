"""The safetensors header parser: what is valid is read, everything else is a CheckpointError."""

import contextlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mediator_cli.checkpoint.header import check_plain_name, read_header, read_index, read_json, read_tensors
from mediator_cli.errors import CheckpointError

quiet = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def write(file, header, data=b""):
    """Write a safetensors file from a header as text or object."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def fault(file):
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    (problem,) = caught.value.problems
    assert str(file) in problem.place
    assert problem.hint
    return problem.message


def test_a_header_is_read_to_the_byte(tmp_path):
    file = write(tmp_path / "m", {"__metadata__": {"format": "pt"}, "b": entry(8, 12), "a": entry(0, 8)}, b"x" * 12)
    header = read_header(file)
    start = header.data_start
    assert start == file.stat().st_size - 12
    assert header.metadata == {"format": "pt"}
    assert [(t.name, t.start - start, t.end - start, t.shape, t.dtype) for t in header.tensors] == [
        ("a", 0, 8, (2,), "F32"),
        ("b", 8, 12, (1,), "F32"),
    ]


def test_an_empty_header_holds_nothing(tmp_path):
    assert read_header(write(tmp_path / "m", {})).tensors == ()


DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_official_library_writes_what_we_read(tmp_path, dtype):
    tensors = {
        "model.one": torch.zeros(3, 2, dtype=DTYPES[dtype]),
        "model.empty": torch.zeros(0, 4, dtype=DTYPES[dtype]),
        "model.scalar": torch.zeros((), dtype=DTYPES[dtype]),
    }
    save_file(tensors, tmp_path / "m", metadata={"key": "välue"})
    header = read_header(tmp_path / "m")
    found = {t.name: (t.dtype, t.shape, t.size, t.n_bytes // DTYPES[dtype].itemsize) for t in header.tensors}
    expected = {name: (dtype, tuple(t.shape), t.numel(), t.numel()) for name, t in tensors.items()}
    assert found == expected
    assert header.metadata == {"key": "välue"}


def test_a_missing_file_is_named(tmp_path):
    assert fault(tmp_path / "none") == "cannot read: no such file or directory"


@pytest.mark.parametrize("raw", [b"", b"short", b"\0" * 100, b"PK\x03\x04" + b"x" * 200, b"<html>" * 50])
def test_other_files_are_not_safetensors(tmp_path, raw):
    (tmp_path / "m").write_bytes(raw)
    assert fault(tmp_path / "m") == "is not a safetensors file"


def test_a_header_beyond_the_file_is_refused(tmp_path):
    (tmp_path / "m").write_bytes((1000).to_bytes(8, "little") + b'{"a": 1}')
    assert fault(tmp_path / "m") == "header of 1000 bytes is longer than the file of 16 bytes"


def test_a_header_of_a_huge_length_is_not_read(tmp_path):
    (tmp_path / "m").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert fault(tmp_path / "m") == "is not a safetensors file"


BROKEN = {
    "cut JSON": (b'{"a": ', 0, "broken safetensors header"),
    "not UTF-8": (b'{"\xff": 1}', 0, "broken safetensors header"),
    "deep JSON": (b'{"a": ' + b"[" * 100_000, 0, "broken safetensors header"),
    "twice": (b'{"a": {}, "a": {}}', 0, "a name stands twice"),
    "entry is a number": ({"a": 1}, 0, "broken header entry"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "broken header entry"),
    "negative shape": ({"a": entry(0, 4, [-1])}, 4, "broken header entry"),
    "fractional shape": ({"a": entry(0, 4, [1.0])}, 4, "broken header entry"),
    "boolean shape": ({"a": entry(0, 4, [True])}, 4, "broken header entry"),
    "unknown dtype": ({"a": entry(0, 4, dtype="F3")}, 4, "unknown dtype F3"),
    "dtype is a list": ({"a": entry(0, 4, dtype=["F32"])}, 4, "unknown dtype"),
    "three offsets": ({"a": entry(0, 4) | {"data_offsets": [0, 4, 8]}}, 8, "do not fit shape"),
    "offsets turned": ({"a": entry(0, 4) | {"data_offsets": [4, 0]}}, 4, "do not fit shape"),
    "size does not fit": ({"a": entry(0, 8, [3])}, 8, "bytes [0, 8] do not fit shape [3] of F32"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlaps the tensor before it"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "leaves a hole before it"),
    "hole at the start": ({"a": entry(4, 8)}, 8, "leaves a hole before it"),
    "bytes at the end": ({"a": entry(0, 4)}, 9, "5 bytes behind the last tensor"),
}


@pytest.mark.parametrize(("header", "n_data", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_refused_by_name(tmp_path, header, n_data, message):
    assert message in fault(write(tmp_path / "m", header, b"\0" * n_data))


def test_a_truncated_file_says_how_many_bytes_are_missing(tmp_path):
    file = write(tmp_path / "m", {"a": entry(0, 400)}, b"\0" * 100)
    size = file.stat().st_size
    assert fault(file) == f"truncated: {size} bytes, the header says {size + 300}"


@quiet
@given(st.binary(max_size=200))
def test_random_bytes_never_give_another_error(tmp_path, raw):
    (tmp_path / "m").write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        read_header(tmp_path / "m")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 3) | st.integers(), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 12) | st.integers(), max_size=3) | json_values,
    },
)


@quiet
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), fields | json_values), st.binary(max_size=16))
def test_random_headers_never_give_another_error(tmp_path, header, data):
    with contextlib.suppress(CheckpointError):
        read_header(write(tmp_path / "m", header, data))


@quiet
@given(st.data())
def test_mutated_files_never_give_another_error(tmp_path, data):
    file = write(tmp_path / "m", {"__metadata__": {"format": "pt"}, "a": entry(0, 8), "b": entry(8, 12)}, b"x" * 12)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        read_header(file)


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_by_their_index(tmp_path):
    write(tmp_path / "one.safetensors", {"a": entry(0, 4)}, b"\0" * 4)
    write(tmp_path / "two.safetensors", {"b": entry(0, 4), "c": entry(4, 12)}, b"\0" * 12)
    write_index(tmp_path, {"c": "two.safetensors", "a": "one.safetensors", "b": "two.safetensors"})
    found = read_tensors(tmp_path)
    assert {name: info.file.name for name, info in found.items()} == {
        "a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"
    }  # fmt: skip


def test_a_missing_shard_is_named(tmp_path):
    write_index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"one\.safetensors: cannot read: no such file"):
        read_tensors(tmp_path)


def test_a_tensor_that_no_shard_holds_is_named(tmp_path):
    write(tmp_path / "one.safetensors", {"a": entry(0, 4)}, b"\0" * 4)
    write_index(tmp_path, {"a": "one.safetensors", "z": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"one\.safetensors: z: tensor is in the index but not in this file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", ".", "a\\b", "C:x", "a\0b", None, 3, ["x"]])
def test_an_index_may_not_lead_out_of_its_folder(tmp_path, name):
    write_index(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match="unsafe file name"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        read_index(tmp_path / "model.safetensors.index.json")


def test_plain_names_pass():
    assert check_plain_name("here", "model-00001-of-00002.safetensors") == "model-00001-of-00002.safetensors"
    assert check_plain_name("here", "..model ü.safetensors") == "..model ü.safetensors"


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"{", "broken JSON"), (b"\xff", "broken JSON"), (b"[1]", "is not a JSON object"), (b"[" * 99_999, "broken JSON")],
)
def test_a_broken_json_file_is_refused(tmp_path, raw, message):
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")
