"""Our router as one ASGI class, in the process of another server or as the front of a proxy.

It reads the bodies of two paths, decides who answers, and passes the request on with another `model`. All else, and
every answer, goes through as it comes.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from mediator_cli.errors import MediatorError
from mediator_cli.serve.api.errors import ApiError, from_problem, respond
from mediator_cli.serve.api.reply import MIXTURE_HEADER, UNCERTAINTY_HEADER, mixture_header
from mediator_cli.serve.router.asking import (
    CHAT,
    COMPLETION,
    MODELS,
    OURS,
    Ask,
    Names,
    chat_of,
    dump,
    parse,
    prompts_of,
    read_ask,
    without_ours,
)
from mediator_cli.serve.router.decide import Decision
from mediator_cli.serve.router.receive import header, read_body, replay, with_body

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.serve.router.decide import OpenRouter
    from mediator_cli.serve.router.front import Front
    from mediator_cli.serve.router.receive import App, Event, Receive, Scope, Send
    from mediator_cli.serve.router.targets import Placed

_MOST_LISTED = 16 << 20
_OK, _NOT_FOUND = 200, 404
WANTED_HEADER, ERROR_HEADER = "x-mediator-wanted", "x-mediator-error"
"""The router's mixture where another one answers, and how far the two are from each other."""


class RouterMiddleware:
    """Chooses the model of requests that leave the choice to the router; without `front`, as the environment says."""

    def __init__(self, app: App, front: Front | None = None) -> None:
        if front is None:
            from mediator_cli.serve.router.environment import front_from_environment

            front = front_from_environment(app)
        self.app, self.front = app, front
        self.names = Names(front.names, tuple(front.router.models))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        method, path = scope.get("method"), _path(scope) if scope["type"] == "http" else ""
        if method == "GET" and path == MODELS:
            await self._list(scope, receive, send)
        elif path in self.front.closed:
            message = "adapters are loaded by the router alone while it builds mixtures"
            await respond(ApiError(403, message, code="closed"))(scope, receive, send)
        elif method == "POST" and path in (CHAT, COMPLETION):
            try:
                await self._answer(path, scope, receive, send)
            except ApiError as error:
                await respond(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await read_body(scope, receive, self.front.max_body)
        if raw is None:
            return
        body = None if header(scope, b"content-encoding") not in (None, "identity") else parse(raw)
        ask = None if body is None else read_ask(body, self.names)
        if body is None or ask is None:
            sent = raw if body is None or OURS not in body else without_ours(body)
            await self.app(with_body(scope, sent), replay(sent, receive), send)
            return
        status = 0
        try:
            decision = await self._decide(path, ask)
            status = await self._pass_on(ask, decision, scope, receive, send)
        except ApiError as error:
            status = error.status_code
            raise
        finally:
            if self.front.meter is not None:
                self.front.meter.answered(path, status, ask.label)

    async def _decide(self, path: str, ask: Ask) -> Decision:
        """Ask the router, in a thread; raise ApiError where it cannot say, or says different things."""
        if ask.mixture is not None:
            return Decision(ask.mixture)
        pin = self.front.pin if ask.pin is None else ask.pin
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.front.thread, decide, self.front.router, path, ask.body, pin)
        except MediatorError as error:
            raise from_problem(error.problems[0], 400) from None

    async def _pass_on(self, ask: Ask, decision: Decision, scope: Scope, receive: Receive, send: Send) -> int:
        """Ask the server behind us, and once more where it has lost an adapter that it had; give the status."""
        allowed = {name: value for name in ("authorization",) if (value := header(scope, name.encode())) is not None}
        for is_last in (False, True):
            placed = await self.front.target.place(decision.weights, allowed)
            # For a log around us.
            scope.setdefault("state", {}).update(model=ask.label, mixture=mixture_header(placed.weights))
            body = dump({**ask.body, **placed.fields})
            reply = _Reply(send, _headers(decision, placed), withhold=placed.may_be_gone and not is_last)
            try:
                await self.app(with_body(scope, body), replay(body, receive), reply)
            finally:
                placed.over(reply.status)
            if not reply.is_withheld:
                break
        if self.front.meter is not None:
            self.front.meter.routed(decision, placed)
        return reply.status

    async def _list(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Put the router's names before those of the server behind us."""
        kept = [(name, value) for name, value in scope["headers"] if name.lower() != b"accept-encoding"]
        whole = _Whole()
        await self.app({**scope, "headers": kept}, receive, whole)
        if whole.start is None:
            return
        body = b"".join(whole.parts)
        listed = parse(body) if whole.start["status"] == _OK and len(body) <= _MOST_LISTED else None
        if listed is not None and isinstance(listed.get("data"), list):
            body = json.dumps({**listed, "data": self._named(listed["data"])}).encode()
        headers = [(name, value) for name, value in whole.start["headers"] if name.lower() != b"content-length"]
        await send({**whole.start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _named(self, listed: list[Any]) -> list[Any]:
        dense = self.front.router.dense
        like = next((one for one in listed if isinstance(one, dict) and one.get("id") == dense), None) or {}
        facts = {"object": "model", "created": 0, "owned_by": "mediator", "parent": dense}
        length = {"max_model_len": like["max_model_len"]} if "max_model_len" in like else {}
        return [*({"id": name, **facts, **length} for name in self.front.names), *listed]


def decide(router: OpenRouter, path: str, body: Mapping[str, Any], pin: bool) -> Decision:
    """Decide for the body of a request; raise ApiError where its prompts need different experts."""
    if path == CHAT:
        return router.decide_chat(chat_of(body, pin=pin))
    prompts = prompts_of(body)
    found = [router.decide_text(one) if isinstance(one, str) else router.decide_ids(one) for one in prompts]
    if not found:
        return Decision({})
    if any(one.weights != found[0].weights for one in found):
        message = "these prompts need different experts; send them one by one, or name a model"
        raise ApiError(400, message, param="prompt", code="prompts_differ")
    return found[0]


def _path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


def _headers(decision: Decision, placed: Placed) -> list[tuple[bytes, bytes]]:
    facts = {MIXTURE_HEADER: mixture_header(placed.weights)}
    if decision.uncertainty is not None:
        facts[UNCERTAINTY_HEADER] = f"{decision.uncertainty:.4g}"
    if dict(placed.weights) != dict(decision.weights):
        facts[WANTED_HEADER] = mixture_header(decision.weights)
    if placed.error is not None:
        facts[ERROR_HEADER] = f"{placed.error:.4g}"
    return [(name.encode(), value.encode()) for name, value in facts.items()]


class _Reply:
    """Passes an answer on as it comes, with more headers; an answer 404 may be withheld, to ask again."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], *, withhold: bool) -> None:
        self.send, self.headers, self.withhold = send, headers, withhold
        self.status, self.is_withheld = 0, False

    async def __call__(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            self.status = event["status"]
            self.is_withheld = self.withhold and self.status == _NOT_FOUND
            event = {**event, "headers": [*event.get("headers", ()), *self.headers]}
        if not self.is_withheld:
            await self.send(event)


class _Whole:
    """Keeps an answer instead of sending it."""

    def __init__(self) -> None:
        self.start: Event | None = None
        self.parts: list[bytes] = []

    async def __call__(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            self.start = {**event, "headers": list(event.get("headers", ()))}
        elif event["type"] == "http.response.body":
            self.parts.append(event.get("body", b""))
