"""From the body of a request to what the engine is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mediator_cli.errors import first_line
from mediator_cli.runtime.prompts import chat_ids
from mediator_cli.serve.api.errors import ApiError
from mediator_cli.serve.api.models import find_model, given_mixture
from mediator_cli.serve.engine.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.serve.api.fields import Asked, ChatBody, CompletionBody, Message, RouteBody
    from mediator_cli.serve.api.models import Model
    from mediator_cli.serve.api.settings import Served, Settings
    from mediator_cli.serve.engine.request import Draw

_COMPLETION_TOKENS = 16
"""OpenAI's own default of the older endpoint."""


@dataclass(frozen=True)
class Question:
    """What one HTTP request asks of the engine: `n` requests for each prompt, one prompt after the other."""

    model: Model
    requests: tuple[Request, ...]
    n: int
    streams: bool
    tells_usage: bool


@dataclass(frozen=True)
class Asker:
    """Makes requests for the engine of bodies; raises ApiError for what is not taken."""

    served: Served
    settings: Settings

    def chat(self, body: ChatBody) -> Question:
        """Read a chat: its template makes a prompt of it."""
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "needs logprobs: true", param="top_logprobs")
        prompt = self._template(body.messages)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        base = Request(
            prompt,
            self._n_tokens(most, len(prompt), None),
            route_on=self._pinned(body, body.messages),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return self._question(body, [base])

    def completion(self, body: CompletionBody) -> Question:
        """Read one or several prompts as they are."""
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, "must be the same as n: answers are not ranked", param="best_of")
        if body.mediator is not None and body.mediator.route == "conversation":
            raise ApiError(400, "a prompt has no turns; ask /v1/chat/completions", param="mediator.route")
        if len(body.prompt) * (body.n or 1) > self.settings.max_rows:
            raise ApiError(400, f"prompts times n are more than {self.settings.max_rows}", param="prompt")
        prompts = [self._ids(prompt) for prompt in body.prompt]
        echo = bool(body.echo)
        bases = [
            Request(
                ids, self._n_tokens(body.max_tokens, len(ids), _COMPLETION_TOKENS, echo=echo), logprobs=body.logprobs,
                echo=echo,
            )
            for ids in prompts
        ]  # fmt: skip
        return self._question(body, bases)

    def route(self, body: RouteBody) -> Question:
        """Ask who would answer: one token is read, and none is written."""
        if (body.messages is None) == (body.prompt is None):
            raise ApiError(400, "give messages or prompt, and not both", param="messages")
        if body.messages is None:
            read = self._ids(body.prompt or "")
        else:
            read = self._pinned(body, body.messages) or self._template(body.messages)
        model = self._model(body)
        return Question(model, (Request(read[:1], 0, model.mixture, read),), 1, streams=False, tells_usage=False)

    def _question(self, body: Asked, bases: Sequence[Request]) -> Question:
        """Ask for all prompts alike, each as often as wanted."""
        model, n = self._model(body), body.n or 1
        draw = self._draw(body)
        common = [
            replace(
                base, mixture=model.mixture, stop=tuple(body.stop or ()), ignore_eos=_ignores_end(body, base), draw=draw
            )
            for base in bases
        ]
        requests = tuple(replace(one, draw=_nth(draw, at)) for one in common for at in range(n))
        options = body.stream_options
        return Question(model, requests, n, bool(body.stream), bool(options and options.include_usage))

    def _model(self, body: Asked | RouteBody) -> Model:
        model = find_model(self.served, body.model)
        weights = None if body.mediator is None else body.mediator.mixture
        return model if weights is None else given_mixture(self.served, model, weights)

    def _draw(self, body: Asked) -> Draw:
        """Draw as the request says, and where it does not, as the model's authors do."""
        given = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": None if body.top_k is None else max(body.top_k, 0),
            "seed": body.seed,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "bias": self._bias(body.logit_bias or {}),
        }
        return replace(self.served.draw, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        bias = {int(token): value for token, value in given.items()}
        if wrong := [token for token in bias if token >= self.served.n_ids]:
            raise ApiError(400, f"{wrong[0]} is not one of the model's {self.served.n_ids} tokens", param="logit_bias")
        return bias

    def _template(self, messages: Sequence[Message]) -> tuple[int, ...]:
        chat = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in messages
        ]
        try:
            return tuple(chat_ids(self.served.tokenizer, chat))
        except Exception as error:  # noqa: BLE001 - a template is a program of the model's authors
            message = f"the model's chat template does not take these messages: {first_line(error)}"
            raise ApiError(400, message, param="messages") from None

    def _pinned(self, body: Asked | RouteBody, messages: Sequence[Message]) -> tuple[int, ...] | None:
        """Give what the router reads where a conversation keeps its mixture: all up to the first user turn."""
        asked = None if body.mediator is None else body.mediator.route
        if asked == "conversation" and not self.served.pins:
            raise ApiError(400, "there is no router that decides once for a conversation", param="mediator.route")
        if not self.served.pins or not (asked == "conversation" or (asked is None and self.settings.pin)):
            return None
        first = next((at for at, message in enumerate(messages) if message.role == "user"), len(messages) - 1)
        return self._template(messages[: first + 1])

    def _ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if not prompt:
            raise ApiError(400, "is empty; give some text", param="prompt")
        return tuple(self.served.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)

    def _n_tokens(self, asked: int | None, n_prompt: int, usual: int | None, *, echo: bool = False) -> int:
        """Choose the longest answer: as asked, or as usual, or as much as fits."""
        most, context = self.settings.max_tokens, self.served.context
        if asked is not None:
            if asked > most:
                raise ApiError(400, f"{asked} is more than the {most} that this server writes", param="max_tokens")
            if asked == 0 and not echo:
                raise ApiError(400, "may be 0 only with echo, where the prompt is the answer", param="max_tokens")
            return asked
        room = most if context is None else min(most, context - n_prompt)
        if room < 1:
            message = f"{n_prompt} tokens leave no room for an answer in the {context} that the model reads"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        return room if usual is None else min(usual, room)


def _ignores_end(body: Asked, base: Request) -> bool:
    """Write an end like any token where a prompt is scored: lm-eval takes the last scored token for the answer's."""
    scores = base.echo and base.logprobs is not None and base.max_tokens == 1
    return bool(body.ignore_eos) or scores


def _nth(draw: Draw, at: int) -> Draw:
    """Draw the answers to one prompt with seeds of their own."""
    return draw if draw.seed is None or at == 0 else replace(draw, seed=draw.seed + at)
