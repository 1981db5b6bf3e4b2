"""Bodies of requests in ASGI: read up to a limit, and given once more to the application behind us."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.serve.api.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Event = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Event]]
    Send = Callable[[Event], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """Read a whole body; None when the client has gone. Raises ApiError 413 above `limit` bytes, as soon as seen."""
    stated = header(scope, b"content-length")
    if stated is not None and stated.isdigit() and int(stated) > limit:
        raise _too_large(limit)
    body = bytearray()
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        body += event.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not event.get("more_body", False):
            return bytes(body)


def _too_large(limit: int) -> ApiError:
    # What is left of the body is not read, so the connection cannot go on.
    message = f"the body is longer than the {limit} bytes that the router reads"
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


def header(scope: Scope, name: bytes) -> str | None:
    """Give the first header of a name in small letters."""
    found = next((value for key, value in scope["headers"] if key.lower() == name), None)
    return None if found is None else found.decode("latin-1")


def with_body(scope: Scope, body: bytes) -> Scope:
    """Give a request another body: its length, and nothing of how the old one was sent."""
    gone = (b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in gone]
    return {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}


def replay(body: bytes, receive: Receive) -> Receive:
    """Give a body at once, and after it whatever the client does."""
    is_given = False

    async def again() -> Event:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
