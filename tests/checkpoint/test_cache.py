"""Notes that are kept between runs, and where."""

from pathlib import Path
from threading import Thread

import pytest

from mediator_cli.checkpoint.cache import cache_folder, read_note, write_note


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDIATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_the_one_that_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for name in ("MEDIATOR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "mediator"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")
    assert cache_folder() == tmp_path / "home" / ".cache" / "mediator"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mediator"
    monkeypatch.setenv("MEDIATOR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_a_note_is_read_back_and_leaves_nothing_else(folder):
    assert read_note("kind", "key") is None
    write_note("kind", "key", "first")
    write_note("kind", "key", "Größe")
    assert read_note("kind", "key") == "Größe"
    assert [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] == ["kind/key.json"]


def test_a_note_that_is_no_text_is_none(folder):
    write_note("kind", "key", "text")
    (folder / "kind" / "key.json").write_bytes(b"\xff\xfe\x00")
    assert read_note("kind", "key") is None


def test_where_nothing_can_be_written_nothing_happens(folder):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file")
    write_note("kind", "key", "text")
    assert read_note("kind", "key") is None
    assert folder.read_text() == "a file"


def test_a_folder_in_the_place_of_a_note_is_left_alone(folder):
    (folder / "kind" / "key.json" / "inside").mkdir(parents=True)
    write_note("kind", "key", "text")
    assert read_note("kind", "key") is None
    assert sorted(path.name for path in folder.rglob("*")) == ["inside", "key.json", "kind"]


def test_without_a_home_nothing_is_kept(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("MEDIATOR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    write_note("kind", "key", "text")
    assert read_note("kind", "key") is None


def test_readers_see_whole_notes_only(folder):
    texts = {letter * 200_000 for letter in "ab"}
    write_note("kind", "key", "a" * 200_000)

    def write():
        for _ in range(50):
            for text in texts:
                write_note("kind", "key", text)

    writers = [Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    found = [read_note("kind", "key") for _ in range(200)]
    for writer in writers:
        writer.join()
    assert set(found) <= texts
