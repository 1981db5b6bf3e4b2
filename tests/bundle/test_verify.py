"""`verify_bundle` against bundles made by hand: whatever is changed in any file is found."""

import json
import subprocess
import sys
from random import Random

import numpy as np
import pytest
from handmade import describe, make_bundle

from mediator_cli.bundle import digest
from mediator_cli.bundle.manifest import CONFLICTS, MANIFEST, ROUTER, to_json
from mediator_cli.bundle.sparse_file import open_sparse_file
from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.checkpoint.header import read_header
from mediator_cli.errors import BundleError, CheckpointError, Problem

CHANGED = "its bytes are not those that were written"
FIRST = "model-00001-of-00002.safetensors"
X1 = "experts/x-00001-of-00002.safetensors"


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "out")


def problems(bundle, workers=1):
    found = verify_bundle(bundle, workers=workers).problems
    return [(problem.place.removeprefix(f"{bundle}").lstrip("/"), problem.message) for problem in found]


def is_found(bundle):
    try:
        return bool(problems(bundle))
    except BundleError:
        return True


def flip(file, offset, bit=0):
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1 << bit
    file.write_bytes(raw)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_intact_bundle_is_clean(bundle, workers):
    result = verify_bundle(bundle, workers=workers)
    assert (result.problems, result.unknown) == ((), ())
    assert (result.n_tensors, result.n_sparse, result.n_files) == (5, 3, 4)


def test_all_bytes_of_weights_are_told_as_they_are_read(bundle):
    told = []
    verify_bundle(bundle, told.append)
    headers = {file: read_header(file).data_start for file in bundle.rglob("*.safetensors") if file.name != ROUTER}
    rest = sum((bundle / record.name).stat().st_size for record in describe(bundle).files)
    assert sum(told) == sum(file.stat().st_size - start for file, start in headers.items()) + rest


NAMES = [
    "README.md", "config.json", "model.safetensors.index.json", CONFLICTS, MANIFEST, ROUTER, FIRST,
    "model-00002-of-00002.safetensors", *(f"experts/{e}-0000{n}-of-00002.safetensors" for e in "xyz" for n in (1, 2)),
]  # fmt: skip


SHORT = ("README.md", "config.json", MANIFEST, ROUTER, FIRST, "experts/x-00001-of-00002.safetensors")
SOME = [pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", SOME)
def test_any_flipped_bit_is_found(bundle, name):
    file, random = bundle / name, Random(name)
    raw = file.read_bytes()
    places = [random.randrange(len(raw)) for _ in range(50)]
    # Headers and padding are the smaller part, and data begins behind them.
    places += [random.randrange(min(len(raw), 700)) for _ in range(25)] + [len(raw) - 1]
    for place in places:
        flip(file, place, random.randrange(8))
        assert is_found(bundle), place
        file.write_bytes(raw)
    assert problems(bundle) == []


def test_the_files_of_that_test_are_all_there_are(bundle):
    assert sorted(NAMES) == sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*.*"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [1, 8, 10**9])
def test_any_cut_is_found(bundle, name, cut):
    file = bundle / name
    raw = file.read_bytes()
    file.write_bytes(raw[: max(0, len(raw) - cut)])
    assert is_found(bundle)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_behind_the_end_are_found(bundle, name):
    file = bundle / name
    file.write_bytes(file.read_bytes() + b"\n")
    assert is_found(bundle)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(bundle, name):
    (bundle / name).unlink()
    if name == MANIFEST:
        with pytest.raises(BundleError, match="is it a bundle"):
            verify_bundle(bundle)
    elif name == "model.safetensors.index.json":
        assert (name, "is missing") in problems(bundle)
    else:
        # What the index says cannot be read then either.
        assert [found for found in problems(bundle) if "cannot read" not in found[1]] == [(name, "is missing")]


def test_a_file_that_nobody_knows_is_named_but_no_fault(bundle):
    (bundle / "experts" / "notes.txt").write_text("mine")
    result = verify_bundle(bundle)
    assert (result.problems, result.unknown) == ((), ("experts/notes.txt",))


def test_a_change_in_a_tensor_is_told_once_with_its_name(bundle):
    flip(bundle / FIRST, -1)
    assert problems(bundle) == [(": b.weight", CHANGED)]


def test_a_change_in_a_sparse_tensor_is_told_once_with_file_and_name(bundle):
    flip(bundle / X1, -16)
    assert problems(bundle)[0] == (f"{X1}: b.weight", CHANGED)


def test_a_change_of_metadata_is_told_of_the_file(bundle):
    file = bundle / FIRST
    assert file.read_bytes().count(b'"pt"') == 1
    file.write_bytes(file.read_bytes().replace(b'"pt"', b'"tf"'))
    assert problems(bundle) == [(FIRST, CHANGED)]


def test_even_the_spaces_at_the_end_of_a_header_belong_to_what_was_written(bundle):
    file = bundle / X1
    raw = bytearray(file.read_bytes())
    place = read_header(file).data_start - 1
    assert raw[place] == ord(" ")
    raw[place] = ord("\t")
    file.write_bytes(raw)
    assert problems(bundle) == [(X1, CHANGED)]


def test_two_shards_that_change_places_are_found(bundle):
    other = "model-00002-of-00002.safetensors"
    (bundle / FIRST).rename(bundle / "x")
    (bundle / other).rename(bundle / FIRST)
    (bundle / "x").rename(bundle / other)
    assert (": a.weight", f"lies in {other}, not in {FIRST}") in problems(bundle)


def test_the_file_of_another_expert_is_found(bundle):
    (bundle / X1).write_bytes((bundle / X1.replace("x-", "y-")).read_bytes())
    assert (f"{X1}: a.weight", CHANGED) in problems(bundle)


def edit(bundle, change):
    """Change the manifest as one who can set its checksum."""
    manifest = describe(bundle)
    (bundle / MANIFEST).write_text(to_json(change(manifest)))


def test_a_manifest_that_was_changed_by_hand_is_told(bundle):
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(data | {"seed": 1}))
    assert problems(bundle) == [(MANIFEST, CHANGED)]


def test_a_digest_that_does_not_fit_the_tensors_is_told(bundle):
    edit(bundle, lambda manifest: manifest.model_copy(update={"digest": "0" * 64}))
    assert problems(bundle) == [(f"{MANIFEST} digest", "does not fit the digests of its tensors")]


def test_digests_that_are_none_are_told(bundle):
    def change(manifest):
        tensors = {name: record.model_copy(update={"xxh3": "?"}) for name, record in manifest.tensors.items()}
        sparse = [
            record.model_copy(update={"tensors": dict.fromkeys(record.tensors, "")}) for record in manifest.sparse
        ]
        return manifest.model_copy(update={"tensors": tensors, "sparse": tuple(sparse)})

    edit(bundle, change)
    found = problems(bundle)
    assert {text for _, text in found[1:]} == {CHANGED}
    assert len(found) == 1 + 5 + 9


def test_a_tensor_of_another_form_is_told(bundle):
    def change(manifest):
        record = manifest.tensors["b.weight"].model_copy(update={"shape": (5, 10)})
        return manifest.model_copy(update={"tensors": manifest.tensors | {"b.weight": record}})

    edit(bundle, change)
    found = problems(bundle)
    assert found[0] == (": b.weight", "is F32 [50], not F32 [5, 10]")
    assert found[1:] == [(f"experts/{e}-00001-of-00002.safetensors: b.weight", "fits no dense tensor") for e in "xyz"]


def test_tensors_missing_on_either_side_are_told(bundle):
    def change(manifest):
        tensors = dict(manifest.tensors)
        tensors["e"] = tensors.pop("n")
        sparse = list(manifest.sparse)
        digests = {"gone": "", **sparse[0].tensors}
        digests.pop("c.weight")
        sparse[0] = sparse[0].model_copy(update={"tensors": digests})
        return manifest.model_copy(update={"tensors": tensors, "sparse": tuple(sparse)})

    edit(bundle, change)
    found = problems(bundle)
    assert (": e", "is missing in the weight files") in found
    assert (": n", "is missing in the manifest") in found
    assert ("x: gone", "is missing in the weight files") in [(place.strip(), text) for place, text in found]
    assert ("x: c.weight", "is missing in the manifest") in [(place.strip(), text) for place, text in found]


def overwrite(file, name, raw, at=0):
    info = next(info for info in read_header(file).tensors if info.name == name)
    data = bytearray(file.read_bytes())
    data[info.start + at : info.start + at + len(raw)] = raw
    file.write_bytes(data)


NOT_FINITE = {
    "dense BF16": (FIRST, "a.weight", np.array([0x7F80], "<u2"), ": a.weight"),
    "dense BF16 NaN": (FIRST, "a.weight", np.array([0xFFC1], "<u2"), ": a.weight"),
    "dense F32": (FIRST, "b.weight", np.array([np.nan], "<f4"), ": b.weight"),
    "dense F16": ("model-00002-of-00002.safetensors", "c.weight", np.array([0xFC00], "<u2"), ": c.weight"),
    "sparse F16": ("experts/z-00002-of-00002.safetensors", "c.weight.values", np.array([0x7C00], "<u2"), None),
    "override": ("experts/z-00001-of-00002.safetensors", "b.weight.override_values", np.array([np.inf], "<f4"), None),
    "router": (ROUTER, "classifier.mean", np.array([-np.inf], "<f4"), None),
}


@pytest.mark.parametrize(("name", "tensor", "value", "place"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_what_is_no_number_is_told_even_under_right_digests(bundle, name, tensor, value, place):
    overwrite(bundle / name, tensor, value.tobytes())
    edit(bundle, lambda manifest: manifest)
    assert problems(bundle) == [(place or f"{name}: {tensor}", "holds NaN or infinite values")]


STRUCTURE = {
    "a gap too far": ("experts/x-00002-of-00002.safetensors", "c.weight.gaps", b"\x80", "c.weight", "beyond its 77"),
    "a gap more": ("experts/x-00002-of-00002.safetensors", "c.weight.gaps", b"\xff", "c.weight", "positions, not"),
    "all bits": (X1, "a.weight.bitmap", b"\xff", "a.weight", "positions, not"),
    "override": ("experts/z-00001-of-00002.safetensors", "b.weight.override_index", b"\xff" * 8, "b.weight", "beyond"),
}


@pytest.mark.parametrize(("name", "array", "raw", "tensor", "message"), STRUCTURE.values(), ids=STRUCTURE)
def test_positions_that_do_not_fit_are_told_even_under_right_digests(bundle, name, array, raw, tensor, message):
    overwrite(bundle / name, array, raw)
    edit(bundle, lambda manifest: manifest)
    ((place, text),) = problems(bundle)
    assert place == f"{name}: {tensor}"
    assert message in text
    with pytest.raises(BundleError, match=r"positions, not|beyond"):
        open_sparse_file(bundle / name).decode(tensor)


def test_all_that_is_wrong_is_told_at_once(bundle):
    flip(bundle / "config.json", 0)
    flip(bundle / FIRST, -1)
    flip(bundle / "experts/y-00002-of-00002.safetensors", 3)
    (bundle / ROUTER).unlink()
    places = [place for place, _ in problems(bundle)]
    assert places == [": b.weight", "experts/y-00002-of-00002.safetensors", "config.json", ROUTER]


def test_a_disk_that_fails_is_told_of_the_file_and_the_rest_is_checked(bundle, monkeypatch):
    real = digest.read_into

    def failing(descriptors, info, first, array):
        if info.name == "a.weight":
            raise CheckpointError(Problem(str(info.file), "cannot read: input/output error"))
        real(descriptors, info, first, array)

    monkeypatch.setattr(digest, "read_into", failing)
    flip(bundle / "config.json", 0)
    assert problems(bundle) == [(FIRST, "cannot read: input/output error"), ("config.json", CHANGED)]


def test_a_report_of_another_form_is_told(bundle):
    (bundle / CONFLICTS).write_text('{"schema_version": 1}')
    edit(bundle, lambda manifest: manifest)
    assert problems(bundle) == [(CONFLICTS, "is a conflict report of version 1, written by an older mediator")]


def test_writing_and_verifying_need_no_torch():
    modules = "digest, entries, manifest, replace, sparse, sparse_file, sparse_writer, verify"
    program = f"import sys\nfrom mediator_cli.bundle import {modules}\nassert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
