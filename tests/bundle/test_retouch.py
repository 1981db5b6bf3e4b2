"""Tensors of a finished folder get other values, in a copy or in place, and the manifest fits."""

import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import all_files, edit_tensors, make_workshop, put, random_tensors, write_checkpoint
from crashes import at_call
from safetensors.torch import load_file

from mediator_cli import verify_bundle
from mediator_cli.bundle.manifest import MANIFEST, read_manifest
from mediator_cli.bundle.retouch import retouch
from mediator_cli.errors import BundleError, CheckpointError, OutputError

NORM, FIRST, LAST = "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"


def values(name, seed=5):
    shape = random_tensors(0)[name].shape
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stored(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A bundle without routed layers whose dense expert lies in several files."""
    shop = make_workshop(tmp_path_factory.mktemp("retouch"))
    return shop.merge("out", output={"shard_size": "1KB"})


@pytest.fixture
def bundle(merged, tmp_path):
    return shutil.copytree(merged, tmp_path / "bundle")


def test_a_copy_has_the_new_values_rounded_once_and_all_else_as_it_was(bundle, tmp_path):
    before = all_files(bundle)
    retouch(bundle, tmp_path / "deep" / "new", {NORM: values(NORM), FIRST: values(FIRST).astype(np.float64)})
    assert all_files(bundle) == before
    old, new = stored(bundle), stored(tmp_path / "deep" / "new")
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        expected = torch.from_numpy(values(name)).bfloat16() if name in (NORM, FIRST) else old[name]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected)
    touched = {read_manifest(bundle).tensors[name].file for name in (NORM, FIRST)}
    changed = {name for name, data in all_files(tmp_path / "deep" / "new").items() if data != before[name]}
    assert changed == {*touched, MANIFEST}


def test_in_place_is_the_same_and_leaves_other_files_untouched(bundle, tmp_path):
    what = {NORM: values(NORM), LAST: values(LAST)}
    retouch(bundle, tmp_path / "new", what, files={"report.json": b"{}"}, note="trained")
    stamps = {path.name: path.stat().st_mtime_ns for path in bundle.glob("*.safetensors")}
    inodes = {path.name: path.stat().st_ino for path in bundle.glob("*.safetensors")}
    retouch(bundle, bundle, what, files={"report.json": b"{}"}, note="trained")
    assert all_files(bundle) == all_files(tmp_path / "new")
    touched = {read_manifest(bundle).tensors[name].file for name in what}
    for path in bundle.glob("*.safetensors"):
        same = (path.stat().st_mtime_ns, path.stat().st_ino) == (stamps[path.name], inodes[path.name])
        assert same == (path.name not in touched)


@pytest.mark.parametrize("inside", [True, False])
def test_the_manifest_fits_and_tells_of_it(bundle, tmp_path, inside):
    target = bundle if inside else tmp_path / "new"
    old, tensor = read_manifest(bundle), stored(bundle)[NORM]
    retouch(bundle, target, {NORM: values(NORM)}, files={"README.md": b"new", "a.txt": b""}, note="trained")
    check, new = verify_bundle(target), read_manifest(target)
    assert check.problems == check.unknown == ()
    assert new.notices == (*old.notices, "trained")
    assert new.digest != old.digest
    assert [file.name for file in new.files][:2] == ["README.md", "a.txt"]
    retouch(target, target, {NORM: tensor.float().numpy()})
    assert read_manifest(target).digest == old.digest


def test_a_plain_folder_needs_no_manifest_and_every_float_dtype_is_kept(tmp_path):
    tensors = random_tensors(0)
    tensors[FIRST], tensors[LAST] = tensors[FIRST].half(), tensors[LAST].double()
    tensors[NORM] = tensors[NORM].float()
    write_checkpoint(tmp_path / "plain", tensors)
    exact = values(LAST).astype(np.float64) / 3
    retouch(tmp_path / "plain", tmp_path / "new", {FIRST: values(FIRST), NORM: values(NORM), LAST: exact})
    new = stored(tmp_path / "new")
    assert torch.equal(new[FIRST], torch.from_numpy(values(FIRST)).half())
    assert torch.equal(new[NORM], torch.from_numpy(values(NORM)))
    assert torch.equal(new[LAST], torch.from_numpy(exact))
    assert not (tmp_path / "new" / MANIFEST).exists()


def test_a_folder_of_links_becomes_files_and_their_targets_stay(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", random_tensors(0))
    blob = (tmp_path / "plain" / "model.safetensors").rename(tmp_path / "blob")
    blob.chmod(0o444)
    (plain / "model.safetensors").symlink_to(blob)
    before = blob.read_bytes()
    retouch(plain, tmp_path / "new", {NORM: values(NORM)})
    retouch(plain, plain, {NORM: values(NORM)})
    assert blob.read_bytes() == before
    for folder in (plain, tmp_path / "new"):
        assert not (folder / "model.safetensors").is_symlink()
        assert torch.equal(stored(folder)[NORM], torch.from_numpy(values(NORM)).bfloat16())


BAD = {
    "nan": ({NORM: np.full(8, np.nan, np.float32)}, "hold NaN"),
    "too large": ({NORM: np.full(8, 3.4e38, np.float32)}, "too large for BF16"),
    "too large for float32": ({NORM: np.full(8, 1e300)}, "too large for BF16"),
    "shape": ({NORM: np.zeros((2, 4), np.float32)}, r"\[8\]; its new values are float32 \[2, 4\]"),
    "integers": ({NORM: np.zeros(8, np.int64)}, "its new values are int64"),
    "name": ({"model.nrm.weight": np.zeros(8, np.float32)}, r"no such tensor\n.*did you mean 'model.norm.weight'"),
}


@pytest.mark.parametrize(("what", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("inside", [True, False])
def test_what_cannot_be_stored_changes_nothing(bundle, tmp_path, inside, what, message):
    before = all_files(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        retouch(bundle, bundle if inside else tmp_path / "new", {FIRST: values(FIRST)} | what)
    assert all_files(tmp_path) == before


def test_a_target_in_the_way_is_refused(bundle, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("x")
    for target, message in ((tmp_path / "new", "exists"), (bundle / "new", "lies in")):
        with pytest.raises(OutputError, match=message):
            retouch(bundle, target, {NORM: values(NORM)})
    (tmp_path / "new" / "mine.txt").unlink()
    retouch(bundle, tmp_path / "new", {NORM: values(NORM)})
    assert verify_bundle(tmp_path / "new").problems == ()


def test_a_file_that_leads_out_of_the_folder_is_refused(bundle, tmp_path):
    before = all_files(tmp_path)
    with pytest.raises(BundleError, match="unsafe file name"):
        retouch(bundle, bundle, {NORM: values(NORM)}, files={"../x": b""})
    assert all_files(tmp_path) == before


def test_integers_are_left_alone(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", random_tensors(0))
    edit_tensors(plain / "model.safetensors", put("ids", torch.arange(4)))
    with pytest.raises(CheckpointError, match="holds no floats"):
        retouch(plain, plain, {"ids": np.zeros(4, np.float32)})


@pytest.mark.parametrize("inside", [True, False])
def test_a_disk_that_fails_at_any_call_leaves_a_folder_that_loads(bundle, tmp_path, inside):
    target = bundle if inside else tmp_path / "new"
    what = {NORM: values(NORM), LAST: values(LAST)}
    old, finished = stored(bundle), False
    new = old | {name: torch.from_numpy(array).bfloat16() for name, array in what.items()}
    number = 0
    while not finished:
        number += 1

        def fail():
            raise OSError(28, "No space left on device")

        with at_call(number, fail, ("pwrite", "fsync", "rename", "replace")) as made:
            with suppress(OutputError):
                retouch(bundle, target, what)
            finished = made() < number
        if target.exists():
            found = stored(target)
            assert all(torch.equal(found[name], old[name]) or torch.equal(found[name], new[name]) for name in old)
        leftovers = [path.name for path in tmp_path.rglob(".*")]
        assert leftovers == []
        if not inside:
            shutil.rmtree(target, ignore_errors=not finished)
    assert number > 5
    if inside:
        assert verify_bundle(target).problems == ()
        assert all(torch.equal(stored(target)[name], tensor) for name, tensor in new.items())
