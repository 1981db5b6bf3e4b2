"""A bundle appears whole or not at all."""

import fcntl
import os

import pytest

from mediator_cli import Settings, read_bundle
from mediator_cli.engine import publish as module
from mediator_cli.engine.publish import check_output, publish
from mediator_cli.errors import OutputError


def write(folder, text="new"):
    (folder / "experts").mkdir()
    (folder / "experts" / "a.txt").write_text(text)
    (folder / "routing_manifest.json").write_text(text)


def make_bundle(target, text="old"):
    with publish(target, overwrite=False) as folder:
        write(folder, text)
    return target


def fail_inside(target, error):
    with publish(target, overwrite=True) as folder:
        write(folder)
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_bundle_appears_with_all_its_files_and_nothing_else(tmp_path):
    target = make_bundle(tmp_path / "deep" / "out")
    assert (target / "experts" / "a.txt").read_text() == "old"
    assert names(tmp_path / "deep") == ["out"]


def test_nothing_stands_at_the_target_while_it_is_built(tmp_path):
    with publish(tmp_path / "out", overwrite=False) as folder:
        write(folder)
        assert not (tmp_path / "out").exists()


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert (make_bundle(tmp_path / "out") / "routing_manifest.json").exists()


def test_an_existing_bundle_stays_without_overwrite(tmp_path):
    target = make_bundle(tmp_path / "out")
    with pytest.raises(OutputError, match=r"exists\n  hint: .*--overwrite"), publish(target, overwrite=False):
        pass
    assert (target / "routing_manifest.json").read_text() == "old"


def test_overwrite_replaces_a_bundle(tmp_path):
    target = make_bundle(tmp_path / "out")
    (target / "left-over.txt").write_text("x")
    with publish(target, overwrite=True) as folder:
        write(folder)
    assert names(target) == ["experts", "routing_manifest.json"]
    assert (target / "routing_manifest.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_overwrite_touches_nothing_but_bundles(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not a bundle, so it is not overwritten"):
        check_output(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_or_link_in_the_way_is_refused(tmp_path, kind, overwrite):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(make_bundle(tmp_path / "real") if kind == "link" else tmp_path / "none")
    with pytest.raises(OutputError, match="exists and is not a folder"):
        check_output(target, overwrite)


def test_a_failure_inside_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail_inside(tmp_path / "out", ZeroDivisionError)
    assert names(tmp_path) == []


def test_a_failure_inside_keeps_the_old_bundle(tmp_path):
    target = make_bundle(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        fail_inside(target, KeyboardInterrupt)
    assert (target / "experts" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_bundle_back(tmp_path, monkeypatch):
    target = make_bundle(tmp_path / "out")
    rename = type(target).rename

    def refuse(path, other):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, other)

    monkeypatch.setattr(type(target), "rename", refuse)
    with pytest.raises(OutputError, match="input/output error"), publish(target, overwrite=True) as folder:
        write(folder)
    assert (target / "experts" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write: no space left on device"):
        fail_inside(tmp_path / "out", OSError(28, "No space left on device"))
    assert names(tmp_path) == []


def test_the_folder_of_a_merge_that_died_is_taken_over(tmp_path):
    dead = tmp_path / ".out.partial"
    write_dead = dead / "experts"
    write_dead.mkdir(parents=True)
    (write_dead / "half.txt").write_text("half")
    (dead / "model.safetensors").write_text("half")
    (dead / "link").symlink_to(tmp_path)
    target = make_bundle(tmp_path / "out")
    assert names(target) == ["experts", "routing_manifest.json"]
    assert names(target / "experts") == ["a.txt"]
    assert names(tmp_path) == ["out"]


def test_two_merges_at_once_give_one_error(tmp_path):
    with publish(tmp_path / "out", overwrite=False) as first:
        write(first, "first")
        with pytest.raises(OutputError, match="another merge is writing this output"):
            make_bundle(tmp_path / "out", "second")
        assert (first / "experts" / "a.txt").read_text() == "first"
    assert (tmp_path / "out" / "routing_manifest.json").read_text() == "first"


def test_the_lock_is_given_back(tmp_path):
    target = make_bundle(tmp_path / "out")
    descriptor = os.open(target, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(module, "sync", lambda path: synced.append((path.name, (tmp_path / "out").exists())))
    make_bundle(tmp_path / "out")
    before = {name for name, exists in synced if not exists}
    assert before == {"a.txt", "experts", "routing_manifest.json", ".out.partial"}
    assert (tmp_path.name, True) in synced


def test_a_merge_that_fails_in_the_middle_leaves_the_old_bundle(workshop, monkeypatch):
    out = workshop.merge(assign={"rule": "all"})
    digest = read_bundle(out).manifest.digest

    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr("mediator_cli.pipeline.merge.write_side_files", fail)
    with pytest.raises(RuntimeError):
        workshop.merge("out", Settings(workers=2, overwrite=True), assign={"rule": "none"})
    assert read_bundle(out).manifest.digest == digest
    assert not (workshop.folder / ".out.partial").exists()
