"""The answers to one HTTP request, brought from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mediator_cli.errors import MediatorError
from mediator_cli.serve.api.errors import from_problem, shutting_down
from mediator_cli.serve.engine.engine import EngineClosed, EngineFull
from mediator_cli.serve.engine.request import Failed, Finished, Started, Text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from mediator_cli.serve.api.errors import ApiError
    from mediator_cli.serve.api.settings import Answers, Ticket
    from mediator_cli.serve.engine.request import Event, Request, Scored


@dataclass
class Answer:
    """One answer as far as it has come; `first_at` and `over_at` are seconds of the monotonic clock."""

    started: Started | None = None
    parts: list[str] = field(default_factory=list)
    tokens: list[Scored] = field(default_factory=list)
    end: Finished | None = None
    first_at: float | None = None
    over_at: float | None = None

    def take(self, event: Event) -> None:
        """Add what an event tells."""
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Text):
            self.first_at = self.first_at or time.monotonic()
            self.parts.append(event.text)
            self.tokens += event.tokens
        elif isinstance(event, Finished):
            self.end, self.over_at = event, time.monotonic()

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.parts)


@dataclass
class Flow:
    """Events of several requests, in the order in which they came; `answers` are what they came to."""

    answers: list[Answer]
    queue: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)
    tickets: list[Ticket] = field(default_factory=list)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Give events until all answers are complete; raise ApiError where one fails. Call it once."""
        while any(answer.end is None for answer in self.answers):
            at, event = await self.queue.get()
            if isinstance(event, Failed):
                raise failure(event)
            if isinstance(event, Finished) and event.reason == "cancelled":
                raise shutting_down()
            self.answers[at].take(event)
            yield at, event

    def receiver(self, at: int, loop: asyncio.AbstractEventLoop) -> Callable[[Event], None]:
        """Make what takes the events of one answer, from any thread; once the loop has ended it raises."""

        def receive(event: Event) -> None:
            loop.call_soon_threadsafe(self.queue.put_nowait, (at, event))

        return receive

    def cancel(self) -> None:
        """Let go of all that is not complete."""
        for ticket, answer in zip(self.tickets, self.answers, strict=False):
            if answer.end is None:
                ticket.cancel()


def begin(engine: Answers, requests: Sequence[Request]) -> Flow:
    """Submit requests; raise ApiError, and take none of them, where the engine does not take one."""
    flow, loop = Flow([Answer() for _ in requests]), asyncio.get_running_loop()
    try:
        for at, request in enumerate(requests):
            flow.tickets.append(engine.submit(request, flow.receiver(at, loop)))
    except MediatorError as error:
        flow.cancel()
        raise _refusal(error) from None
    return flow


def failure(failed: Failed) -> ApiError:
    """Tell why there is no answer."""
    return from_problem(failed.problem, 500 if failed.is_ours else 400, "internal_error" if failed.is_ours else None)


def _refusal(error: MediatorError) -> ApiError:
    problem = error.problems[0]
    if isinstance(error, EngineFull):
        return from_problem(problem, 429, "queue_full")
    if isinstance(error, EngineClosed):
        return shutting_down()
    is_long = problem.place == "prompt" and "more than" in problem.message
    return from_problem(problem, 400, "context_length_exceeded" if is_long else None)
