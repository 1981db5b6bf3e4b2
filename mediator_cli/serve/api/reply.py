"""Replies to requests: whole, or as a stream of server-sent events, with what the router decided."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response

from mediator_cli.serve.api.errors import ApiError, respond
from mediator_cli.serve.engine.request import Finished, Started, Text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from typing import TypeVar

    from starlette.types import Receive, Scope, Send

    from mediator_cli.serve.api.asking import Question
    from mediator_cli.serve.api.flow import Flow
    from mediator_cli.serve.api.shapes import Shape

    T = TypeVar("T")

MIXTURE_HEADER, UNCERTAINTY_HEADER = "x-mediator-mixture", "x-mediator-uncertainty"
_DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """The caller has gone, so nobody reads an answer."""


@dataclass(frozen=True)
class Reply:
    """What is written of a question's answers; `over` is called once with the flow when nothing more is written."""

    question: Question
    shape: Shape
    flow: Flow
    request_id: str
    over: Callable[[Flow], None]

    async def whole(self, receive: Receive) -> Response:
        """Wait for all answers; raise ApiError for one that fails, and Gone where the caller does not wait."""
        try:
            await unless_gone(self._finish(), receive)
        finally:
            self._end()
        body = self._head(self.shape.kind) | {
            "choices": [self._choice(at) for at in range(len(self.flow.answers))],
            "usage": self._usage(),
            "mediator": told(self._first),
        }
        return JSONResponse(body, headers=headers(self._first))

    async def stream(self, receive: Receive) -> Response:
        """Wait until the first answer begins, since headers tell who answers; then stream."""
        events = self.flow.events()
        try:
            early = await unless_gone(self._until_begun(events), receive)
        except BaseException:
            self._end()
            raise
        return EventStream(self._written(early, events), self._end, headers(self._first))

    @property
    def _first(self) -> Started:
        return self.flow.answers[0].started or Started({})

    async def _finish(self) -> None:
        async with aclosing(self.flow.events()) as events:  # type: ignore[type-var]
            async for _ in events:
                pass

    async def _until_begun(self, events: AsyncIterator[tuple[int, Any]]) -> list[tuple[int, Any]]:
        early = []
        async for at, event in events:
            early.append((at, event))
            if self.flow.answers[0].started is not None:
                break
        return early

    def _end(self) -> None:
        self.flow.cancel()
        self.over(self.flow)

    async def _written(
        self, early: list[tuple[int, Any]], events: AsyncIterator[tuple[int, Any]]
    ) -> AsyncIterator[bytes]:
        """Write events as they come; what goes wrong now can only be told as an event."""
        try:
            for at, event in early:
                yield self._chunk(at, event)
            async for at, event in events:
                yield self._chunk(at, event)
            if self.question.tells_usage:
                yield _event(self._head(self.shape.chunk_kind) | {"choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _event(error.body())
        yield _DONE

    def _chunk(self, at: int, event: Started | Text | Finished) -> bytes:
        chunk = self._head(self.shape.chunk_kind)
        if isinstance(event, Started):
            chunk |= {"choices": [self.shape.opening(at, event)], "mediator": told(event)}
        elif isinstance(event, Text):
            chunk["choices"] = [self.shape.more(at, event)]
        else:
            chunk["choices"] = [self.shape.closing(at, event.reason)]
        return _event(chunk | ({"usage": None} if self.question.tells_usage else {}))

    def _choice(self, at: int) -> dict[str, Any]:
        """Write an answer; where prompts are several, each tells who answered it."""
        answer = self.flow.answers[at]
        several = len(self.flow.answers) > self.question.n
        own = {"mediator": told(answer.started)} if several and answer.started is not None else {}
        return self.shape.whole(at, answer) | own

    def _head(self, kind: str) -> dict[str, Any]:
        name = self.question.model.name
        return {"id": self.shape.prefix + self.request_id, "object": kind, "created": int(time.time()), "model": name}

    def _usage(self) -> dict[str, Any]:
        """Count tokens; a prompt that is answered several times is counted once."""
        answers = self.flow.answers
        prompts = answers[:: self.question.n]
        n_prompt = sum(answer.end.n_prompt for answer in prompts if answer.end)
        n_answer = sum(answer.end.n_answer for answer in answers if answer.end)
        n_cached = sum(answer.started.n_cached for answer in prompts if answer.started)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }


class EventStream(Response):
    """Server-sent events that end with the connection: a caller that goes away is heard even while nothing is sent."""

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncIterator[bytes], over: Callable[[], None], headers: Mapping[str, str]) -> None:
        self.parts, self.over, self.status_code, self.background = parts, over, 200, None
        # Proxies that gather a response before they pass it on would make a stream useless.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            with suppress(Gone):
                await unless_gone(self._send(send), receive)
        finally:
            self.over()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(work: Awaitable[T], receive: Receive) -> T:
    """Wait for work, and drop it when the caller disconnects; raise Gone then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def told(started: Started) -> dict[str, Any]:
    """Tell who answers and how sure the router was."""
    return {
        "mixture": dict(started.mixture),
        "probabilities": None if started.probabilities is None else dict(started.probabilities),
        "uncertainty": started.uncertainty,
        "outside": started.is_outside,
        "cached_tokens": started.n_cached,
    }


def headers(started: Started) -> dict[str, str]:
    """Tell the same in headers."""
    found = {MIXTURE_HEADER: mixture_header(started.mixture)}
    if started.uncertainty is not None:
        found[UNCERTAINTY_HEADER] = f"{started.uncertainty:.4g}"
    return found


def mixture_header(mixture: Mapping[str, float]) -> str:
    """Write a mixture for a header.

    >>> mixture_header({"maths": 0.75, "language": 0.25}), mixture_header({})
    ('maths=0.75,language=0.25', 'dense')
    """
    # Names may hold what a header may not.
    return ",".join(f"{quote(name, safe='')}={weight:.4g}" for name, weight in mixture.items()) or "dense"


def gone_reply() -> Response:
    """Make the reply to a caller that has gone, for the log alone."""
    return respond(ApiError(499, "the caller has gone"))


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
