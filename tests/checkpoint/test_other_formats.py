"""Folders that hold no weights we read, and weights under other names: one clear message each."""

import json

import pytest
import torch
from conftest import CONFIG, random_tensors, write_checkpoint
from safetensors.torch import save_file

from mediator_cli.checkpoint.formats import find_weights, list_names
from mediator_cli.checkpoint.source import find_location, open_checkpoint
from mediator_cli.errors import CheckpointError


def folder_of(tmp_path, *names, config=True):
    for name in (*names, *(["config.json"] if config else [])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(CONFIG))
    return tmp_path


def refused(folder):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        (["model_index.json", "unet/config.json"], "is a pipeline of diffusers", "only models of transformers"),
        (["consolidated.00.pth", "params.json"], "holds the original weights of Meta", "often named -hf"),
        (["tf_model.h5"], "holds TensorFlow weights alone", "from_tf=True"),
        (["tf_model-00001-of-00002.h5"], "holds TensorFlow weights alone", "'transformers<5'"),
        (["flax_model.msgpack"], "holds Flax weights alone", "from_flax=True"),
        (["model.onnx"], "holds an ONNX export alone", "that it was exported from"),
        (["onnx/model.onnx"], "holds an ONNX export alone", "that it was exported from"),
        (["weights.pt"], "under a name that transformers does not read", "save_pretrained"),
        (["last.ckpt"], "under a name that transformers does not read", "save_pretrained"),
        (["tokenizer.json"], "holds no safetensors weights", "a checkpoint has model.safetensors"),
        (["training_args.bin"], "holds no safetensors weights", "a checkpoint has model.safetensors"),
        (
            ["checkpoint-50/model.safetensors", "checkpoint-100/model.safetensors"],
            "holds no weights itself, checkpoint-50 in it does",
            "name {folder}/checkpoint-50",
        ),
        (
            ["modules.json", "0_Transformer/pytorch_model.bin"],
            "holds no weights itself, 0_Transformer in it does",
            "name {folder}/0_Transformer",
        ),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "without the index model.safetensors.index.json",
            "fetch model.safetensors.index.json as well",
        ),
        (["model-00001-of-00001.safetensors"], "without the index model.safetensors.index.json", "fetch"),
        (["pytorch_model-00001-of-00002.bin"], "without the index pytorch_model.bin.index.json", "fetch"),
        (
            ["a.safetensors", "b.safetensors"],
            "holds a.safetensors, b.safetensors without the index",
            "save it again",
        ),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_what_a_folder_holds_instead_is_said(tmp_path, names, message, hint, config):
    problem = refused(folder_of(tmp_path, *names, config=config))
    assert problem.place == str(tmp_path)
    assert message in problem.message
    assert hint.format(folder=tmp_path) in problem.hint


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    assert refused(tmp_path).message == "is an empty folder"


def test_weights_without_a_config_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path, random_tensors(0))
    (folder / "config.json").unlink()
    assert refused(folder).place == str(folder / "config.json")


@pytest.mark.parametrize("name", ["pytorch_model.safetensors", "consolidated.safetensors", "my model.safetensors"])
def test_the_only_safetensors_file_may_have_any_name(tmp_path, name):
    folder = write_checkpoint(tmp_path, random_tensors(0))
    (folder / "model.safetensors").rename(folder / name)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == set(random_tensors(0))
    assert {info.file.name for info in checkpoint.tensors.values()} == {name}


def test_the_original_format_of_mistral_is_not_taken_beside_that_of_transformers(tmp_path):
    folder = write_checkpoint(tmp_path, random_tensors(0))
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    assert set(open_checkpoint(folder).tensors) == set(random_tensors(0))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert {info.file.name for info in open_checkpoint(folder).tensors.values()} == {"other.safetensors"}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "model.safetensors"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "pytorch_model.bin"),
        (["pytorch_model.bin", "tf_model.h5", "model.onnx"], "pytorch_model.bin"),
        (["pytorch_model.safetensors", "pytorch_model.bin"], "pytorch_model.safetensors"),
        (["onnx/model.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
    ],
)
def test_which_file_holds_the_weights(names, wanted):
    assert find_weights("here", names) == wanted


def test_names_are_listed_two_deep(tmp_path):
    folder_of(tmp_path, "a.json", "b/c.json", "b/d/e.json", config=False)
    assert list_names(tmp_path) == ["a.json", "b/c.json"]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 1234\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json"])
def test_pointers_of_git_lfs_are_told_from_files(tmp_path, name):
    folder = write_checkpoint(tmp_path, random_tensors(0))
    (folder / name).write_text(POINTER)
    problem = refused(folder)
    assert problem.place == str(folder / name)
    assert problem.message == "is a pointer of git-lfs, not the file itself"
    assert problem.hint == f"run `git lfs pull` in {folder}"


def test_a_gguf_may_be_a_pointer_too(tmp_path):
    (tmp_path / "m.gguf").write_text(POINTER)
    with pytest.raises(CheckpointError, match="is a pointer of git-lfs"):
        find_location("m.gguf", tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_file_instead_of_its_folder_gets_the_folder(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="is not a folder") as caught:
        find_location(name, tmp_path / name)
    assert str(tmp_path) in caught.value.problems[0].hint
