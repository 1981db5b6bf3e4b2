"""The router as a server of its own before another one: `mediator serve DIR --upstream URL`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from starlette.responses import JSONResponse, Response

from mediator_cli.errors import BundleError, Problem
from mediator_cli.serve.router.decide import open_router
from mediator_cli.serve.router.forward import Forward, Patience, make_client
from mediator_cli.serve.router.front import Front
from mediator_cli.serve.router.grid import make_grid
from mediator_cli.serve.router.meter import make_meter
from mediator_cli.serve.router.middleware import RouterMiddleware
from mediator_cli.serve.router.targets import Scales, TopOne

if TYPE_CHECKING:
    from pathlib import Path

    from mediator_cli.serve.router.decide import OpenRouter
    from mediator_cli.serve.router.receive import App, Receive, Scope, Send
    from mediator_cli.serve.router.targets import Target

_SOON = 2.0
_OK = 200
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Upstream:
    """The server behind the proxy, and how it is asked for mixtures.

    `kind` openai: vLLM and all others that take an adapter's name as `model`; llama.cpp: a scale for each adapter.
    `mixtures` grid builds adapters from those below `adapters` and has the server load them, `most_built` at a time;
    `built` is where, by default a temporary folder. `dense` and `models` (such as `dense:{expert}`) are the server's
    names, where they are not those of the exported router.
    """

    url: str
    kind: Literal["openai", "llama.cpp"] = "openai"
    mixtures: Literal["top1", "grid"] = "top1"
    adapters: Path | None = None
    built: Path | None = None
    most_built: int = 16
    step: float = 0.25
    dense: str | None = None
    models: str | None = None
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Fronting:
    """Limits of the proxy itself: the longest body that it reads, and whether conversations keep their first expert."""

    max_body: int = 4 << 20
    pin: bool = False


@dataclass
class Running:
    """How many requests are being answered."""

    n: int = 0


@dataclass(frozen=True)
class Proxy:
    """An ASGI application: health and counts of its own, all else the server behind it, through the router."""

    router: OpenRouter
    client: httpx.AsyncClient
    routed: App
    registry: CollectorRegistry
    running: Running = field(default_factory=Running)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            is_own = scope["method"] in ("GET", "HEAD")
            if is_own and scope["path"] == "/health":
                await (await self._health())(scope, receive, send)
            elif is_own and scope["path"] == "/metrics":
                counts = generate_latest(self.registry)
                await Response(counts, headers={"content-type": _METRICS_TYPE})(scope, receive, send)
            else:
                self.running.n += 1
                try:
                    await self.routed(scope, receive, send)
                finally:
                    self.running.n -= 1

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            event = await receive()
            if event["type"] == "lifespan.shutdown":
                await self.client.aclose()
            await send({"type": f"{event['type']}.complete"})
            if event["type"] == "lifespan.shutdown":
                return

    async def _health(self) -> Response:
        """Say how the router and the server behind it are: 503 where another proxy should be asked."""
        status: int | None = None
        with suppress(httpx.HTTPError):
            status = (await self.client.get("/health", timeout=_SOON)).status_code
        upstream: dict[str, Any] = {"url": shown(self.client.base_url), "status": "ok" if status == _OK else "down"}
        experts = list(self.router.models)
        told = {
            "status": "ok" if status == _OK else "upstream down",
            "router": {"experts": experts, "features": self.router.record.features},
            "upstream": upstream,
        }
        return JSONResponse(told, 200 if status == _OK else 503)


def shown(url: httpx.URL) -> str:
    """Write a URL without what it may hold of a password."""
    return str(url.copy_with(username=None, password=None, query=None, fragment=None))


def make_proxy(folder: Path, upstream: Upstream, fronting: Fronting | None = None) -> Proxy:
    """Make the application for a bundle or an exported router.

    Raises BundleError for a folder without router, for adapters that are missing, and for a URL that is none.
    """
    url = _checked(upstream.url)
    router = _renamed(open_router(folder), upstream)
    registry = CollectorRegistry()
    meter = make_meter(registry)
    client = make_client(url, upstream.patience)
    target = _target(router, upstream, client)
    limits = fronting or Fronting()
    front = Front(
        router, target, max_body=limits.max_body, pin=limits.pin, closed=target.paths, meter=meter
    )  # fmt: skip
    return Proxy(router, client, RouterMiddleware(Forward(client, meter), front), registry)


def _renamed(router: OpenRouter, upstream: Upstream) -> OpenRouter:
    models = router.models
    if upstream.models is not None:
        if "{expert}" not in upstream.models:
            message = f"'{upstream.models}' gives all experts one name"
            raise BundleError(Problem("--upstream-models", message, "write for example dense:{expert}"))
        models = {expert: upstream.models.replace("{expert}", expert) for expert in models}
    return replace(router, models=models, dense=upstream.dense or router.dense)


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
        is_good = parsed.scheme in ("http", "https") and bool(parsed.host)
    except httpx.InvalidURL:
        is_good = False
    if not is_good:
        raise BundleError(Problem("--upstream", f"'{url}' is no URL", "write for example http://127.0.0.1:8000"))
    # All paths come with their own /v1.
    return url.rstrip("/").removesuffix("/v1")


def _target(router: OpenRouter, upstream: Upstream, client: httpx.AsyncClient) -> Target:
    if upstream.kind == "llama.cpp":
        return Scales(client, router.models)
    top_one = TopOne(router.dense, router.models)
    if upstream.mixtures == "top1":
        return top_one
    adapters = upstream.adapters or router.folder.parent / "adapters"
    return make_grid(
        top_one, adapters, client, built=upstream.built, most=upstream.most_built, step=upstream.step
    )  # fmt: skip
