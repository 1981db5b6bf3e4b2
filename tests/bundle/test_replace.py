"""Files of a finished bundle are replaced together with the manifest that describes them."""

import pytest
from conftest import all_files

from mediator_cli import verify_bundle
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.bundle.replace import replace_files
from mediator_cli.errors import BundleError, OutputError


@pytest.fixture
def bundle(workshop):
    return workshop.merge("out", assign={"rule": "all"})


def test_a_replaced_file_is_described_anew(bundle):
    before = read_manifest(bundle)
    written = replace_files(bundle, before, {"README.md": b"new\n"})
    assert written == read_manifest(bundle)
    assert (bundle / "README.md").read_bytes() == b"new\n"
    assert verify_bundle(bundle).problems == verify_bundle(bundle).unknown == ()
    assert [file.name for file in written.files] == [file.name for file in before.files]


def test_a_new_file_is_listed_in_the_order_of_names(bundle):
    replace_files(bundle, read_manifest(bundle), {"experts/notes.txt": b"n", "a.txt": b""})
    names = [file.name for file in read_manifest(bundle).files]
    assert names == ["README.md", "a.txt", *names[2:-2], "tokenizer.json", "tokenizer_config.json"]
    assert "experts/notes.txt" in names
    assert verify_bundle(bundle).problems == verify_bundle(bundle).unknown == ()


def test_the_same_content_changes_no_byte(bundle):
    before = all_files(bundle)
    replace_files(bundle, read_manifest(bundle), {"README.md": (bundle / "README.md").read_bytes()})
    assert all_files(bundle) == before


def test_what_cannot_be_staged_changes_nothing(bundle):
    before = all_files(bundle)
    with pytest.raises(OutputError, match="cannot write"):
        replace_files(bundle, read_manifest(bundle), {"README.md": b"new", "gone/file.txt": b""})
    assert all_files(bundle) == before


def test_a_name_that_leads_out_of_the_bundle_is_refused(bundle):
    before = all_files(bundle)
    with pytest.raises(BundleError, match="unsafe file name"):
        replace_files(bundle, read_manifest(bundle), {"README.md": b"new", "../x": b""})
    assert all_files(bundle) == before
