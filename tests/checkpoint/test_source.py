"""Which folders are checkpoints, and why the others are not."""

import json

import pytest
import torch
from conftest import random_tensors, write_adapter, write_checkpoint
from safetensors.torch import save_file
from stored_tensors import read_stored

from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.read import FullReader, open_files, read_bytes, read_floats, read_slab
from mediator_cli.checkpoint.source import find_location, is_adapter, open_checkpoint, side_files, weight_files
from mediator_cli.errors import CheckpointError


@pytest.mark.parametrize("name", ["plain", "with space", "ünïcode 模型", "a'quote", "per%cent"])
def test_any_folder_name_works(tmp_path, name):
    made = random_tensors(0)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / name, made))
    assert set(checkpoint.tensors) == set(made)
    with open_files(weight_files(checkpoint.tensors)) as descriptors:
        read = read_floats(FullReader(descriptors, checkpoint.tensors), "model.norm.weight", 2, 5)
    assert torch.equal(torch.from_numpy(read), made["model.norm.weight"][2:5].float())


def test_a_link_to_a_folder_and_links_to_files_are_followed(tmp_path):
    real = write_checkpoint(tmp_path / "real", random_tensors(0))
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "snapshot").mkdir()
    for file in real.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    for name in ("link", "snapshot"):
        assert len(open_checkpoint(find_location(name, tmp_path / name).folder).tensors) == len(random_tensors(0))


def test_linked_sources_merge_as_the_real_ones(workshop):
    real = workshop.merge("real", assign={"rule": "all"})
    (workshop.folder / "b").rename(workshop.folder / "ünï code")
    (workshop.folder / "b").symlink_to("ünï code")
    linked = workshop.merge("linked", assign={"rule": "all"})
    for name in ("model.safetensors", "experts/b.safetensors"):
        assert (real / name).read_bytes() == (linked / name).read_bytes()


def test_integer_buffers_are_no_quantisation(tmp_path):
    tensors = random_tensors(0) | {"model.position_ids": torch.arange(4), "model.mask": torch.ones(2).bool()}
    assert len(open_checkpoint(write_checkpoint(tmp_path / "m", tensors)).tensors) == len(tensors)


@pytest.mark.parametrize(
    ("source", "file", "message"),
    [
        ("model.gguf", "model.gguf", "cannot read the GGUF"),
        ("notes.txt", "notes.txt", "is not a folder"),
        ("none", None, "no such folder"),
    ],
)
def test_a_path_that_is_no_folder_is_refused(tmp_path, source, file, message):
    if file:
        (tmp_path / file).write_text("x")
    with pytest.raises(CheckpointError, match=message):
        find_location(source, tmp_path / source)


def test_a_sharded_checkpoint_is_read_from_all_its_files(tmp_path):
    made = random_tensors(0)
    names = sorted(made)
    places = {name: f"model-{1 + n % 3:05d}-of-00003.safetensors" for n, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: made[name] for name in names if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == places
    with open_files(weight_files(checkpoint.tensors)) as descriptors:
        for name, info in checkpoint.tensors.items():
            assert torch.equal(read_stored(descriptors, info), made[name])


def test_bytes_are_those_of_the_file(tmp_path):
    save_file({"a": torch.arange(100, dtype=torch.int32)}, tmp_path / "m")
    (info,) = read_header(tmp_path / "m").tensors
    with open_files([tmp_path / "m"]) as descriptors:
        assert read_slab(descriptors, info, 10, 13).tolist() == [10, 11, 12]
        assert read_bytes(descriptors, info, 4, 9).tolist() == [1, 0, 0, 0, 2]


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path):
    save_file({"a": torch.arange(100)}, tmp_path / "m")
    (info,) = read_header(tmp_path / "m").tensors
    with open_files([tmp_path / "m"]) as descriptors:
        (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="the file ends before its last tensor"):
            read_slab(descriptors, info, 0, 100)


def test_adapters_are_told_from_checkpoints(tmp_path):
    assert is_adapter(write_adapter(tmp_path / "x", 0))
    assert not is_adapter(write_checkpoint(tmp_path / "m", random_tensors(0)))


def test_side_files_are_those_of_tokenizer_and_templates(tmp_path):
    folder = write_checkpoint(tmp_path / "m", random_tensors(0))
    kept = [
        "1_Pooling/config.json", "added_tokens.json", "additional_chat_templates/tool.jinja", "chat_template.jinja",
        "chat_template.json", "config_sentence_transformers.json", "merges.txt", "modules.json", "own.jinja",
        "preprocessor_config.json", "processor_config.json", "qwen.tiktoken", "sentence_bert_config.json",
        "sentencepiece.bpe.model", "source.spm", "special_tokens_map.json", "spiece.model", "tokenizer.json",
        "tokenizer.model.v3", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.bpe", "vocab.json",
    ]  # fmt: skip
    left = ["tokenization_own.py", "tokenizer_own.py", "vocab.bin", "tokenizer.gguf", "notes.txt", "onnx/vocab.json"]
    for name in [*kept, *left]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert [file.relative_to(folder).as_posix() for file in side_files(folder)] == sorted(kept)


@pytest.mark.parametrize(("config", "tied"), [({}, True), ({"tie_word_embeddings": False}, False)])
def test_the_config_says_whether_the_head_is_tied(tmp_path, config, tied):
    assert open_checkpoint(write_checkpoint(tmp_path / "m", random_tensors(0), config)).is_tied is tied
