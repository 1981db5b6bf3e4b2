"""Whose tokens and which chat template a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.errors import did_you_mean
from mediator_cli.recipe.mergekit.forms import reference_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mediator_cli.errors import Problem
    from mediator_cli.recipe.mergekit.models import Names
    from mediator_cli.recipe.mergekit.source import Draft, FieldPath

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "force")


def write_tokens(draft: Draft, names: Names) -> Iterator[Problem]:
    """Write the tokenizer's source, its tokens, and the chat template."""
    data = draft.source.data
    if data.get("tokenizer_source") and data.get("tokenizer"):
        yield draft.source.problem(("tokenizer",), "stands beside tokenizer_source", "keep one of them")
        return
    whole = data.get("tokenizer")
    if whole is not None and not isinstance(whole, dict):
        yield draft.source.problem(("tokenizer",), "is no mapping", "write `tokenizer: {source: base}`")
    elif whole is not None:
        yield from _write_whole(draft, names, whole)
    elif data.get("tokenizer_source") is not None:
        yield from _write_source(draft, names, data["tokenizer_source"], ("tokenizer_source",))
    if data.get("chat_template") is not None:
        draft.data["chat_template"] = data["chat_template"]
        draft.copy_lines(("chat_template",), ("chat_template",))


def _write_whole(draft: Draft, names: Names, whole: dict[str, Any]) -> Iterator[Problem]:
    for key in whole:
        if key not in _KEYS:
            yield draft.source.problem(("tokenizer", key), f"unknown key '{key}'", did_you_mean(str(key), _KEYS))
    at: FieldPath = ("tokenizer", "source") if "source" in whole else ("tokenizer",)
    yield from _write_source(draft, names, whole.get("source", "union"), at)
    if whole.get("pad_to_multiple_of"):
        draft.data["pad_tokens_to"] = whole["pad_to_multiple_of"]
        draft.copy_lines(("tokenizer", "pad_to_multiple_of"), ("pad_tokens_to",))
    for text, spec in (whole.get("tokens") or {}).items():
        yield from _write_token(draft, names, str(text), spec)


def _write_source(draft: Draft, names: Names, wanted: Any, at: FieldPath) -> Iterator[Problem]:  # noqa: ANN401 - YAML data
    model = reference_of(wanted) or ""
    if model in ("union", "base"):
        draft.data["tokenizer"] = model
    elif (source := _source_of(names, model)) is not None:
        draft.data["tokenizer"] = "base" if source == "base" else f"expert:{source}"
    else:
        yield _nobody(draft, names, model, at)
        return
    draft.copy_lines(at, ("tokenizer",))


def _source_of(names: Names, model: str) -> str | None:
    """Name a model as the recipe does; a prefix `model:` says that it is one."""
    plain = model.removeprefix("model:")
    return "base" if plain == names.base else names.known.get(plain)


def _nobody(draft: Draft, names: Names, model: str, at: FieldPath) -> Problem:
    hint = did_you_mean(model, [names.base, *names.known])
    return draft.source.problem(at, f"'{model}' is none of the models", hint)


def _write_token(draft: Draft, names: Names, text: str, spec: Any) -> Iterator[Problem]:  # noqa: ANN401 - YAML data
    at: FieldPath = ("tokenizer", "tokens", text)
    if spec is not None and not isinstance(spec, dict):
        yield draft.source.problem(at, "is no mapping", "write `{source: MODEL}`")
        return
    for key in spec or {}:
        if key not in _TOKEN_KEYS:
            yield draft.source.problem((*at, key), f"unknown key '{key}'", did_you_mean(str(key), _TOKEN_KEYS))
    wanted = (spec or {}).get("source")
    token: dict[str, Any] = {"force": bool((spec or {}).get("force", False))}
    kind = wanted.get("kind") if isinstance(wanted, dict) else None
    if kind == "zero":
        token["source"] = "zero"
    elif wanted is not None:
        model = reference_of(wanted["model"] if kind == "model_token" else wanted) or ""
        source = _source_of(names, model)
        if source is None:
            yield _nobody(draft, names, model, (*at, "source"))
            return
        token["source"] = source
        if kind == "model_token":
            token |= {new: wanted[old] for old, new in (("token", "token"), ("token_id", "id")) if old in wanted}
    draft.data.setdefault("tokens", {})[text] = token
    draft.copy_lines((*at, "source"), ("tokens", text, "source"))
    draft.copy_lines(at, ("tokens", text))
