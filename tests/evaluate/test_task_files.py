"""Task files: what is read, and every problem with file and line."""

import pytest

from mediator_cli.errors import CheckpointError
from mediator_cli.evaluate.tasks import load_tasks


def write(folder, name, *lines):
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def problems_of(*files):
    with pytest.raises(CheckpointError) as caught:
        load_tasks(files)
    return [(problem.place, problem.message) for problem in caught.value.problems]


def test_a_task_is_named_by_its_file_up_to_the_first_dot(tmp_path):
    file = write(tmp_path, "maths.test.jsonl", '{"prompt": "2+2", "answer": "4"}', "",
                 '{"prompt": "é?", "answer": "b", "choices": ["a", "b"], "id": 7}')  # fmt: skip
    (task,) = load_tasks([file])
    assert task.name == "maths"
    assert [row.model_dump() for row in task.rows] == [
        {"prompt": "2+2", "answer": "4", "choices": None, "id": None},
        {"prompt": "é?", "answer": "b", "choices": ["a", "b"], "id": 7},
    ]


def test_all_problems_of_all_files_are_told_at_once(tmp_path):
    one = write(tmp_path, "one.jsonl", '{"prompt": "a", "answer": "b"}', '{"prompt": 3, "anwser": "b"}', "{oops",
                '{"prompt": " ", "answer": "", "choices": ["x", "x", ""]}', '["a"]')  # fmt: skip
    two = write(tmp_path, "two.jsonl", "")
    bad = tmp_path / "three.jsonl"
    bad.write_bytes(b'{"prompt": "\xff", "answer": "a"}\n')
    found = problems_of(one, two, tmp_path / "none.jsonl", bad)
    assert [place for place, _ in found] == [
        f"{one}:2 prompt", f"{one}:2 answer", f"{one}:2 anwser", f"{one}:3", f"{one}:4 prompt", f"{one}:4 answer",
        f"{one}:4 choices", f"{one}:4 choices", f"{one}:5", str(two), f"{tmp_path / 'none.jsonl'}", f"{bad}:1",
    ]  # fmt: skip
    messages = [message for _, message in found]
    assert messages[1] == "field required"
    assert messages[3].startswith("broken JSON: ")
    assert messages[6:8] == ["needs two or more different texts", "holds an empty text"]
    assert messages[9:] == ["holds no rows", "cannot read: no such file or directory", "is not UTF-8 text"]


def test_the_answer_is_one_of_the_choices(tmp_path):
    file = write(tmp_path, "t.jsonl", '{"prompt": "a", "answer": "c", "choices": ["a", "b"]}')
    assert problems_of(file) == [(f"{file}:1 choices", "lacks the answer 'c'")]


def test_a_misspelt_field_gets_a_suggestion(tmp_path):
    file = write(tmp_path, "t.jsonl", '{"prompt": "a", "answer": "b", "choice": ["a", "b"]}')
    with pytest.raises(CheckpointError) as caught:
        load_tasks([file])
    assert caught.value.problems[0].hint == "did you mean 'choices'?"


def test_two_files_of_one_task_are_refused(tmp_path):
    files = [write(tmp_path, name, '{"prompt": "a", "answer": "b"}') for name in ("t.test.jsonl", "t.valid.jsonl")]
    assert problems_of(*files) == [(str(files[1]), "a second task 't'")]
