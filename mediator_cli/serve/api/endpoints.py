"""The endpoints."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mediator_cli.errors import did_you_mean
from mediator_cli.serve.api.asking import Asker
from mediator_cli.serve.api.errors import ApiError
from mediator_cli.serve.api.fields import ChatBody, CompletionBody, RouteBody, read_body
from mediator_cli.serve.api.flow import begin
from mediator_cli.serve.api.models import model_list, model_names
from mediator_cli.serve.api.reply import Gone, Reply, gone_reply, headers, mixture_header, told, unless_gone
from mediator_cli.serve.api.shapes import ChatShape, CompletionShape

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from pydantic import BaseModel

    from mediator_cli.serve.api.asking import Question
    from mediator_cli.serve.api.flow import Flow
    from mediator_cli.serve.api.metrics import Metrics
    from mediator_cli.serve.api.settings import Answers, Life, Served, Settings
    from mediator_cli.serve.api.shapes import Shape

    B = TypeVar("B", bound=BaseModel)

_METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"


@dataclass(frozen=True)
class Endpoints:
    """Handlers of one server."""

    engine: Answers
    served: Served
    settings: Settings
    metrics: Metrics
    life: Life
    # One prompt is tokenised at a time, beside the event loop: long ones take a while.
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def chat(self, request: Request) -> Response:
        """Answer `POST /v1/chat/completions`."""
        body, question = await self._asked(request, ChatBody, Asker(self.served, self.settings).chat)
        return await self._replied(request, question, ChatShape(bool(body.logprobs)))

    async def completion(self, request: Request) -> Response:
        """Answer `POST /v1/completions`."""
        body, question = await self._asked(request, CompletionBody, Asker(self.served, self.settings).completion)
        echoes = [self._text(prompt) for prompt in body.prompt for _ in range(question.n)] if body.echo else []
        return await self._replied(request, question, CompletionShape(body.logprobs is not None, echoes))

    async def route(self, request: Request) -> Response:
        """Answer `POST /v1/route`: who would answer."""
        _, question = await self._asked(request, RouteBody, Asker(self.served, self.settings).route)
        flow = begin(self.engine, question.requests)
        try:
            await unless_gone(_exhausted(flow), request.receive)
        except Gone:
            return gone_reply()
        finally:
            flow.cancel()
        (answer,) = flow.answers
        if (started := answer.started) is None:
            raise ApiError(500, "the engine told nothing", code="internal_error")
        request.state.mixture = mixture_header(started.mixture)
        decided = {name: value for name, value in told(started).items() if name != "cached_tokens"}
        return JSONResponse({"object": "route", "model": question.model.name, **decided}, headers=headers(started))

    async def models(self, request: Request) -> Response:
        """Answer `GET /v1/models`."""
        return JSONResponse({"object": "list", "data": model_list(self.served)})

    async def model(self, request: Request) -> Response:
        """Answer `GET /v1/models/NAME`."""
        name = request.path_params["name"]
        for entry in model_list(self.served):
            if entry["id"] == name:
                return JSONResponse(entry)
        hint = did_you_mean(name, model_names(self.served))
        raise ApiError(404, f"no model '{name}'; {hint}", param="model", code="model_not_found")

    async def health(self, request: Request) -> Response:
        """Answer `GET /health`: 503 where another server should be asked."""
        state = "draining" if self.life.is_draining else "ok" if self.engine.facts.is_alive else "dead"
        needs_key = self.settings.api_key is not None
        return JSONResponse({"status": state, "needs_key": needs_key}, 200 if state == "ok" else 503)

    async def counts(self, request: Request) -> Response:
        """Answer `GET /metrics`."""
        return Response(self.metrics.text(), headers={"content-type": _METRICS_TYPE})

    async def _asked(self, request: Request, kind: type[B], ask: Callable[[B], Question]) -> tuple[B, Question]:
        body = read_body(await request.body(), kind)
        async with self.reading:
            question = await asyncio.to_thread(ask, body)
        request.state.model = question.model.label
        request.state.model_name = question.model.name
        return body, question

    async def _replied(self, request: Request, question: Question, shape: Shape) -> Response:
        flow = begin(self.engine, question.requests)
        state = request.state

        def over(flow: Flow) -> None:
            for answer in flow.answers:
                self.metrics.count_answer(answer, state.started_at)
            if (started := flow.answers[0].started) is not None:
                state.mixture = mixture_header(started.mixture)

        reply = Reply(question, shape, flow, state.request_id, over)
        try:
            return await (reply.stream if question.streams else reply.whole)(request.receive)
        except Gone:
            return gone_reply()

    def _text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return str(self.served.tokenizer.decode(prompt, clean_up_tokenization_spaces=False))


async def _exhausted(flow: Flow) -> None:
    async for _ in flow.events():
        pass


def schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a body in the server's own description, `GET /openapi.json`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
