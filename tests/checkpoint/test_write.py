"""Files written in place: header to the byte, readable by the official library."""

import os

import pytest
import torch
from safetensors.torch import load_file
from stored_tensors import as_bytes

from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.torch_file import DTYPES
from mediator_cli.checkpoint.write import NewTensor, create_file, header_bytes, index_json, plan_shards, write_at
from mediator_cli.errors import OutputError


def test_the_header_is_exact_to_the_byte():
    tensors = [NewTensor("a", "BF16", (2, 3)), NewTensor("b", "F32", ())]
    text = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}'
    )
    length = -(-len(text) // 8) * 8
    assert header_bytes(tensors, {"format": "pt"}) == length.to_bytes(8, "little") + text.ljust(length)


@pytest.mark.parametrize(("reserve", "length"), [(0, 8), (16, 8), (24, 16), (64, 56)])
def test_the_header_fills_what_was_reserved(reserve, length):
    assert header_bytes([], {}, reserve) == length.to_bytes(8, "little") + b"{}".ljust(length)


def write_all(file, tensors):
    """Write torch tensors by create_file and write_at, in reverse order."""
    new = [NewTensor(name, DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    infos = create_file(file, new, {"format": "pt"})
    with file.open("r+b", buffering=0) as stream:
        for name, tensor in reversed(tensors.items()):
            write_at(stream.fileno(), file, memoryview(as_bytes(tensor)), infos[name].start)
    return infos


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_official_library_reads_what_we_write(tmp_path, dtype):
    made = {
        "one": (10 * torch.rand(3, 4)).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
        "ünï.weight": torch.ones(5, dtype=dtype),
    }
    infos = write_all(tmp_path / "m", made)
    found = load_file(tmp_path / "m")
    assert set(found) == set(made)
    assert all(found[n].dtype == dtype and torch.equal(found[n], made[n]) for n in made)
    assert {info.name: info for info in read_header(tmp_path / "m").tensors} == infos


def test_a_file_has_its_final_size_before_the_first_tensor(tmp_path):
    (info,) = create_file(tmp_path / "m", [NewTensor("a", "F32", (1000,))], {}).values()
    assert (tmp_path / "m").stat().st_size == info.end
    assert torch.equal(load_file(tmp_path / "m")["a"], torch.zeros(1000))


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(OutputError, match="cannot write: file exists"):
        create_file(tmp_path / "m", [], {})
    assert (tmp_path / "m").read_text() == "mine"


def test_a_file_larger_than_any_disk_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        create_file(tmp_path / "m", [NewTensor("a", "F32", (2**58,))], {})


def test_a_failing_write_is_an_output_error(tmp_path):
    (tmp_path / "m").write_bytes(b"")
    descriptor = os.open(tmp_path / "m", os.O_RDONLY)
    with pytest.raises(OutputError, match=r"m: cannot write"):
        write_at(descriptor, tmp_path / "m", memoryview(b"abc"), 0)
    os.close(descriptor)


def new(name, n, dtype="F32"):
    return NewTensor(name, dtype, (n,))


def test_one_shard_has_the_plain_name():
    assert list(plan_shards([new("a", 1), new("b", 2)], 12)) == ["model.safetensors"]


def test_shards_are_filled_in_order_up_to_the_size():
    shards = plan_shards([new("a", 1), new("b", 2), new("c", 1), new("d", 1)], 12)
    assert {file: [t.name for t in shard] for file, shard in shards.items()} == {
        "model-00001-of-00002.safetensors": ["a", "b"],
        "model-00002-of-00002.safetensors": ["c", "d"],
    }


def test_a_tensor_larger_than_a_shard_gets_its_own_file():
    shards = plan_shards([new("a", 1), new("big", 100), new("c", 1)], 8)
    assert [[t.name for t in shard] for shard in shards.values()] == [["a"], ["big"], ["c"]]


def test_wider_dtypes_come_first_in_a_file():
    (shard,) = plan_shards([new("a", 3, "U8"), new("b", 1, "BF16"), new("c", 1), new("d", 1)], 100).values()
    assert [t.name for t in shard] == ["c", "d", "b", "a"]


def test_the_index_lists_every_tensor_and_the_total_size():
    shards = plan_shards([new("b", 2), new("a", 1)], 8)
    assert index_json(shards) == {
        "metadata": {"total_size": 12},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }
