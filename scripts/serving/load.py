"""Ask a server on this machine as many clients at once would, and note when each token came."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx

TIMEOUT = 300.0


@dataclass(frozen=True)
class Ask:
    """A prompt, the answer that is right, where to send it, and the model to name there."""

    task: str
    prompt: str
    answer: str
    url: str
    model: str


@dataclass(frozen=True)
class Told:
    """What came back: the text, seconds until its first piece and until its end, tokens, and who answered."""

    ask: Ask
    text: str
    first: float
    seconds: float
    tokens: int
    mixture: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the expected one, but for case, white space and a full stop."""
        return plain(self.text) == plain(self.ask.answer)


@dataclass(frozen=True)
class Speed:
    """What some clients saw: tokens a second of all together, seconds to the first token, a request's seconds."""

    clients: int
    requests: int
    tokens_per_second: float
    first_p50: float
    first_p95: float
    seconds_p50: float
    memory_bytes: int = 0


def plain(text: str) -> str:
    """Leave out what is no part of an answer."""
    return text.strip().rstrip(".").lower()


def read_asks(folder: Path, tasks: Sequence[str], n_rows: int) -> list[Ask]:
    """Read rows of each task in turn; where they are sent is filled in later."""
    rows = {task: (folder / f"{task}.test.jsonl").read_text(encoding="utf-8").splitlines()[:n_rows] for task in tasks}
    found = []
    for at in range(n_rows):
        for task in tasks:
            row = json.loads(rows[task][at])
            found.append(Ask(task, row["prompt"], row["answer"], "", ""))
    return found


def ask_all(asks: Sequence[Ask], clients: int, **fields: float | bool) -> tuple[list[Told], float]:
    """Ask with so many clients at once, each one request after the other; also the seconds that all took."""
    return asyncio.run(_ask_all(asks, clients, fields))


async def _ask_all(asks: Sequence[Ask], clients: int, fields: dict[str, Any]) -> tuple[list[Told], float]:
    waiting, told = list(reversed(asks)), []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=limits, trust_env=False) as client:

        async def one() -> None:
            while waiting:
                told.append(await _ask(client, waiting.pop(), fields))

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return told, time.perf_counter() - started


async def _ask(client: httpx.AsyncClient, ask: Ask, fields: dict[str, Any]) -> Told:
    body = {
        "model": ask.model, "messages": [{"role": "user", "content": ask.prompt}], "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, **fields,
    }  # fmt: skip
    started, first, text, tokens = time.perf_counter(), 0.0, "", 0
    async with client.stream("POST", f"{ask.url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{ask.url}: {response.status_code} {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in chunk.get("choices", []):
                piece = choice["delta"].get("content") or ""
                first = first or (time.perf_counter() - started if piece else 0.0)
                text += piece
        mixture = response.headers.get("x-mediator-mixture", "")
    seconds = time.perf_counter() - started
    return Told(ask, text, first or seconds, seconds, tokens, mixture)


def speed(told: Sequence[Told], clients: int, seconds: float, memory: int) -> Speed:
    """Sum up what clients saw."""
    first, whole = sorted(one.first for one in told), sorted(one.seconds for one in told)
    return Speed(
        clients, len(told), sum(one.tokens for one in told) / seconds, quantiles(first, n=20)[9],
        quantiles(first, n=20)[18], quantiles(whole, n=20)[9], memory,
    )  # fmt: skip


def as_json(found: Speed) -> dict[str, Any]:
    """Round for a file that people read too."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(found).items()}
