"""Digests of sources: noted between merges, never believed of another file, and read only where no slab passed by."""

import os
import shutil

import pytest

from mediator_cli import Settings, load_recipe, make_plan, read_bundle
from mediator_cli.checkpoint.digest import Digests
from mediator_cli.pipeline.sources import identities, known_digest, source_files


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of this test's own."""
    folder = tmp_path.parent / f"{tmp_path.name}.cache"
    monkeypatch.setenv("MEDIATOR_CACHE", str(folder))
    return folder


def plan_of(workshop, **fields):
    return make_plan(load_recipe(workshop.recipe(**fields)))


def digests_of(plan, told=None):
    """The digests of all files, read now; `told` gets the bytes that had to be read."""
    run = Settings(progress=lambda stage, done, total: None if told is None else told.append(total))
    return {name: [file.xxh3 for file in files] for name, files in source_files(plan, Digests(), run).items()}


def test_what_passed_by_in_a_merge_has_the_digest_of_what_lies_on_disk(workshop, cache):
    merged = read_bundle(workshop.merge(assign={"rule": "all"})).manifest
    shutil.rmtree(cache)
    read = digests_of(plan_of(workshop))
    assert {source.name: [file.xxh3 for file in source.files] for source in merged.experts} == {
        name: read[name] for name in "ab"
    }


def test_a_noted_digest_spares_the_reading(workshop):
    plan, told = plan_of(workshop), []
    first = digests_of(plan)
    assert digests_of(plan, told) == first
    assert told == []


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_file_that_changed_is_read_again(workshop, keep_time):
    plan = plan_of(workshop)
    first, before = digests_of(plan), identities(plan)
    file = workshop.folder / "b" / "model.safetensors"
    times = file.stat()
    file.write_bytes(file.read_bytes()[:-2] + b"\1\1")
    if keep_time:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert known_digest(file) is None
    second = digests_of(plan_of(workshop))
    assert (second["base"], second["a"]) == (first["base"], first["a"])
    assert second["b"] != first["b"]
    assert {name for name, facts in identities(plan).items() if facts != before[name]} == {str(file)}


@pytest.mark.parametrize("text", ["", "{", "[]", "17", "null", '{"identity": 1}', '{"path": [], "identity": []}'])
def test_a_damaged_note_is_ignored(workshop, cache, text):
    plan = plan_of(workshop)
    first = digests_of(plan)
    notes = [path for path in cache.rglob("*.json") if path.parent.name == "digests"]
    assert len(notes) == 3
    for note in notes:
        note.write_text(text)
    assert known_digest(workshop.folder / "a" / "model.safetensors") is None
    assert digests_of(plan) == first


def test_a_note_is_of_its_own_file_alone(workshop):
    plan = plan_of(workshop)
    first = digests_of(plan)
    copy = shutil.copytree(workshop.folder / "a", workshop.folder / "copy")
    assert known_digest(copy / "model.safetensors") is None
    again = plan_of(workshop, experts=[{"name": n, "model": f"./{n}"} for n in ("copy", "b")])
    assert digests_of(again)["copy"] == first["a"]


def test_only_what_did_not_pass_by_is_read(workshop):
    plan, told = plan_of(workshop), []
    whole = digests_of(plan)
    shutil.rmtree(os.environ["MEDIATOR_CACHE"])
    info = plan.base.tensors["model.norm.weight"]
    seen = Digests()
    from mediator_cli.bundle.digest import scan_tensors

    for source in (plan.base, *plan.experts):
        for each in source.tensors.values():
            if (each.file, each.name) != (info.file, info.name):
                seen.add(each.file, each.name, scan_tensors([each])[0].digest)
    found = source_files(plan, seen, Settings(progress=lambda stage, done, total: told.append(total)))
    assert max(told) == info.n_bytes
    assert {name: [file.xxh3 for file in files] for name, files in found.items()} == whole
