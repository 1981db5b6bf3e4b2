"""An engine that answers without a model, and a server of it on loopback."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp
from tiny_tokens import WORDS, word_tokenizer

from mediator_cli.errors import BundleError, Problem
from mediator_cli.serve.api.gate import Access
from mediator_cli.serve.api.settings import Life, Served, Settings
from mediator_cli.serve.app import make_app
from mediator_cli.serve.engine.engine import EngineClosed, EngineFull, Facts
from mediator_cli.serve.engine.request import Event, Failed, Finished, Request, Scored, Started, Text
from mediator_cli.serve.listen import bind, configured, url_of

EXPERTS = ("maths", "films")
CONTEXT = 64


def answer_of(request: Request) -> list[int]:
    """Choose the tokens of an answer: those of the prompt backwards, then the seed's word for ever."""
    rest = 5 + (request.draw.seed or 0) % 15
    tokens = [*reversed(request.prompt), *[rest] * request.max_tokens]
    return tokens[: request.max_tokens]


def scored(token: int, log_prob: float | None) -> Scored:
    text = f" {WORDS[token % len(WORDS)]}"
    best = () if log_prob is None else ((token, text, text.encode(), log_prob), (1, " x", b" x", -9.5))
    return Scored(token, text, text.encode(), log_prob, best)


@dataclass
class FakeTicket:
    request: Request
    deliver: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class FakeEngine:
    """Answers each request in a thread of its own, as fast as it can; `hold` set to a new Event makes all wait for it
    after the first token. `fails` is told instead of an answer."""

    waiting: int = 0
    is_full: bool = False
    is_closed: bool = False
    is_alive: bool = True
    hold: threading.Event | None = None
    fails: Failed | None = None
    fails_late: bool = False
    tickets: deque[FakeTicket] = field(default_factory=lambda: deque(maxlen=1000))
    drained: float | None = None

    @property
    def facts(self) -> Facts:
        return Facts(self.waiting, 2, 100, 40, 70, 9, 3, 4096, 1024, 5, self.is_alive)

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> FakeTicket:
        if self.is_closed:
            raise EngineClosed(Problem("", "the server is shutting down"))
        if self.is_full:
            raise EngineFull(Problem("", "9 requests are waiting", "try again later"))
        if len(request.prompt) + request.max_tokens > CONTEXT:
            message = f"{len(request.prompt)} tokens are more than the {CONTEXT}"
            raise BundleError(Problem("prompt", message, "shorten it"))
        ticket = FakeTicket(request, deliver)
        self.tickets.append(ticket)
        threading.Thread(target=self._answer, args=(ticket,), daemon=True).start()
        return ticket

    def drain(self, seconds: float) -> bool:
        self.drained = seconds
        return True

    def _answer(self, ticket: FakeTicket) -> None:
        for event in self._events(ticket):
            if ticket.cancelled.is_set():
                ticket.deliver(Finished("cancelled", len(ticket.request.prompt), 0))
                return
            ticket.deliver(event)

    def _events(self, ticket: FakeTicket) -> Iterator[Event]:
        request = ticket.request
        if self.fails is not None and not self.fails_late:
            yield self.fails
            return
        yield started(request)
        for at, token in enumerate(answer_of(request)):
            if at == 1 and self.hold is not None:
                while not self.hold.wait(0.005) and not ticket.cancelled.is_set():
                    pass
            if at == 1 and self.fails is not None:
                yield self.fails
                return
            one = scored(token, -0.5 * at)
            yield Text(one.text, (one,) if request.logprobs is not None else ())
        yield Finished("length", len(request.prompt), request.max_tokens)


def started(request: Request) -> Started:
    """Route by the first token of what is read: an even one is maths, an odd one both, and 4 is unlike anything."""
    echoed = tuple(scored(token, -float(at) if at else None) for at, token in enumerate(request.prompt))
    echoed = echoed if request.echo else ()
    if request.mixture is not None:
        return Started(dict(request.mixture), prompt=echoed)
    read = request.route_on or request.prompt
    share = 0.25 if sum(read) % 2 else 1.0
    mixture = {"maths": share, "films": 1 - share} if share < 1 else {"maths": 1.0}
    return Started(mixture, {"maths": share, "films": 1 - share}, 0.125, sum(read) % 5 == 0, 3, echoed)


def fake_served(**changes: object) -> Served:
    plain = Served("tales", EXPERTS, word_tokenizer(), len(WORDS), CONTEXT, routes=True, pins=True, created=7)
    return replace(plain, **changes)


@dataclass
class Running:
    """A server on loopback."""

    url: str
    client: httpx.Client
    life: Life
    told: list[Access]
    engine: Any = None


@contextmanager
def on_loopback(app: ASGIApp) -> Iterator[str]:
    """Serve an app from a thread; give its URL."""
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(configured(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.002)
        yield url_of(sock)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)


@contextmanager
def serving(engine: object, served: Served | None = None, **settings: object) -> Iterator[Running]:
    """Serve an engine from a thread."""
    life, told = Life(), []
    app = make_app(engine, served or fake_served(), Settings(**settings), life, told.append)
    with on_loopback(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield Running(url, client, life, told, engine)


def until(is_so: Callable[[], object]) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)
