"""The bodies of requests to other servers: who is asked, what the router reads, and the body that goes on. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mediator_cli.errors import BundleError, did_you_mean
from mediator_cli.runtime.wanted import read_mixture
from mediator_cli.serve.api.errors import ApiError, from_problem
from mediator_cli.serve.api.fields import Extension

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.runtime.prompts import Message

CHAT, COMPLETION, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
OURS = "mediator"
"""The field of a body that is meant for the router and no server knows."""
_MOST = 1 << 31


@dataclass(frozen=True)
class Names:
    """What a request may call the router, the experts, and the dense expert."""

    auto: tuple[str, ...]
    experts: tuple[str, ...]
    dense: str = "dense"


@dataclass(frozen=True)
class Ask:
    """A request for us: its body without our field, the weights that it gives itself, and whether to pin its turn.

    `label` is its model in few words, for counts.
    """

    body: Mapping[str, Any]
    mixture: Mapping[str, float] | None
    pin: bool | None
    label: str


def parse(raw: bytes) -> dict[str, Any] | None:
    """Read a JSON object; None for whatever else it is, which the server behind us will refuse."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def read_ask(body: Mapping[str, Any], names: Names) -> Ask | None:
    """Find out whether the router is meant; None = the server is to see the body as it is, but for our field.

    Raises ApiError for experts that there are not, and for a field `mediator` that is not in order.
    """
    extension = _extension(body)
    model = body.get("model")
    plain = {name: value for name, value in body.items() if name != OURS}
    pin = None if extension is None or extension.route is None else extension.route == "conversation"
    given = None if extension is None else extension.mixture
    if model in names.auto:
        if given is None:
            return Ask(plain, None, pin, names.auto[0])
        return Ask(plain, _known(given, names, "mediator.mixture", 400), pin, "mixture")
    if given is not None:
        message = f"goes with model '{names.auto[0]}' alone: model '{model}' says already who answers"
        raise ApiError(400, message, param="mediator.mixture")
    if model == names.dense:
        return Ask(plain, {}, pin, "dense")
    if model in names.experts:
        return Ask(plain, {str(model): 1.0}, pin, str(model))
    if isinstance(model, str) and "=" in model:
        return Ask(plain, _written(model, names), pin, "mixture")
    return None


def _extension(body: Mapping[str, Any]) -> Extension | None:
    if body.get(OURS) is None:
        return None
    try:
        return Extension.model_validate(body[OURS])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in (OURS, *first["loc"]))
        raise ApiError(400, first["msg"].lower(), param=place) from None


def _written(model: str, names: Names) -> dict[str, float]:
    try:
        weights = read_mixture(model, "model")
    except BundleError as error:
        raise from_problem(error.problems[0], 404, "model_not_found") from None
    return _known(weights, names, "model", 404)


def _known(weights: Mapping[str, float], names: Names, place: str, status: int) -> dict[str, float]:
    for name in weights:
        if name not in names.experts:
            message = f"no expert '{name}'; {did_you_mean(name, names.experts)}"
            raise ApiError(status, message, param=place, code="model_not_found")
    return {name: weight for name, weight in weights.items() if weight}


def without_ours(body: Mapping[str, Any]) -> bytes:
    """Write a body without the field that only we know."""
    return dump({name: value for name, value in body.items() if name != OURS})


def dump(body: Mapping[str, Any]) -> bytes:
    """Write a body."""
    return json.dumps(body, separators=(",", ":")).encode()


def chat_of(body: Mapping[str, Any], *, pin: bool) -> list[Message]:
    """Give the turns that the router reads: all, or where a conversation keeps its expert up to the first of a user.

    What is not text is left out: pictures and calls of tools say nothing to the router.
    """
    messages = body.get("messages")
    turns = [_turn(message) for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    first = next((at for at, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    return turns[: first + 1] if pin else turns


def _turn(message: Mapping[str, Any]) -> Message:
    role, content = str(message.get("role")), message.get("content")
    parts: Sequence[Any] = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return {
        "role": "system" if role == "developer" else role,
        "content": _whole("".join(text for text in texts if isinstance(text, str))),
    }


def prompts_of(body: Mapping[str, Any]) -> list[str | list[int]]:
    """Give the prompts of a completion, texts or token ids; none where they are in no form that servers know."""
    prompt = body.get("prompt")
    several = prompt if isinstance(prompt, list) and not _are_tokens(prompt) else [prompt]
    if not all(isinstance(one, str) or _are_tokens(one) for one in several):
        return []
    return [_whole(one) if isinstance(one, str) else one for one in several if one]


def _whole(text: str) -> str:
    """Replace halves of characters, which JSON can write and no tokenizer reads."""
    return text.encode("utf-8", "replace").decode()


def _are_tokens(prompt: Any) -> bool:  # noqa: ANN401 - any JSON
    return isinstance(prompt, list) and bool(prompt) and all(type(one) is int and 0 <= one < _MOST for one in prompt)
