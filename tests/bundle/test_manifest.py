"""The manifest's own text: its checksum, its version, the digest of a bundle, names of files."""

import hashlib
import json

import pytest
from handmade import make_bundle

from mediator_cli.bundle.checksum import fits_checksum
from mediator_cli.bundle.manifest import CONFLICTS, MANIFEST, bundle_digest, file_names, read_manifest, to_json
from mediator_cli.bundle.sparse_file import sparse_file_name
from mediator_cli.errors import BundleError


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "out")


def test_the_checksum_is_that_of_the_text_without_it(bundle):
    text = (bundle / MANIFEST).read_text()
    found = json.loads(text)["checksum"]
    assert text.count(found) == 1
    assert hashlib.sha256(text.replace(found, "").encode()).hexdigest() == found
    assert fits_checksum(text, found)


def test_a_manifest_that_is_written_again_is_the_same(bundle):
    text = (bundle / MANIFEST).read_text()
    assert to_json(read_manifest(bundle)) == text
    other = read_manifest(bundle).model_copy(update={"seed": 1})
    assert fits_checksum(to_json(other), json.loads(to_json(other))["checksum"])
    assert not fits_checksum(text.replace('"seed": 0', '"seed": 1'), json.loads(text)["checksum"])


def test_a_field_of_that_name_elsewhere_changes_nothing(bundle):
    manifest = read_manifest(bundle)
    assert '"checksum": ""' in manifest.recipe.text
    text = to_json(manifest.model_copy(update={"notices": ('"checksum": ""',)}))
    assert fits_checksum(text, json.loads(text)["checksum"])


def test_an_older_manifest_is_told_as_such(bundle):
    data = json.loads((bundle / MANIFEST).read_text()) | {"schema_version": 1}
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="is a manifest of version 1, written by an older mediator") as raised:
        read_manifest(bundle)
    assert raised.value.problems[0].place == str(bundle / MANIFEST)
    assert raised.value.problems[0].hint == "merge again"


@pytest.mark.parametrize("version", [6, "2", None, True])
def test_a_version_of_another_kind_is_refused(bundle, version):
    data = json.loads((bundle / MANIFEST).read_text()) | {"schema_version": version}
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"not a manifest|older mediator"):
        read_manifest(bundle)


def test_all_files_are_listed(bundle):
    present = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert sorted(file_names(read_manifest(bundle))) == sorted(present - {MANIFEST})
    assert CONFLICTS in present


OUTSIDE = ["../x", "sub/../../a", "/etc/passwd", "..", "", "a\\b", "C:x"]
PLACES = {
    "file": lambda data, name: data["files"][0].update(name=name),
    "shard": lambda data, name: data["shards"][1].update(name=name),
    "tensor": lambda data, name: data["tensors"]["a.weight"].update(file=name),
    "sparse": lambda data, name: data["sparse"][2]["files"][1].update(name=name),
    "router": lambda data, name: data["router"]["file"].update(name=name),
}


@pytest.mark.parametrize("change", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_the_bundle_is_refused_wherever_it_stands(bundle, change, name):
    data = json.loads((bundle / MANIFEST).read_text())
    change(data, name)
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="unsafe file name"):
        read_manifest(bundle)


def test_an_expert_without_files_is_refused(bundle):
    data = json.loads((bundle / MANIFEST).read_text())
    data["sparse"][0]["files"] = []
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"sparse.0.files: not a manifest"):
        read_manifest(bundle)


def test_the_digest_of_a_bundle_is_that_of_its_lines():
    text = "d2  a\nd1  b\ne2  experts/x/v\ne1  experts/x/w\ne3  experts/y/v\n"
    digest = bundle_digest({"b": "d1", "a": "d2"}, {"y": {"v": "e3"}, "x": {"w": "e1", "v": "e2"}})
    assert digest == hashlib.sha256(text.encode()).hexdigest()


def test_files_of_an_expert_are_numbered_where_there_are_several():
    assert sparse_file_name("maths", 1, 1) == "experts/maths.safetensors"
    assert [sparse_file_name("a.b", n, 12) for n in (1, 12)] == [
        "experts/a.b-00001-of-00012.safetensors",
        "experts/a.b-00012-of-00012.safetensors",
    ]
