"""Rows as tokens: which of them are predicted, which are held out, and which come in which step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from mediator_cli.checkpoint.header import read_json
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.runtime.tokens import answer_tokens, prompt_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.moe.train.settings import TrainSettings


class Row(Protocol):
    """A prompt and the answer to it."""

    @property
    def prompt(self) -> str:
        """What is asked."""

    @property
    def answer(self) -> str:
        """What is to be answered."""


Tasks = dict[str, tuple["Example", ...]]


@dataclass(frozen=True)
class Example:
    """The tokens of a row of a task; those from `first` on are predicted, each from all before it."""

    task: str
    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Encoder:
    """Turns rows into tokens as they are asked at run time; `end` is the token that ends an answer, if there is one."""

    tokenizer: PreTrainedTokenizerBase
    end: int | None
    loss_on: Literal["answer", "text"] = "answer"

    def encode(self, task: str, rows: Sequence[Row]) -> list[Example]:
        """Tokenise rows of a task; the end token follows the answer and is predicted too."""
        prompts = prompt_tokens(self.tokenizer, [row.prompt for row in rows])
        answers = answer_tokens(self.tokenizer, prompts, [row.answer for row in rows])
        end = () if self.end is None else (self.end,)
        return [
            Example(task, (*prompt.ids, *answer, *end), len(prompt.ids) if self.loss_on == "answer" else 1)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def end_token(folder: Path, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the token that ends an answer: of those at which generation stops, the one that the chat template writes."""
    configs = [
        read_json(file) for file in (folder / "generation_config.json", folder / "config.json") if file.is_file()
    ]
    said = next((config["eos_token_id"] for config in configs if config.get("eos_token_id") is not None), None)
    stops = [tokenizer.eos_token_id] if said is None else said if isinstance(said, list) else [said]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        closing = str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition("a")[2]
        written = tokenizer.encode(closing, add_special_tokens=False)
        stops = [token for token in written if token in stops] or stops
    return None if stops[0] is None else int(stops[0])


def digest(rows: Iterable[Row]) -> str:
    """Digest rows: SHA-256 over a line of JSON, an array of prompt and answer, for each."""
    lines = [json.dumps([row.prompt, row.answer], ensure_ascii=False) + "\n" for row in rows]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def fitting(tasks: Mapping[str, Sequence[Example]], length: int) -> tuple[Tasks, list[str]]:
    """Leave out what is longer than `length` tokens; give notices of it.

    Raises CheckpointError where nothing of a task is left.
    """
    kept = {task: tuple(row for row in rows if len(row.ids) <= length) for task, rows in tasks.items()}
    problems = [
        Problem(task, f"none of its {len(tasks[task])} rows has {length} tokens or fewer", _longer(tasks[task]))
        for task, rows in kept.items()
        if not rows
    ]
    if problems:
        raise CheckpointError(problems)
    notices = [
        f"{len(tasks[task]) - len(rows)} of {len(tasks[task])} rows of {task} are longer than {length} tokens"
        " and are left out"
        for task, rows in kept.items()
        if len(rows) < len(tasks[task])
    ]
    return kept, notices


def _longer(rows: Sequence[Example]) -> str:
    return f"the shortest has {min(len(row.ids) for row in rows)}; give a larger length" if rows else "give some rows"


def split(tasks: Mapping[str, Sequence[Example]], held_out: int, seed: int) -> tuple[Tasks, Tasks]:
    """Keep some rows of each task from training, drawn by the seed: `held_out`, or a tenth where that is less."""
    rest: Tasks = {}
    held: Tasks = {}
    for task, rows in tasks.items():
        order = _order(len(rows), seed, task, -1)
        n = min(held_out, len(rows) // 10)
        held[task] = tuple(rows[at] for at in sorted(order[:n]))
        rest[task] = tuple(rows[at] for at in sorted(order[n:]))
    return rest, held


def schedule(tasks: Mapping[str, Sequence[Example]], settings: TrainSettings) -> list[list[Example]]:
    """Say which rows come in which step. A task's rows come in an order drawn anew whenever all have come.

    Each row drawn is of the task that is furthest behind its share, so that shares hold at every step.
    """
    shares = {task: settings.shares.get(task, 1.0) for task in tasks}
    total = sum(shares.values())
    streams = {task: _stream(task, rows, settings.seed) for task, rows in tasks.items()}
    drawn = dict.fromkeys(tasks, 0)
    found: list[Example] = []
    for number in range(1, settings.steps * settings.batch + 1):
        task = max(tasks, key=lambda name: number * shares[name] / total - drawn[name])
        drawn[task] += 1
        found.append(next(streams[task]))
    return [found[at : at + settings.batch] for at in range(0, len(found), settings.batch)]


def _stream(task: str, rows: Sequence[Example], seed: int) -> Iterator[Example]:
    epoch = 0
    while True:
        yield from (rows[at] for at in _order(len(rows), seed, task, epoch))
        epoch += 1


def _order(n: int, seed: int, task: str, epoch: int) -> list[int]:
    key = hashlib.sha256(f"{seed} {epoch} {task}".encode()).digest()
    return [int(at) for at in np.random.default_rng(int.from_bytes(key[:8], "little")).permutation(n)]
