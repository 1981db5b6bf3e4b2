"""Ten thousand requests of all kinds at a server of its own process: right answers, no leak, no bare error."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from conftest import ROUTE_ALL, Workshop, add_prompts, make_workshop, with_prompts
from tiny_tokens import FILMS, SUMS

from mediator_cli.runtime.generate import Sampling, answer
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import chat_ids, load_tokenizer

pytestmark = pytest.mark.slow

N_REQUESTS, WARM, CLIENTS = 10_000, 2_000, 24
MODELS = {"auto": None, "a": "a", "b": "b", "dense": "dense", "a=0.5,b=0.5": {"a": 0.5, "b": 0.5}}
LEAK_BYTES = 24 << 20
"""What may be added by allocators between request 2,000 and the last; a token kept of each would be more."""


@dataclass(frozen=True)
class Chat:
    """A chat request with the answer that it must get, and the header that names who answered."""

    body: dict[str, object]
    text: str
    mixture: str


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # float32, so that the company of other rows changes no answer by rounding.
    made: Workshop = add_prompts(make_workshop(tmp_path_factory.mktemp("soak")))
    return made.merge("out", experts=with_prompts(), output={"dtype": "float32"}, **ROUTE_ALL)


@pytest.fixture(scope="module")
def chats(bundle: Path) -> list[Chat]:
    model, tokenizer = open_bundle(bundle), load_tokenizer(bundle)
    rng, found = random.Random(0), []
    for at in range(120):
        words = rng.choice((SUMS, FILMS))
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 30)))
        name = list(MODELS)[at % len(MODELS)]
        ids = chat_ids(tokenizer, [{"role": "user", "content": text}])
        n_tokens = rng.randrange(1, 24)
        said = answer(model, tokenizer, [ids], MODELS[name], Sampling(n_tokens))[0]
        weights = model.route([ids]).weights[0].tolist() if name == "auto" else None
        body = {
            "model": name, "messages": [{"role": "user", "content": text}], "max_tokens": n_tokens, "temperature": 0,
        }  # fmt: skip
        found.append(Chat(body, said, _header(name, weights)))
    return found


def _header(name: str, weights: list[float] | None) -> str:
    if weights is not None:
        return ",".join(f"{expert}={weight:g}" for expert, weight in zip("ab", weights, strict=True) if weight)
    return {"a": "a=1", "b": "b=1", "dense": ""}.get(name, name)


@pytest.fixture
def server(bundle: Path, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "mediator_cli", "serve", bundle, "--port", str(port), "--quiet", "--rows", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
        try:
            _until_healthy(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()
            process.wait(30)


def _until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise TimeoutError(url)


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Crowd:
    """Clients that ask what a seed says, and count what they saw; wrong answers are kept."""

    def __init__(self, url: str, chats: list[Chat], pid: int) -> None:
        self.url, self.chats, self.pid = f"{url}/v1/chat/completions", chats, pid
        self.seen: Counter[str] = Counter()
        self.wrong: list[object] = []
        self.memory: dict[int, int] = {}

    async def run(self) -> None:
        numbers = iter(range(N_REQUESTS))
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._one(client, numbers) for _ in range(CLIENTS)))

    async def _one(self, client: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        kinds = {"whole": 40, "stream": 30, "abort": 10, "json": 5, "model": 5, "long": 5, "field": 5}
        for number in numbers:
            rng = random.Random(number)
            kind = rng.choices(list(kinds), list(kinds.values()))[0]
            await getattr(self, f"_{kind}")(client, rng.choice(self.chats))
            self.seen[kind] += 1
            if number in (WARM, N_REQUESTS - 1):
                self.memory[number] = resident(self.pid)

    async def _whole(self, client: httpx.AsyncClient, chat: Chat) -> None:
        response = await client.post(self.url, json=chat.body)
        found = response.json()
        text = found["choices"][0]["message"]["content"] if response.status_code == 200 else found
        self._compare(chat, text, response)

    async def _stream(self, client: httpx.AsyncClient, chat: Chat) -> None:
        text = ""
        async with client.stream("POST", self.url, json=chat.body | {"stream": True}) as response:
            async for piece in _pieces(response):
                text += piece
        self._compare(chat, text, response)

    async def _abort(self, client: httpx.AsyncClient, chat: Chat) -> None:
        body = chat.body | {"stream": True, "max_tokens": 200, "ignore_eos": True}
        async with client.stream("POST", self.url, json=body) as response:
            async for _ in _pieces(response):
                break

    async def _json(self, client: httpx.AsyncClient, chat: Chat) -> None:
        await self._refused(client, 400, content=json.dumps(chat.body)[:-3])

    async def _model(self, client: httpx.AsyncClient, chat: Chat) -> None:
        await self._refused(client, 404, json=chat.body | {"model": "nobody"})

    async def _long(self, client: httpx.AsyncClient, chat: Chat) -> None:
        await self._refused(client, 400, json=chat.body | {"messages": [{"role": "user", "content": "film " * 3000}]})

    async def _field(self, client: httpx.AsyncClient, chat: Chat) -> None:
        await self._refused(client, 400, json=chat.body | {"temperature": "hot", "max_tokens": -1})

    async def _refused(self, client: httpx.AsyncClient, status: int, **body: object) -> None:
        response = await client.post(self.url, headers={"content-type": "application/json"}, **body)
        told = response.json().get("error", {}).get("message")
        if response.status_code != status or not told:
            self.wrong.append((status, response.status_code, response.text[:300]))

    def _compare(self, chat: Chat, text: object, response: httpx.Response) -> None:
        found = response.headers.get("x-mediator-mixture", "")
        if response.status_code != 200 or text != chat.text or (found if found != "dense" else "") != chat.mixture:
            self.wrong.append((chat, response.status_code, text, found))


async def _pieces(response: httpx.Response) -> Iterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                if choice["delta"].get("content"):
                    yield choice["delta"]["content"]


def test_ten_thousand_mixed_requests(server: tuple[str, subprocess.Popen[bytes]], chats: list[Chat]) -> None:
    assert len({chat.text for chat in chats}) > 20
    assert {"a=1", "b=1", "", "a=0.5,b=0.5"} <= {chat.mixture for chat in chats}
    url, process = server
    crowd = Crowd(url, chats, process.pid)
    asyncio.run(crowd.run())
    assert crowd.wrong == []
    assert sum(crowd.seen.values()) == N_REQUESTS
    assert min(crowd.seen.values()) > 300
    grown = crowd.memory[N_REQUESTS - 1] - crowd.memory[WARM]
    assert grown < LEAK_BYTES, f"{grown / 1e6:.1f} MB more"
    metrics = httpx.get(f"{url}/metrics", trust_env=False).text
    assert [line for line in metrics.splitlines() if "running" in line and not line.startswith("#")]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
