"""Listen on a socket until told to stop, and then stop without breaking off answers."""

from __future__ import annotations

import signal
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn

from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from starlette.types import ASGIApp

_KEPT_SECONDS = 65
"""Connections that clients keep for their next request; longer than clients and balancers do, who then close first."""
_LAST_SECONDS = 5
_MOST_PORT = 65535


@dataclass(frozen=True)
class Turns:
    """What is done as the server comes and goes: `ready` hears the URL; `stop` may take its time, `now` may not."""

    ready: Callable[[str], None]
    stop: Callable[[], None]
    now: Callable[[], None]


class _Server(uvicorn.Server):
    """A server that finishes what runs at the first SIGTERM or Ctrl-C, and leaves at the second."""

    def __init__(self, config: uvicorn.Config, turns: Turns, url: str) -> None:
        super().__init__(config)
        self.turns, self.url, self.is_stopping = turns, url, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:
            self.turns.ready(self.url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Hear a signal; the server's own way would end the process with it, and this end is no failure."""
        if self.is_stopping:
            self.force_exit = self.should_exit = True
            threading.Thread(target=self.turns.now, daemon=True).start()
            return
        self.is_stopping = True
        threading.Thread(target=self._stop, name="mediator-stop", daemon=True).start()

    def _stop(self) -> None:
        try:
            self.turns.stop()
        finally:
            self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Take an address, 0 = any free port, before anything long is done; raise OutputError where it is taken.

    Clients are not heard yet: until the server listens they are refused and may try again.
    """
    if not 0 <= port <= _MOST_PORT:
        raise OutputError(Problem("--port", f"{port} is no port", "give one up to 65535; 0 takes a free one"))
    sock: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise _taken(f"{host}:{port}", error) from None
    return sock


def _taken(address: str, error: OSError) -> OutputError:
    message = f"cannot listen at {address}: {(error.strerror or 'no such address').lower()}"
    return OutputError(Problem("--port", message, "choose another with --port; 0 takes a free one"))


def url_of(sock: socket.socket) -> str:
    """Write where a socket listens, as a client would."""
    host, port = sock.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def is_local(sock: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    host = str(sock.getsockname()[0])
    return host == "::1" or host.startswith("127.")


def configured(app: ASGIApp, **settings: Any) -> uvicorn.Config:  # noqa: ANN401 - uvicorn's own
    """Configure the HTTP server: no log of its own, since every request is told in ours."""
    return uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", server_header=False, timeout_keep_alive=_KEPT_SECONDS,
        timeout_graceful_shutdown=_LAST_SECONDS, **settings,
    )  # fmt: skip


def listen(app: ASGIApp, sock: socket.socket, turns: Turns) -> None:
    """Serve until SIGTERM or Ctrl-C, in the main thread; a second one does not wait for answers."""
    server = _Server(configured(app), turns, url_of(sock))
    before = signal.getsignal(signal.SIGTERM)
    try:
        server.run(sockets=[sock])
    except OSError as error:
        if server.started:
            raise
        # Another one that was bound to the same address has begun to listen there first.
        raise _taken(url_of(sock), error) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        sock.close()
