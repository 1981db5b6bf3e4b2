"""What every request passes, whatever it asks: an id, the key, limits, the log, and an error body for any failure."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders

from mediator_cli.serve.api.errors import ApiError, respond, shutting_down, unexpected

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mediator_cli.serve.api.settings import Life, Settings

_LOG = logging.getLogger("mediator.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LONGEST_PATH = 200
ID_HEADER = "x-request-id"


@dataclass(frozen=True)
class Access:
    """One request as the log tells it; what was asked and answered is not in it."""

    request_id: str
    method: str
    path: str
    status: int
    milliseconds: float
    model: str | None = None
    mixture: str | None = None


@dataclass
class Passing:
    """A request on its way: the status that was sent, None before."""

    request_id: str
    started_at: float
    status: int | None = None


@dataclass(frozen=True)
class Gate:
    """Middleware around all endpoints; `told` hears of every request when its reply has ended."""

    app: ASGIApp
    settings: Settings
    life: Life
    told: Callable[[Access], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        passing = Passing(_request_id(Headers(scope=scope)), time.monotonic())
        scope["state"] = {**scope.get("state", {}), "request_id": passing.request_id, "started_at": passing.started_at}
        sender = _noting(passing, send)
        try:
            await self._pass(scope, receive, sender)
        except ApiError as error:
            await self._refuse(error, passing, scope, receive, sender)
        except Exception:  # noqa: BLE001 - the last frame before the socket
            _LOG.exception("request %s failed", passing.request_id)
            await self._refuse(unexpected(passing.request_id), passing, scope, receive, sender)
        finally:
            self.told(_access(passing, scope))

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check_key(scope["path"], headers)
        if scope["method"] == "POST":
            self._check_post(headers)
            receive = self._limited(receive)
        await self.app(scope, receive, send)

    async def _refuse(self, error: ApiError, passing: Passing, scope: Scope, receive: Receive, send: Send) -> None:
        if passing.status is None:
            await respond(error)(scope, receive, send)

    def _check_key(self, path: str, headers: Headers) -> None:
        """Ask for the key where one is set: everywhere but for the page itself and the state of health."""
        key = self.settings.api_key
        is_open = path in ("/", "/health") or (path == "/metrics" and self.settings.open_metrics)
        if key is None or is_open:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            what = "wrong API key" if given else "no API key; send Authorization: Bearer KEY"
            raise ApiError(401, what, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_post(self, headers: Headers) -> None:
        if self.life.is_draining:
            raise shutting_down()
        # Web pages of others may send plain text unasked, JSON they may not.
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send JSON, with Content-Type: application/json")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self.settings.max_body:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """Count the bytes of a body that does not say how long it is."""
        n_read = 0

        async def counted() -> Message:
            nonlocal n_read
            message = await receive()
            n_read += len(message.get("body", b""))
            if n_read > self.settings.max_body:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        # What is left of the body is not read, so the connection is of no more use.
        return ApiError(
            413, f"the body is larger than {self.settings.max_body} bytes", code="body_too_large",
            headers={"connection": "close"},
        )  # fmt: skip


def _noting(passing: Passing, send: Send) -> Send:
    """Add the request's id to its reply, and note the status."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            passing.status = message["status"]
            MutableHeaders(scope=message)[ID_HEADER] = passing.request_id
        await send(message)

    return sender


def _request_id(headers: Headers) -> str:
    given = headers.get(ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _access(passing: Passing, scope: Scope) -> Access:
    state: dict[str, Any] = scope["state"]
    milliseconds = round(1000 * (time.monotonic() - passing.started_at), 1)
    path = scope["path"][:_LONGEST_PATH].encode("unicode_escape").decode()
    status = passing.status or 499
    return Access(
        passing.request_id, scope["method"], path, status, milliseconds, state.get("model"), state.get("mixture")
    )
