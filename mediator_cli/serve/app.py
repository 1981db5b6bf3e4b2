"""The server of our own run time: endpoints, what every request passes, the chat page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from mediator_cli.errors import did_you_mean
from mediator_cli.serve.api.endpoints import Endpoints, schema
from mediator_cli.serve.api.errors import ApiError, respond
from mediator_cli.serve.api.fields import ChatBody, CompletionBody, RouteBody
from mediator_cli.serve.api.gate import ID_HEADER, Gate
from mediator_cli.serve.api.metrics import Metrics
from mediator_cli.serve.api.page import page_response
from mediator_cli.serve.api.reply import MIXTURE_HEADER, UNCERTAINTY_HEADER
from mediator_cli.serve.api.settings import Life, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel
    from starlette.requests import Request
    from starlette.responses import Response

    from mediator_cli.serve.api.gate import Access
    from mediator_cli.serve.api.settings import Answers, Served


def make_app(
    engine: Answers,
    served: Served,
    settings: Settings | None = None,
    life: Life | None = None,
    told: Callable[[Access], None] | None = None,
) -> FastAPI:
    """Make the server of a bundle that an engine answers for; `told` hears of every request, for the log."""
    settings, life = settings or Settings(), life or Life()
    metrics = Metrics(engine)
    ends = Endpoints(engine, served, settings, metrics, life)
    # Pages that describe an API for people load their parts from elsewhere; the description itself is here.
    app = FastAPI(title="mediator", docs_url=None, redoc_url=None)
    _add_endpoints(app, ends)
    app.add_exception_handler(HTTPException, _other)
    app.add_middleware(Gate, settings=settings, life=life, told=_counting(app, metrics, told))
    if settings.origins:
        _allow(app, settings.origins)
    return app


def _add_endpoints(app: FastAPI, ends: Endpoints) -> None:
    posts: dict[str, tuple[Callable[..., Any], type[BaseModel]]] = {
        "/v1/chat/completions": (ends.chat, ChatBody),
        "/v1/completions": (ends.completion, CompletionBody),
        "/v1/route": (ends.route, RouteBody),
    }
    gets = {
        "/v1/models": ends.models,
        "/v1/models/{name}": ends.model,
        "/health": ends.health,
        "/metrics": ends.counts,
        "/": page_response,
    }
    for path, (handler, body) in posts.items():
        app.add_api_route(path, handler, methods=["POST"], response_model=None, openapi_extra=schema(body))
    for path, get in gets.items():
        app.add_api_route(path, get, methods=["GET"], response_model=None)


def _allow(app: FastAPI, origins: tuple[str, ...]) -> None:
    """Let web pages of these origins ask; outermost, since browsers ask first without a key."""
    app.add_middleware(
        CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", ID_HEADER],
        expose_headers=[MIXTURE_HEADER, UNCERTAINTY_HEADER, ID_HEADER],
    )  # fmt: skip


def _counting(app: FastAPI, metrics: Metrics, told: Callable[[Access], None] | None) -> Callable[[Access], None]:
    known = {getattr(route, "path", "") for route in app.routes}

    def count(access: Access) -> None:
        # Nobody may make a new line in the metrics for every path there is.
        named = "/v1/models/{name}" if access.path.startswith("/v1/models/") else access.path
        endpoint = named if named in known else "other"
        metrics.requests.labels(endpoint, str(access.status), access.model or "none").inc()
        metrics.seconds.labels(endpoint).observe(access.milliseconds / 1000)
        if told is not None:
            told(access)

    return count


async def _other(request: Request, error: Any) -> Response:  # noqa: ANN401 - starlette gives any exception
    """Tell errors of the framework as all others: no such page, no such method."""
    if isinstance(error, ApiError):
        return respond(error)
    path, method = request.url.path, request.method
    if error.status_code == 404:
        known = [route.path for route in request.app.routes]
        return respond(ApiError(404, f"nothing at {path}; {did_you_mean(path, known)}", code="not_found"))
    if error.status_code == 405:
        return respond(ApiError(405, f"{path} takes no {method}", code="method_not_allowed", headers=error.headers))
    return respond(ApiError(error.status_code, str(error.detail), headers=error.headers))
