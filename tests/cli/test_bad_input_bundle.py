"""The bad-input table, bundles: what `verify` and `inspect` must find, and names that would leave the bundle."""

import json

import pytest
import torch
from conftest import all_files, edit_tensors, put, write_adapter

OUTSIDE = ["../a/model.safetensors", "sub/../../a", "/etc/passwd", "..", "", "a\\b", "C:x"]
REFUSE = "do not use this bundle"
DAMAGED = "fetch the bundle again or merge again"
NORM = "model.norm.weight"


@pytest.fixture
def bundle(workshop):
    return workshop.merge("out", assign={"rule": "all"}, extract={"density": 0.5})


def edit_manifest(bundle, change):
    file = bundle / "routing_manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_name_that_leaves_the_bundle_is_refused(bundle, refused, command, name):
    edit_manifest(bundle, lambda data: data["files"][0].update(name=name))
    refused("out/routing_manifest.json", f"unsafe file name {name!r}", REFUSE, command, "out")


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_tensor_file_that_leaves_the_bundle_is_refused(bundle, refused, command, name):
    edit_manifest(bundle, lambda data: data["tensors"][NORM].update(file=name))
    refused("out/routing_manifest.json", f"unsafe file name {name!r}", REFUSE, command, "out")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_sparse_file_that_leaves_the_bundle_is_refused(bundle, refused, name):
    edit_manifest(bundle, lambda data: data["sparse"][0]["files"][0].update(name=name))
    refused("out/routing_manifest.json", f"unsafe file name {name!r}", REFUSE, "verify", "out")


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("name", ["../a/model.safetensors", "..", "sub/model.safetensors", ""])
def test_an_index_that_leaves_the_bundle_is_refused(bundle, refused, command, name):
    (bundle / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    hint = "file names may not leave their folder"
    refused("out/model.safetensors.index.json", f"unsafe file name {name!r}", hint, command, "out")


LINKS = ["model.safetensors", "config.json", "conflicts.json", "experts/a.safetensors", "routing_manifest.json"]


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_bundle_is_refused_even_to_the_same_bytes(bundle, workshop, refused, command, name):
    moved = workshop.folder / "moved"
    (bundle / name).rename(moved)
    (bundle / name).symlink_to(moved)
    refused(f"out/{name}", "is a link that leads out of the bundle", REFUSE, command, "out")


def test_a_folder_that_is_a_link_out_of_the_bundle_is_refused(bundle, workshop, refused):
    (bundle / "experts").rename(workshop.folder / "moved")
    (bundle / "experts").symlink_to(workshop.folder / "moved")
    refused("out/experts/a.safetensors", "is a link that leads out of the bundle", REFUSE, "verify", "out")


def test_a_link_inside_the_bundle_is_fine(bundle, mediator):
    (bundle / "config.json").rename(bundle / "real.json")
    (bundle / "config.json").symlink_to("real.json")
    run = mediator("verify", "out")
    assert run.code == 0
    assert "warning: real.json is not named in the manifest" in run.err


def test_a_folder_that_is_no_bundle_is_not_verified(refused):
    refused("base", "has no routing_manifest.json", "is it a bundle?", "verify", "base")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_folder_that_is_not_there_is_told(refused, workshop, command):
    place = f"{workshop.folder}/gone" if command == "inspect" else "gone"
    refused(place, "no such folder", "", command, "gone")


def test_an_adapter_is_told_from_a_bundle(workshop, refused):
    write_adapter(workshop.folder / "mine", 1)
    refused("mine", "has no routing_manifest.json", "it is an adapter", "verify", "mine")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_manifest_that_is_broken_json_is_told(bundle, refused, command):
    (bundle / "routing_manifest.json").write_text('{"schema_version": 1')
    refused("out/routing_manifest.json", "broken JSON", "the file is damaged", command, "out")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_bundle_of_an_older_mediator_is_told_as_such(bundle, refused, command):
    edit_manifest(bundle, lambda data: data.update(schema_version=1))
    message = "is a manifest of version 1, written by an older mediator"
    refused("out/routing_manifest.json", message, "merge again", command, "out")


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        (lambda data: data.update(schema_version=6), "schema_version", "input should be 2, 3, 4 or 5"),
        (lambda data: data.update(extra=2), "extra", "extra inputs are not permitted"),
        (lambda data: data.pop("digest"), "digest", "field required"),
        (
            lambda data: data["tensors"][NORM].update(shape="wide"),
            f"tensors.{NORM}.shape",
            "input should be a valid tuple",
        ),
    ],
)
def test_a_manifest_of_another_form_is_told_with_its_field(bundle, refused, change, field, message):
    edit_manifest(bundle, change)
    refused(f"out/routing_manifest.json {field}", f"not a manifest: {message}", "newer version", "verify", "out")


def flip(file, offset=-1):
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("name", ["config.json", "conflicts.json", "README.md", "tokenizer.json"])
def test_a_changed_byte_in_a_file_is_found(bundle, refused, name):
    flip(bundle / name, 3)
    refused(f"out/{name}", "its bytes are not those that were written", DAMAGED, "verify", "out")


def test_a_changed_byte_in_a_tensor_is_found(bundle, refused):
    flip(bundle / "model.safetensors")
    refused(f"out: {NORM}", "its bytes are not those that were written", DAMAGED, "verify", "out")


def test_a_changed_byte_in_a_sparse_expert_is_found(bundle, refused):
    flip(bundle / "experts" / "b.safetensors")
    message = "its bytes are not those that were written"
    refused(f"out/experts/b.safetensors: {NORM}", message, DAMAGED, "verify", "out")


@pytest.mark.parametrize("name", ["model.safetensors", "experts/b.safetensors"])
def test_a_changed_byte_in_a_header_is_found(bundle, refused, name):
    raw = (bundle / name).read_bytes()
    (bundle / name).write_bytes(raw.replace(b'"format":"', b'"fOrmat":"', 1))
    message = "its bytes are not those that were written" if name == "model.safetensors" else "is not a sparse expert"
    refused(f"out/{name}", message, "", "verify", "out")


def test_a_manifest_that_was_changed_by_hand_is_found(bundle, refused):
    edit_manifest(bundle, lambda data: data.update(seed=5))
    message = "its bytes are not those that were written"
    refused("out/routing_manifest.json", message, DAMAGED, "verify", "out")


def test_a_nan_in_the_dense_expert_is_found(bundle, refused):
    nan = torch.full((8,), float("nan"), dtype=torch.bfloat16)
    edit_tensors(bundle / "model.safetensors", put(NORM, nan))
    refused(f"out: {NORM}", "holds NaN or infinite values", DAMAGED, "verify", "out")


def test_a_tensor_of_another_shape_is_found(bundle, refused):
    edit_tensors(bundle / "model.safetensors", put(NORM, torch.zeros(2, 4, dtype=torch.bfloat16)))
    refused(f"out: {NORM}", "is BF16 [2, 4], not BF16 [8]", DAMAGED, "verify", "out")


def test_a_tensor_too_few_is_found(bundle, refused):
    edit_tensors(bundle / "model.safetensors", lambda tensors: tensors.pop(NORM))
    refused(f"out: {NORM}", "is missing in the weight files", DAMAGED, "verify", "out")


def test_a_tensor_too_many_is_found(bundle, refused):
    edit_tensors(bundle / "model.safetensors", put("extra", torch.zeros(2)))
    refused("out: extra", "is missing in the manifest", DAMAGED, "verify", "out")


@pytest.mark.parametrize("name", ["config.json", "experts/a.safetensors"])
def test_a_missing_file_is_found(bundle, refused, name):
    (bundle / name).unlink()
    refused(f"out/{name}", "is missing", DAMAGED, "verify", "out")


def test_a_truncated_model_is_found(bundle, refused):
    file = bundle / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused("out/model.safetensors", "truncated: ", "the file is damaged", "verify", "out")


def test_all_damage_is_listed_at_once_as_json(bundle, mediator):
    flip(bundle / "config.json", 3)
    flip(bundle / "model.safetensors")
    (bundle / "notes.txt").write_text("mine")
    run = mediator("verify", "out", "--json")
    report = json.loads(run.out)
    assert run.code == 2
    assert report["valid"] is False
    assert [problem["place"] for problem in report["problems"]] == [f"out: {NORM}", "out/config.json"]
    assert report["unknown_files"] == ["notes.txt"]


def test_verify_and_inspect_change_nothing(bundle, workshop, mediator):
    before = all_files(workshop.folder)
    assert mediator("verify", "out").code == 0
    assert mediator("inspect", "out").code == 0
    assert all_files(workshop.folder) == before


def test_a_folder_without_weights_is_not_inspected(workshop, refused):
    (workshop.folder / "base" / "model.safetensors").unlink()
    refused("base", "holds no safetensors weights", "a checkpoint has", "inspect", "base")


def test_an_adapter_with_a_broken_config_is_not_inspected(workshop, refused):
    (workshop.folder / "lora" / "adapter_config.json").write_text("{")
    refused("lora/adapter_config.json", "broken JSON", "damaged", "inspect", "lora")


def test_a_bundle_whose_manifest_is_gone_is_never_overwritten(bundle, workshop, refused):
    (bundle / "routing_manifest.json").unlink()
    workshop.recipe()
    words = ("merge", "recipe.yaml", "-o", "out", "--overwrite")
    refused(f"{workshop.folder}/out", "exists and is not a bundle", "remove it by hand", *words)
