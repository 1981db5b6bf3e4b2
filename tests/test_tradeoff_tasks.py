"""Rows of the twelve and four tasks of scripts/tradeoffs: right answers, splits apart, the same for the same seed."""

from __future__ import annotations

import json
import re
from datetime import datetime
from types import SimpleNamespace

import pytest

from scripts.tradeoffs import adapters, tasks
from scripts.tradeoffs.generators import Drawn
from scripts.tradeoffs.lora import Adapter, batches

MADE = {**tasks.PROCEDURAL, **tasks.HELD_OUT}
MONTHS = re.findall("...", "janfebmaraprmayjunjulaugsepoctnovdec")
UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen"""
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES = {word: value for value, word in enumerate(UNITS.split())}
VALUES |= dict(zip(TENS.split(), range(20, 100, 10), strict=True))


@pytest.fixture(scope="module")
def splits():
    return {task: tasks.procedural_rows(task, made, 0) for task, made in MADE.items()}


def _date(text):
    (month,) = (number for number, name in enumerate(MONTHS, 1) if name in text.lower())
    (day,) = re.findall(r"(?<!\d)(\d{1,2})(?!\d)", text)
    return f"{month:02}-{int(day):02}"


def _us_date(text):
    month, day, *_ = text.split("/")
    return f"{int(month):02}-{int(day):02}"


def _number(text):
    total = last = 0
    for word in re.findall(r"[a-z]+", text.replace(" and ", " ")):
        if word == "thousand":
            total, last = last * 1000, 0
        elif word == "hundred":
            last *= 100
        else:
            last += VALUES[word]
    return str(total + last)


def _sorted(text):
    first, second, third = (int(number) for number in text.split())
    low, high = min(first, second, third), max(first, second, third)
    return f"{low} {first + second + third - low - high} {high}"


def _largest(text):
    return sorted(text.split(", "), key=lambda number: number.rjust(3))[-1]


def _person(text):
    (age,) = re.findall(r"\d+", text)
    city, name = sorted(set(re.findall(r"[A-Z][a-z]+", text)) - {"At", "In"}, key=text.index)
    if city not in tasks.generators.CITIES:
        city, name = name, city
    return f"{name};{age};{city}"


def _sum(text):
    left, sign, right = text.split()
    return str(int(left) + int(right) * {"+": 1, "-": -1}[sign])


ANSWERS = {
    "dates": _date,
    "times": lambda text: datetime.strptime(text, "%H:%M").strftime("%I:%M %p").lstrip("0").lower(),
    "numbers": _number,
    "initials": lambda text: " ".join(f"{letter}." for letter in re.findall("[A-Z]", text)),
    "sort": _sorted,
    "compare": _largest,
    "records": _person,
    "identifiers": lambda text: re.sub("_(.)", lambda found: found[1].upper(), text),
    "sums": _sum,
    "usdates": _us_date,
    "kebab": lambda text: re.sub("-(.)", lambda found: found[1].upper(), text),
}


@pytest.mark.parametrize("task", MADE)
def test_answers_agree_with_an_independent_computation(splits, task):
    rows = [row for split in splits[task].values() for row in split]
    asked = [row.prompt.split("\n\n") for row in rows]
    assert [row.answer for row in rows] == [ANSWERS[task](text) for _, text in asked]
    assert {instruction for instruction, _ in asked} == set(MADE[task].instructions)


@pytest.mark.parametrize("task", MADE)
def test_splits_are_full_apart_and_short(splits, task):
    assert {split: len(rows) for split, rows in splits[task].items()} == {"train": 900, "valid": 60, "test": 100}
    texts = [row.prompt.split("\n\n")[1] for rows in splits[task].values() for row in rows]
    assert len(set(texts)) == len(texts)
    assert all(len(row.prompt) <= 110 and len(row.answer) <= 20 for rows in splits[task].values() for row in rows)


def test_related_tasks_share_no_answer_across_training_and_test(splits):
    def answers(task, split):
        return {row.answer for row in splits[task][split]}

    for seen, other in (("dates", "usdates"), ("identifiers", "kebab"), ("dates", "dates")):
        assert not answers(seen, "train") & answers(other, "test")
        assert not answers(seen, "train") & answers(other, "valid")


def test_same_seed_same_rows_another_seed_others(splits):
    again = tasks.procedural_rows("times", MADE["times"], 0)
    assert again == splits["times"]
    assert tasks.procedural_rows("times", MADE["times"], 1) != again


def test_instructions_differ_between_tasks():
    instructions = [instruction for made in MADE.values() for instruction in made.instructions]
    assert len(set(instructions)) == len(instructions)


def test_a_task_with_too_few_items_is_refused():
    made = tasks.Procedural(lambda rng: Drawn("a", "b", "c"), ("Say b.",))
    with pytest.raises(ValueError, match="few: 100,000 draws do not fill the splits"):
        tasks.procedural_rows("few", made, 0)


@pytest.fixture
def written(tmp_path, monkeypatch):
    demo, folder = tmp_path / "demo", tmp_path / "rows"
    demo.mkdir()
    folder.mkdir()
    for task in tasks.FROM_DEMO:
        for split in tasks.SIZES:
            rows = [{"prompt": f"{task} {split} {n}?", "answer": "yes", "choices": ["yes", "no"]} for n in range(1000)]
            (demo / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [SimpleNamespace(prompt=f"?{'.' * n}", answer="A", choices=["A", "B"]) for n in range(300)]
    monkeypatch.setattr(tasks, "foreign_tasks", lambda seed: (SimpleNamespace(name="quartz", rows=questions),))
    tasks.write_tasks(folder, demo, 0)
    return folder


def test_written_files_hold_the_splits_and_held_out_tasks_no_training(written):
    sizes = {file.name: len(file.read_text().splitlines()) for file in written.iterdir()}
    seen = {f"{task}.{split}.jsonl": size for task in tasks.SEEN for split, size in tasks.SIZES.items()}
    unseen = {f"{task}.{split}.jsonl": tasks.SIZES[split] for task in tasks.UNSEEN for split in ("valid", "test")}
    assert sizes == {**seen, **unseen}
    assert len(tasks.SEEN) == 12
    assert len(tasks.UNSEEN) == 4


def test_quartz_is_its_shortest_questions_each_once(written):
    rows = [row for split in ("valid", "test") for row in tasks.read_rows(written / f"quartz.{split}.jsonl")]
    assert sorted(len(row.prompt) for row in rows) == list(range(1, 161))
    assert {row.choices for row in rows} == {("A", "B")}


def test_every_seen_task_has_an_adapter_and_no_unseen_one():
    assert sorted([*adapters.TRAINED, *adapters.FROM_DEMO]) == sorted(tasks.SEEN)
    assert {adapter.rank for adapter in adapters.TRAINED.values()} == {4, 8, 16}


def test_as_many_batches_as_steps_every_chat_once_per_epoch():
    from scripts.demo.packing import Chat

    chats = [Chat((1, 2, 3, 10 + n), (100 + n, 9)) for n in range(7)]
    made = batches([chats], Adapter(4, 8, steps=6, width=8, height=2))
    # Three tokens are shared and each chat adds two: two chats to a sequence, four sequences to an epoch.
    assert [tuple(batch.ids.shape) for batch in made] == [(2, 8)] * 6
    answers = [[n for n in batch.targets.tolist() if n >= 100] for batch in made]
    for start in (0, 2, 4):
        assert sorted(answers[start] + answers[start + 1]) == list(range(100, 107))


def test_summary_shows_the_scale_that_peft_applies(tmp_path):
    rows = {"times": (8, 16, False, ["v_proj", "q_proj"]), "sort": (16, 8, True, [f"module{n}" for n in range(7)])}
    made = {}
    for task, (rank, alpha, rslora, targets) in rows.items():
        folder = made[task] = tmp_path / task
        folder.mkdir()
        config = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": targets}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(b"0" * 2_500_000)
        record = {"task": task, "tested": 50, "accuracy_base": 0.0, "accuracy_expert": 0.96, "seconds": 96.0}
        (folder / adapters.RECORD).write_text(json.dumps(record))
    columns = [list(column.cells) for column in adapters.summary(made).columns]
    first, second = zip(*columns, strict=True)
    assert first == ("times", "q v", "8", "2", "2.5", "50", "0%", "96%", "1:36")
    assert second[:4] == ("sort", "all", "16", "2")
