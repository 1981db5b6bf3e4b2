"""The journal: finished steps survive, a torn line is none, and other work is refused."""

import json

import pytest

from mediator_cli.engine.journal import Journal, has_journal, open_journal, start_journal
from mediator_cli.errors import OutputError

KEY = {"the recipe": "x", "the file a": [1, 2]}


@pytest.fixture
def folder(tmp_path):
    journal = start_journal(tmp_path / "journal", KEY)
    journal.write("one", {"values": [0.1, 1e-300]})
    journal.write("two", {})
    return tmp_path / "journal"


def steps_file(folder):
    (file,) = folder.glob("steps-*.jsonl")
    return file


def test_steps_come_back_to_the_bit(folder):
    assert open_journal(folder, KEY).steps == {"one": {"values": [0.1, 1e-300]}, "two": {}}
    assert Journal(folder).any_finished()
    assert has_journal(folder)


@pytest.mark.parametrize("length", range(1, 14))
def test_a_torn_line_is_no_step_and_the_next_one_is_whole(folder, length):
    with steps_file(folder).open("ab") as stream:
        stream.write(json.dumps(["three", {}]).encode()[:length])
    journal = open_journal(folder, KEY)
    assert list(journal.steps) == ["one", "two"]
    journal.write("four", {"fact": 4})
    assert list(open_journal(folder, KEY).steps) == ["one", "two", "four"]


def test_a_first_line_that_is_torn_is_no_step(tmp_path):
    start_journal(tmp_path / "journal", KEY)
    (tmp_path / "journal" / "steps-00000.jsonl").write_bytes(b'["one"')
    assert not Journal(tmp_path / "journal").any_finished()
    journal = open_journal(tmp_path / "journal", KEY)
    assert journal.steps == {}
    journal.write("one", {})
    assert list(open_journal(tmp_path / "journal", KEY).steps) == ["one"]


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ({"the recipe": "y", "the file a": [1, 2]}, "the recipe"),
        ({"the recipe": "x"}, "the file a"),
        ({**KEY, "the file b": [3, 4]}, "the file b"),
        ({"the recipe": "y", "the file a": [1, 3]}, "the file a, the recipe"),
    ],
)
def test_other_work_is_refused_with_all_that_changed(folder, key, names):
    with pytest.raises(OutputError, match=f"cannot go on: {names} changed since it began"):
        open_journal(folder, key)


@pytest.mark.parametrize("text", ["", "{", "[]", "17", '"x"', "null"])
def test_a_key_that_cannot_be_read_is_refused(folder, text):
    (folder / "key.json").write_text(text)
    with pytest.raises(OutputError, match="cannot go on: "):
        open_journal(folder, KEY)


@pytest.mark.parametrize("line", [b"x\n", b"17\n", b'["one"]\n', b"\0\0\n", b'["one", {}, 3]\n', b"[[], {}]\n"])
def test_a_damaged_line_is_refused(folder, line):
    with steps_file(folder).open("ab") as stream:
        stream.write(line)
    with pytest.raises(OutputError, match="start anew with --overwrite"):
        open_journal(folder, KEY)


def test_a_new_journal_has_no_old_steps(folder):
    assert start_journal(folder, KEY).steps == {}
    assert open_journal(folder, KEY).steps == {}
    assert not Journal(folder).any_finished()


def test_steps_of_several_processes_come_together(folder):
    other = open_journal(folder, KEY, member=3)
    other.write("of another", {"fact": 1})
    assert set(open_journal(folder, KEY).steps) == {"one", "two", "of another"}


def test_a_full_disk_is_an_output_error(folder, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    journal = Journal(folder)
    with pytest.raises(OutputError, match=r"steps-00000\.jsonl: cannot write: no space left"):
        journal.write("three", {})
    assert "three" not in journal.steps
