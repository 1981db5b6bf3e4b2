"""A bundle appears whole or not at all."""

import os
import shutil

import pytest
from conftest import all_files

from mediator_cli import Settings, read_bundle
from mediator_cli.checkpoint import write as write_module
from mediator_cli.engine import publish as module
from mediator_cli.engine.publish import check_output, publish
from mediator_cli.errors import OutputError


def write(folder, text="new"):
    (folder / "experts").mkdir()
    (folder / "experts" / "a.txt").write_text(text)
    (folder / "routing_manifest.json").write_text(text)


def make_bundle(target, text="old"):
    with publish(target, "new", {}) as building:
        write(building.folder, text)
    return target


def fail_inside(target, error, step=None, mode="overwrite"):
    with publish(target, mode, {}) as building:
        write(building.folder)
        if step:
            building.journal.write(step, {"fact": 1})
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_bundle_appears_with_all_its_files_and_nothing_else(tmp_path):
    target = make_bundle(tmp_path / "deep" / "out")
    assert (target / "experts" / "a.txt").read_text() == "old"
    assert names(tmp_path / "deep") == ["out"]


def test_nothing_stands_at_the_target_while_it_is_built(tmp_path):
    with publish(tmp_path / "out", "new", {}) as building:
        write(building.folder)
        assert not (tmp_path / "out").exists()


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert (make_bundle(tmp_path / "out") / "routing_manifest.json").exists()


def test_an_existing_bundle_stays_without_overwrite(tmp_path):
    target = make_bundle(tmp_path / "out")
    with pytest.raises(OutputError, match=r"exists\n  hint: .*--overwrite"), publish(target, "new", {}):
        pass
    assert (target / "routing_manifest.json").read_text() == "old"


def test_overwrite_replaces_a_bundle(tmp_path):
    target = make_bundle(tmp_path / "out")
    (target / "left-over.txt").write_text("x")
    with publish(target, "overwrite", {}) as building:
        write(building.folder)
    assert names(target) == ["experts", "routing_manifest.json"]
    assert (target / "routing_manifest.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_overwrite_touches_nothing_but_bundles(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not a bundle, so it is not overwritten"):
        check_output(tmp_path / "out", "overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
@pytest.mark.parametrize("mode", ["new", "overwrite", "resume"])
def test_a_file_or_link_in_the_way_is_refused(tmp_path, kind, mode):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(make_bundle(tmp_path / "real") if kind == "link" else tmp_path / "none")
    with pytest.raises(OutputError, match="exists and is not a folder"):
        check_output(target, mode)


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
    with pytest.raises(OutputError, match="input/output error"), publish(target, "overwrite", {}) as building:
        write(building.folder)
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
    with publish(tmp_path / "out", "new", {}) as first:
        write(first.folder, "first")
        with pytest.raises(OutputError, match="another merge is writing this output"):
            make_bundle(tmp_path / "out", "second")
        assert (first.folder / "experts" / "a.txt").read_text() == "first"
    assert (tmp_path / "out" / "routing_manifest.json").read_text() == "first"


def test_the_lock_is_given_back(tmp_path):
    for mode in ("new", "overwrite"):
        with publish(tmp_path / "out", mode, {}) as building:
            write(building.folder)
    n_open = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - descriptors are no files
    make_bundle(tmp_path / "other")
    assert len(os.listdir("/proc/self/fd")) == n_open  # noqa: PTH208


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    synced = []
    for place in (module, write_module):
        monkeypatch.setattr(place, "sync", lambda path: synced.append((path.name, (tmp_path / "out").exists())))
    make_bundle(tmp_path / "out")
    before = {name for name, exists in synced if not exists}
    assert before == {"a.txt", "experts", "routing_manifest.json", ".out.partial"}
    assert (tmp_path.name, True) in synced


def test_what_is_finished_is_kept_and_gone_on_with(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail_inside(tmp_path / "out", ZeroDivisionError, "one")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match=r"can go on\n  hint: give --resume"):
        make_bundle(tmp_path / "out")
    with publish(tmp_path / "out", "resume", {}) as building:
        assert building.journal.steps == {"one": {"fact": 1}}
        assert (building.folder / "experts" / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_overwrite_throws_away_what_is_finished(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail_inside(tmp_path / "out", ZeroDivisionError, "one")
    with publish(tmp_path / "out", "overwrite", {}) as building:
        assert building.journal.steps == {}
        assert names(building.folder) == []
        write(building.folder)
    assert names(tmp_path) == ["out"]


def test_what_cannot_be_gone_on_with_stays_and_is_said(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail_inside(tmp_path / "out", ZeroDivisionError, "one")
    before = all_files(tmp_path)
    message = "cannot go on: the file x changed since it began"
    with pytest.raises(OutputError, match=message), publish(tmp_path / "out", "resume", {"the file x": 1}):
        pass
    assert all_files(tmp_path) == before


def test_resume_begins_where_nothing_was_begun(tmp_path):
    with publish(tmp_path / "out", "resume", {}) as building:
        write(building.folder)
    assert names(tmp_path) == ["out"]


def test_resume_replaces_no_bundle_unless_the_interrupted_merge_was_to(tmp_path):
    target = make_bundle(tmp_path / "out")
    with pytest.raises(OutputError, match=r"exists\n  hint: "), publish(target, "resume", {}):
        pass
    with pytest.raises(ZeroDivisionError):
        fail_inside(target, ZeroDivisionError, "one")
    assert (target / "routing_manifest.json").read_text() == "old"
    with publish(target, "resume", {}) as building:
        assert building.journal.steps == {"one": {"fact": 1}}
    assert (target / "routing_manifest.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("mode", ["overwrite", "resume"])
def test_a_journal_without_its_folder_is_not_believed(tmp_path, mode):
    with pytest.raises(ZeroDivisionError):
        fail_inside(tmp_path / "out", ZeroDivisionError, "one")
    shutil.rmtree(tmp_path / ".out.partial")
    with publish(tmp_path / "out", mode, {}) as building:
        assert building.journal.steps == {}
        write(building.folder)
    assert names(tmp_path) == ["out"]


def test_a_merge_that_fails_in_the_middle_leaves_the_old_bundle(workshop, monkeypatch):
    out = workshop.merge(assign={"rule": "all"})
    digest = read_bundle(out).manifest.digest

    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr("mediator_cli.pipeline.merge.write_side_files", fail)
    with pytest.raises(RuntimeError):
        workshop.merge("out", Settings(workers=2, overwrite=True), assign={"rule": "none"})
    assert read_bundle(out).manifest.digest == digest
    monkeypatch.undo()
    workshop.merge("out", Settings(workers=2, resume=True), assign={"rule": "none"})
    assert read_bundle(out).manifest.assignment["model.layers.0"] == "average"
    assert not list(workshop.folder.glob(".out*"))
