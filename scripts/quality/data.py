"""Rows that the demo's experts were not trained for: two foreign tasks, and questions that need two experts."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from mediator_cli.evaluate.tasks import Row, Task, load_tasks
from scripts.demo.cache import package_folder
from scripts.demo.wordings import WORDINGS

FOREIGN = 300
MIXED = 200
VERSIONS = ("test", "test-template", "test-bare")


def version(data: Path, name: str, limit: int | None = None) -> tuple[Task, ...]:
    """Read one version of the four tasks, `limit` rows of each at most."""
    tasks = load_tasks([data / f"{task}.{name}.jsonl" for task in WORDINGS])
    return tuple(Task(task.name, task.rows[:limit]) for task in tasks)


def foreign_tasks(seed: int) -> tuple[Task, ...]:
    """Return tasks that no expert was trained on: relations of quantities, and social situations."""
    return (Task("quartz", tuple(_quartz(seed))), Task("socialiqa", tuple(_socialiqa(seed))))


def _quartz(seed: int) -> Iterator[Row]:
    samples = _samples("quartz/samples.jsonl", seed)
    for sample in samples:
        yield _letters(sample["input"][-1]["content"], sample["ideal"], "AB")


def _socialiqa(seed: int) -> Iterator[Row]:
    for sample in _samples("theory_of_mind/socialiqa/test.jsonl", seed):
        yield _letters(sample["input"][-1]["content"], sample["ideal"], "ABC")


def _letters(text: str, answer: str, letters: str) -> Row:
    tidy = re.sub(r"\s*\n\s*", "\n", text.strip())
    return Row(prompt=f"{tidy}\nAnswer with the letter.", answer=answer.strip(), choices=list(letters))


def _samples(path: str, seed: int) -> list[dict]:
    with (package_folder("evals") / "registry/data" / path).open(encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    return Random(f"{seed} {path}").sample(samples, FOREIGN)


def mixed_rows(tasks: Sequence[Task], template: str, seed: int) -> tuple[Task, ...]:
    """Return questions in pairs of two tasks, each part a task of its own: raw prompts with choices.

    `template` is a rendered chat of one user turn that reads TEXT. The second part is asked behind the right answer
    to the first. A row's id is the task of its part.
    """
    rng = Random(f"{seed} mixed")
    first, second = [], []
    for _ in range(MIXED):
        one, other = rng.sample(list(tasks), 2)
        row_a, row_b = rng.choice(one.rows), rng.choice(other.rows)
        text = f"Answer both questions.\n1. {row_a.prompt}\n2. {row_b.prompt}"
        opening = template.replace("TEXT", text)
        first.append(_part(f"{opening}1.", row_a, one, rng))
        second.append(_part(f"{opening}1. {row_a.answer}\n2.", row_b, other, rng))
    return (Task("first part", tuple(first)), Task("second part", tuple(second)))


def _part(prompt: str, row: Row, task: Task, rng: Random) -> Row:
    others = sorted({other.answer for other in task.rows} - {row.answer})
    choices = row.choices or [row.answer, *rng.sample(others, min(3, len(others)))]
    return Row(prompt=prompt, answer=f" {row.answer}", choices=[f" {choice}" for choice in choices], id=task.name)
