"""An ASGI application that is another server: every request goes there, every answer comes back as it streams."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from mediator_cli.errors import first_line
from mediator_cli.serve.api.errors import ApiError, respond
from mediator_cli.serve.api.reply import Gone, unless_gone
from mediator_cli.serve.router.receive import header

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from mediator_cli.serve.router.meter import Meter
    from mediator_cli.serve.router.receive import Event, Receive, Scope, Send

    Headers = list[tuple[bytes, bytes]]

_OF_ONE_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"host",
}  # fmt: skip
_RETRY = {"retry-after": "1"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """Seconds to wait for a connection, for a free one, and for the next bytes of an answer; how many there may be."""

    connect: float = 5.0
    free: float = 30.0
    silence: float = 600.0
    connections: int = 256


def make_client(url: str, patience: Patience) -> httpx.AsyncClient:
    """Make a client of one server; no proxies and no passwords of the user's own are used."""
    wait = httpx.Timeout(patience.silence, connect=patience.connect, pool=patience.free)
    limits = httpx.Limits(max_connections=patience.connections, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=wait, limits=limits, trust_env=False)


@dataclass(frozen=True)
class Forward:
    """Passes requests on to the server of a client, and drops them there when the caller goes away."""

    client: httpx.AsyncClient
    meter: Meter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request with what the server says, or with 502, 503 or 504 where it says nothing."""
        listening = _Listening(receive)
        sent = _Sent(send)
        try:
            await unless_gone(self._pass(scope, listening, sent), listening.until_gone)
        except Gone:
            return
        except httpx.HTTPError as error:
            await self._fail(error, sent, scope, receive)

    async def _pass(self, scope: Scope, listening: _Listening, sent: _Sent) -> None:
        url = scope["path"] + (f"?{query}" if (query := scope.get("query_string", b"").decode("latin-1")) else "")
        has_body = any(header(scope, name) is not None for name in (b"content-length", b"transfer-encoding"))
        request = httpx.Request(
            scope["method"],
            self.client.base_url.join(url if url.startswith("/") else f"/{url}"),
            headers=one_hop_less(scope["headers"]),
            content=listening.body() if has_body else None,
            extensions={"timeout": self.client.timeout.as_dict()},
        )
        if not has_body:
            listening.body_is_over()
        answer = await self.client.send(request, stream=True)
        try:
            await sent({"type": "http.response.start", "status": answer.status_code, "headers": _answered(answer)})
            async with aclosing(answer.aiter_raw()) as parts:  # type: ignore[type-var]
                async for part in parts:
                    await sent({"type": "http.response.body", "body": part, "more_body": True})
            await sent({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await answer.aclose()

    async def _fail(self, error: httpx.HTTPError, sent: _Sent, scope: Scope, receive: Receive) -> None:
        kind, told = failure(error)
        if self.meter is not None:
            self.meter.failed(kind)
        _log.warning("%s", told.message)
        if not sent.has_begun:
            await respond(told)(scope, receive, sent.send)
        elif sent.is_events:
            # The status is long sent; clients of event streams know an error by its field.
            event = b"data: " + json.dumps(told.body()).encode() + b"\n\n"
            with suppress(OSError):
                await sent({"type": "http.response.body", "body": event, "more_body": False})
        # Else the answer stays incomplete, which breaks the connection: half an answer must not look like a whole one.


def failure(error: httpx.HTTPError) -> tuple[str, ApiError]:
    """Name a failure, and say it to the caller: 503 where the server is not there, 504 silent, 502 all else."""
    if isinstance(error, httpx.PoolTimeout):
        return "busy", ApiError(503, "too many requests are waiting for the server", code="busy", headers=_RETRY)
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        message = "the server behind the router cannot be reached; it may be starting"
        return "connect", ApiError(503, message, code="upstream_down", headers=_RETRY)
    if isinstance(error, httpx.TimeoutException):
        return "silence", ApiError(504, "the server behind the router does not answer", code="upstream_silent")
    message = f"the server behind the router broke off: {first_line(error)}"
    return "broken", ApiError(502, message, code="upstream_broken", headers=_RETRY)


def one_hop_less(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Drop the headers that are meant for one connection, those that `connection` names among them.

    >>> one_hop_less([(b"Connection", b"close, X-Own"), (b"x-own", b"1"), (b"accept", b"*/*")])
    [(b'accept', b'*/*')]
    """
    kept = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in kept if name == b"connection" for part in value.split(b",")}
    return [(name, value) for name, value in kept if name not in _OF_ONE_HOP | named]


def _answered(answer: httpx.Response) -> Headers:
    # Who served and when is told again by our own server.
    return [(name, value) for name, value in one_hop_less(answer.headers.raw) if name not in (b"date", b"server")]


class _Sent:
    """Remembers what has been sent of an answer."""

    def __init__(self, send: Send) -> None:
        self.send, self.has_begun, self.is_events = send, False, False

    async def __call__(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            self.has_begun = True
            self.is_events = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in event["headers"]
            )
        await self.send(event)


class _Listening:
    """Shares one `receive` between who sends the body on and who waits for the caller to go away."""

    def __init__(self, receive: Receive) -> None:
        self.receive, self.over = receive, asyncio.Event()

    async def body(self) -> AsyncIterator[bytes]:
        """Give the body as it comes; raise Gone when the caller goes away before its end."""
        while True:
            event = await self.receive()
            if event["type"] != "http.request":
                raise Gone
            if part := event.get("body", b""):
                yield part
            if not event.get("more_body", False):
                break
        self.over.set()

    def body_is_over(self) -> None:
        """Note that there is no body to send."""
        self.over.set()

    async def until_gone(self) -> Event:
        """Give what comes after the body, which is that the caller goes away."""
        await self.over.wait()
        return await self.receive()
