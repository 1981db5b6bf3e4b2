"""A tiny base, experts, adapter and bundle whose tokenizer knows twenty words."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tiny_tokens import FILMS, SUMS, WORDS, task_prompts, word_tokenizer, write_prompts

from mediator_cli.evaluate.tasks import Row

EXPERTS = [{"name": n, "model": f"./{n}", "prompts": f"./{n}.jsonl"} for n in ("a", "b")]
PLAIN_EXPERTS = [{"name": n, "model": f"./{n}"} for n in ("a", "b")]


def add_words(workshop: Any) -> None:
    """Give base and experts a tokenizer that works, and prompts for a router."""
    write_prompts(workshop.folder / "a.jsonl", task_prompts(SUMS))
    write_prompts(workshop.folder / "b.jsonl", task_prompts(FILMS))
    for name in ("base", "a", "b"):
        (workshop.folder / name / "chat_template.jinja").unlink()
        word_tokenizer().save_pretrained(workshop.folder / name)


def routed(workshop: Any, name: str = "out", **policy: Any) -> Path:
    """Merge a bundle with a router."""
    return workshop.merge(
        name, experts=EXPERTS, assign={"rule": "all"}, extract={"density": 0.5}, router={"policy": policy}
    )


def make_rows(n: int, seed: int = 0) -> list[Row]:
    """Make rows of words of either task, every second one with choices."""
    rng = Random(seed)
    rows = []
    for at in range(n):
        prompt = " ".join(rng.choice(rng.choice((SUMS, FILMS))) for _ in range(rng.randrange(1, 9)))
        choices = rng.sample(WORDS[15:], 3)
        rows.append(Row(prompt=prompt, answer=choices[0], choices=sorted(choices) if at % 2 else None))
    return rows


def write_rows(file: Path, rows: list[Row]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row.model_dump(exclude_none=True)) + "\n" for row in rows))
    return file
