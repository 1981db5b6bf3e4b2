"""Scores of single rows, kept on disk, so that a comparison that was stopped goes on and no row is scored twice."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.write import write_error
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.evaluate.score import RowScore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mediator_cli.evaluate.tasks import Row

_CACHED = ("exact", "chosen_right", "log_prob", "n_prompt_tokens")


@dataclass
class Store:
    """The scores of one model: by mixture and row, and the seconds they took."""

    file: Path
    scores: dict[str, dict[str, RowScore]] = field(default_factory=dict)
    seconds: float = 0.0
    n_timed: int = 0

    def missing(self, mixture: str, rows: Sequence[Row]) -> list[Row]:
        """List the rows that were not scored with this mixture."""
        known = self.scores.get(mixture, {})
        return [row for row in rows if row_key(row) not in known]

    def get(self, mixture: str, row: Row) -> RowScore:
        """Return the score of a row; raise KeyError when there is none."""
        return self.scores[mixture][row_key(row)]

    def put(self, mixture: str, rows: Sequence[Row], found: Sequence[RowScore], seconds: float) -> None:
        """Add scores and save all."""
        # Another comparison may have added scores of this model since.
        now = open_store(self.file)
        self.scores, self.seconds, self.n_timed = now.scores, now.seconds + seconds, now.n_timed + len(rows)
        known = self.scores.setdefault(mixture, {})
        known.update({row_key(row): score for row, score in zip(rows, found, strict=True)})
        data = {
            "seconds": self.seconds,
            "n_timed": self.n_timed,
            "scores": {
                mixed: {key: [getattr(score, name) for name in _CACHED] for key, score in rows_.items()}
                for mixed, rows_ in self.scores.items()
            },
        }
        save(self.file, data)


def open_store(file: Path) -> Store:
    """Open the scores of a model, empty when there are none; raise CheckpointError when the file is damaged."""
    if not file.is_file():
        return Store(file)
    try:
        data = read_json(file)
        scores = {
            mixed: {key: RowScore(*values) for key, values in rows.items()} for mixed, rows in data["scores"].items()
        }
        return Store(file, scores, data["seconds"], data["n_timed"])
    except (CheckpointError, KeyError, TypeError, AttributeError):
        raise CheckpointError(Problem(str(file), "holds no scores", "remove it, its rows are scored again")) from None


def save(file: Path, data: object) -> None:
    """Write JSON so that the file is whole at any moment; raise OutputError when it cannot be written."""
    save_text(file, json.dumps(data))


def save_text(file: Path, text: str) -> None:
    """Write a text so that the file is whole at any moment; raise OutputError when it cannot be written."""
    # Two comparisons may share a folder, so each has a draft of its own.
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise write_error(file, error) from None


def row_key(row: Row) -> str:
    """Name a row by what is asked, expected and offered."""
    text = json.dumps([row.prompt, row.answer, row.choices], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
