"""The bodies of requests: OpenAI's fields, and ours under `mediator`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from mediator_cli.serve.api.errors import ApiError

MOST_STOPS, _LONGEST_STOP, MOST_LOGPROBS, _MOST_BIASES, _MOST_MESSAGES = 16, 256, 20, 1024, 4096
_LIMIT_64 = 1 << 64
_MOST_FAULTS = 20

_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "grammar": (),
    "json_schema": (),
}
"""Fields of other servers that would change an answer, and the values with which they do not."""


def _as_list(value: Any) -> Any:  # noqa: ANN401 - any JSON
    return [value] if isinstance(value, str) else value


def _own_text(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Join the parts of a content; refuse what is not text."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only parts like {type: text, text: …} are read, as the model knows text alone")
        texts.append(part["text"])
    return "".join(texts)


def _token(text: str) -> str:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_LIMIT_64))):
        raise ValueError("a key is not a token id")
    return text


def _prompts(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Bring the four forms of a prompt to a list of texts or of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("give a text, token ids, or a list of either")
    if all(_is_token(item) for item in value):
        return [value]
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and all(_is_token(token) for token in item) for item in value):
        return value
    raise ValueError("give a text, token ids, or a list of either")


def _is_token(item: Any) -> bool:  # noqa: ANN401 - any JSON
    return isinstance(item, int) and not isinstance(item, bool)


Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Seed = Annotated[int, Field(ge=-_LIMIT_64, le=_LIMIT_64)]
Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
Count = Annotated[int, Field(ge=1, le=128)]


class _Body(BaseModel):
    # Fields that nobody knows are ignored, as OpenAI's servers do; those that would change the answer are refused.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)


class Extension(BaseModel):
    """What no other server has: weights of experts by name, and what the router reads of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    mixture: dict[str, float] | None = None
    route: Literal["turn", "conversation"] | None = None


class StreamOptions(_Body):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_own_text)]


class Asked(_Body):
    """What chats and prompts have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS), BeforeValidator(_as_list)] | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Annotated[str, AfterValidator(_token)], Bias], Field(max_length=_MOST_BIASES)] | None = (
        None
    )
    user: str | None = None
    ignore_eos: bool | None = None
    mediator: Extension | None = None


class ChatBody(Asked):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None


class CompletionBody(Asked):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    logprobs: Logprobs | None = None
    echo: bool | None = None
    best_of: Count | None = None


class RouteBody(_Body):
    """The body of `POST /v1/route`: a chat, or a prompt."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)] | None = None
    prompt: str | None = None
    mediator: Extension | None = None


B = TypeVar("B", bound=BaseModel)


def read_body(data: bytes, kind: type[B]) -> B:
    """Read a body; raise ApiError 400 that tells all its faults, each with its field."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    faults = [(name, "is not supported by this server") for name in _HARMLESS if _changes(name, value.get(name))]
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        faults += [(_field(fault["loc"]), _said(fault["msg"])) for fault in error.errors(include_url=False)]
    if faults:
        raise ApiError(400, _listed(faults), param=faults[0][0])
    return body


def _listed(faults: list[tuple[str, str]]) -> str:
    rest = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
    return "; ".join(f"{field}: {what}" for field, what in faults[:_MOST_FAULTS]) + rest


def _changes(name: str, value: Any) -> bool:  # noqa: ANN401 - any JSON
    return value is not None and value not in _HARMLESS[name]


def _field(place: tuple[int | str, ...]) -> str:
    """Write the place of a fault; the names of types that were tried are no part of it."""
    return ".".join(str(part) for part in place if isinstance(part, int) or str(part).replace("_", "").isalnum())


def _said(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
