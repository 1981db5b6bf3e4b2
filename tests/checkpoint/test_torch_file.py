"""Checkpoints of torch.save: the same bytes as torch reads, and nothing of the pickle is ever run."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, random_tensors, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from stored_tensors import as_bytes, read_stored

from mediator_cli.checkpoint.read import open_files
from mediator_cli.checkpoint.source import open_checkpoint
from mediator_cli.checkpoint.torch_file import DTYPES, read_torch_file
from mediator_cli.errors import CheckpointError


def any_tensor(dtype, shape=(3, 5)):
    """Draw a tensor of any bits, booleans aside."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype)[..., 0]


def same_bits(found, wanted):
    return found.dtype == wanted.dtype and found.shape == wanted.shape and as_bytes(found) == as_bytes(wanted)


def check_values(file, made):
    """Every tensor that was saved is found, with its bits, in the order of the dictionary."""
    infos = read_torch_file(file)
    assert [info.name for info in infos] == list(made)
    with open_files([file]) as descriptors:
        for info in infos:
            assert same_bits(read_stored(descriptors, info), made[info.name]), info
    return {info.name: info for info in infos}


def saved(tmp_path, made, **how):
    torch.save(made, tmp_path / "m.bin", **how)
    return tmp_path / "m.bin"


def rewrite(file, change):
    """Write a zip again with records changed; `change` gives the new data of a record, or None to leave it out."""
    with zipfile.ZipFile(file) as old:
        records = [(item, old.read(item)) for item in old.infolist()]
    with zipfile.ZipFile(file, "w") as new:
        for item, data in records:
            if (changed := change(item.filename, data)) is not None:
                new.writestr(zipfile.ZipInfo(item.filename), changed)


def refused(file, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(file)
    assert all(problem.hint for problem in caught.value.problems)
    return caught.value


@pytest.mark.parametrize(("dtype", "name"), DTYPES.items())
def test_every_dtype_has_the_bits_that_were_saved(tmp_path, dtype, name):
    made = {"a": any_tensor(dtype), "scalar": any_tensor(dtype, ()), "none": any_tensor(dtype, (0, 4))}
    found = check_values(saved(tmp_path, made), made)
    assert {info.dtype for info in found.values()} == {name}
    assert [info.n_bytes for info in found.values()] == [15 * dtype.itemsize, dtype.itemsize, 0]


def test_views_ties_and_parameters(tmp_path):
    whole = torch.randn(6, 4)
    made = {"whole": whole, "rows": whole[2:5], "tied": whole, "odd": torch.arange(9, dtype=torch.uint8)[3:]}
    made |= {"parameter": torch.nn.Parameter(torch.randn(3)), "one column": torch.randn(4, 1).t()}
    found = check_values(saved(tmp_path, made), made)
    assert found["tied"].start == found["whole"].start
    assert found["rows"].start == found["whole"].start + 32


def test_more_storages_than_sort_alike_as_texts_and_numbers(tmp_path):
    made = {f"t{n}": torch.full((n + 1,), float(n)) for n in range(25)}
    check_values(saved(tmp_path, made), made)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(str.isprintable),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_any_dictionary_of_tensors(tmp_path_factory, drawn):
    made = {name: any_tensor(dtype, tuple(shape)) for name, (dtype, shape) in drawn.items()}
    check_values(saved(tmp_path_factory.mktemp("any"), made), made)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda made: {"state_dict": made, "epoch": 3, "loss": [0.5]},
        lambda made: {"model": made, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [1]}},
    ],
)
def test_the_one_dictionary_of_tensors_inside_is_taken(tmp_path, wrap):
    made = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    check_values_of = saved(tmp_path, wrap(made))
    assert {info.name: info.shape for info in read_torch_file(check_values_of)} == {"a": (2, 3), "b": (4,)}
    with open_files([check_values_of]) as descriptors:
        for info in read_torch_file(check_values_of):
            assert torch.equal(read_stored(descriptors, info), made[info.name])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, "must hold one dictionary.*several: model, ema"),
        ([torch.ones(1)], "must hold one dictionary of tensors, has none"),
        ({}, "has none"),
        ({"state_dict": {}, "step": 3}, "has none"),
        ({"a": torch.ones(1), "step": 3}, "step: is of type int, not a tensor"),
        ({"a": torch.ones(1), 7: torch.ones(1)}, "7: is of type Tensor|7: "),
        (
            {"turned": torch.ones(2, 3).t(), "spread": torch.ones(1).expand(4)},
            r"turned: is not contiguous \(strides \[1, 3\]\)[\s\S]*spread: is not contiguous \(strides \[0\]\)",
        ),
        ({"a": torch.eye(3).to_sparse()}, "a: layout torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a: dtype torch.complex64 is not supported"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "a: "),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "a: dtype torch.float8_e4m3fn is not supported"),
    ],
)
def test_what_is_no_plain_dictionary_of_tensors_is_refused_by_name(tmp_path, value, message):
    refused(saved(tmp_path, value), message)


class Evil:
    """Makes a file when unpickled."""

    def __init__(self, call, *words):
        self.call, self.words = call, words

    def __reduce__(self):
        return self.call, self.words


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("call", [os.system, eval, exec, subprocess.check_output, Path.touch])
def test_a_pickle_that_would_run_code_runs_nothing(tmp_path, call, new_format):
    marker = tmp_path / "was here"
    words = {
        os.system: (f"touch '{marker}'",),
        subprocess.check_output: (["touch", str(marker)],),
        Path.touch: (marker,),
    }.get(call, (f"__import__('pathlib').Path({str(marker)!r}).touch()",))
    made = {"a": torch.ones(2), "b": Evil(call, *words)}
    file = saved(tmp_path, made, _use_new_zipfile_serialization=new_format)
    if new_format:
        error = refused(file, "holds more than tensors: it asks for")
        assert "can run any program" in error.problems[0].hint
    else:
        refused(file, "has the format of torch before 1.6")
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()


def test_a_bare_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "was here"
    (tmp_path / "m.bin").write_bytes(pickle.dumps(Evil(os.system, f"touch '{marker}'")))
    refused(tmp_path / "m.bin", "has the format of torch before 1.6")
    assert not marker.exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    refused(saved(tmp_path, torch.nn.Linear(2, 2)), r"it asks for torch\.nn\.modules\.linear\.Linear")


def test_a_file_of_old_torch_is_refused_with_the_command_that_converts_it(tmp_path):
    folder = tmp_path / "it's old"
    folder.mkdir()
    made = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    file = saved(folder, made, _use_new_zipfile_serialization=False)
    command = refused(file, "has the format of torch before 1.6").problems[0].hint.removeprefix("save it again: ")
    assert command.startswith("python -c ")
    command = f"{sys.executable} {command.removeprefix('python ')}"
    subprocess.run(command, shell=True, check=True, capture_output=True)
    check_values(file, made)


def test_a_program_of_torch_jit_is_refused(tmp_path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "m.bin")
    refused(tmp_path / "m.bin", "holds a TorchScript program")


@pytest.mark.parametrize("data", [b"", b"PK", b"hello world", b"PK\3\4" + bytes(100), b"\x1f\x8b" + bytes(50)])
def test_a_file_that_is_no_zip_is_refused(tmp_path, data):
    (tmp_path / "m.bin").write_bytes(data)
    refused(tmp_path / "m.bin", "is not a file of torch.save|broken zip")


def test_a_file_written_big_endian_is_refused(tmp_path):
    file = saved(tmp_path, {"a": torch.ones(2)})
    rewrite(file, lambda name, data: b"big" if name.endswith("/byteorder") else data)
    refused(file, "was written on a big-endian machine")


def test_a_compressed_zip_is_refused(tmp_path):
    file = saved(tmp_path, {"a": torch.ones(2)})
    with zipfile.ZipFile(file) as old:
        records = [(item.filename, old.read(item)) for item in old.infolist()]
    with zipfile.ZipFile(file, "w", compression=zipfile.ZIP_DEFLATED) as new:
        for name, data in records:
            new.writestr(name, data)
    refused(file, "data.pkl: is compressed in the zip")


def test_a_record_shorter_than_its_tensor_is_refused(tmp_path):
    file = saved(tmp_path, {"a": torch.ones(64), "b": torch.ones(2)})
    rewrite(file, lambda name, data: data[:100] if name.endswith("/data/0") else data)
    refused(file, "a: lies outside the zip's records")


def test_a_missing_record_is_refused(tmp_path):
    file = saved(tmp_path, {"a": torch.ones(64)})
    rewrite(file, lambda name, data: None if name.endswith("/data/0") else data)
    refused(file, "broken pickle|lies outside")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    file = saved(tmp_path, {"a": torch.ones(64), "b": torch.ones(2)})
    data = file.read_bytes()
    for n in (*range(5, 200, 13), len(data) // 2, len(data) - 100, len(data) - 1):
        file.write_bytes(data[:n])
        refused(file, "broken zip")


@given(st.data())
def test_any_broken_byte_gives_tensors_or_our_error(tmp_path_factory, data):
    file = saved(tmp_path_factory.mktemp("broken"), {"a": torch.ones(4), "b": {"c": torch.ones(2)}["c"]})
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        found = read_torch_file(file)
    except CheckpointError:
        return
    assert all(0 <= info.start <= info.end <= len(raw) for info in found)


def test_a_missing_file_is_an_error_and_no_traceback(tmp_path):
    refused(tmp_path / "none.bin", "cannot read: no such file")


def as_bin(folder, shards=1):
    """Turn a folder of safetensors into one with pytorch_model.bin, in one file or several."""
    made = {info.name: info for info in open_checkpoint(folder).tensors.values()}
    with open_files(info.file for info in made.values()) as descriptors:
        tensors = {name: read_stored(descriptors, info) for name, info in made.items()}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-{1 + n % shards:05d}-of-{shards:05d}.bin" for n, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_from_bins_gives_the_bytes_of_one_from_safetensors(workshop, shards):
    from_safetensors = workshop.merge("one", assign={"rule": "all"})
    for name in ("base", "a", "b"):
        as_bin(workshop.folder / name, shards)
    from_bins = workshop.merge("two", assign={"rule": "all"})
    for name in ("model.safetensors", "experts/a.safetensors", "experts/b.safetensors", "config.json"):
        assert (from_bins / name).read_bytes() == (from_safetensors / name).read_bytes()


def test_a_merge_of_one_bin_with_safetensors(workshop):
    alike = workshop.merge("one")
    as_bin(workshop.folder / "b")
    assert (workshop.merge("two") / "model.safetensors").read_bytes() == (alike / "model.safetensors").read_bytes()


def tiny_model(name):
    """A model with its input embeddings under several names."""
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, T5Config
    from transformers import T5ForConditionalGeneration as T5Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "t5":
        return T5Model(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    if name == "bert":
        return BertForMaskedLM(BertConfig(vocab_size=20, **sizes))
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **sizes))


@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_a_tensor_of_several_names_is_found_under_the_one_that_transformers_keeps(tmp_path, name):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    wanted = set(open_checkpoint(tmp_path).tensors)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert len(model.state_dict()) > len(wanted)
    assert set(open_checkpoint(tmp_path).tensors) == wanted


def test_second_names_that_mean_something_are_kept(tmp_path):
    table, layer, empty = torch.randn(4, 2), torch.randn(2, 2), torch.zeros(0)
    made = {"model.embed_tokens.weight": table, "model.layers.0.w": layer, "model.layers.1.w": layer}
    made |= {"model.empty": empty, "model.nothing": empty, "lm_head.weight": table, "model.other.weight": table}
    torch.save(made, tmp_path / "pytorch_model.bin")
    for tied, left_out in ((False, {"model.other.weight"}), (True, {"model.other.weight", "lm_head.weight"})):
        (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        assert set(open_checkpoint(tmp_path).tensors) == set(made) - left_out


def test_safetensors_win_over_bins(tmp_path):
    folder = write_checkpoint(tmp_path / "m", random_tensors(0))
    (folder / "pytorch_model.bin").write_bytes(b"never looked at")
    assert {info.file.name for info in open_checkpoint(folder).tensors.values()} == {"model.safetensors"}


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    places = dict.fromkeys(("a", "b"), "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="b: tensor is in the index but not in this file"):
        open_checkpoint(tmp_path)


def test_an_index_may_not_leave_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    places = {"a": "../elsewhere.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="unsafe file name"):
        open_checkpoint(tmp_path)
