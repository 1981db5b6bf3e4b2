"""A configuration of mergekit-moe as a recipe of kind moe: the same experts and gates, or a refusal by its line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.errors import RecipeError, did_you_mean
from mediator_cli.recipe.mergekit.dtypes import write_dtype
from mediator_cli.recipe.mergekit.forms import reference_of
from mediator_cli.recipe.mergekit.models import names_of
from mediator_cli.recipe.mergekit.source import Draft

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.errors import Problem
    from mediator_cli.recipe.mergekit.source import FieldPath, Source

_KEYS = (
    "base_model", "experts", "gate_mode", "dtype", "experts_per_token", "architecture", "shared_experts", "name",
)  # fmt: skip
_PROMPTS = ("positive_prompts", "negative_prompts")
_SCALES = ("noise_scale", "residual_scale")
_EXPERT_KEYS = ("source_model", *_PROMPTS, *_SCALES)
_OF_MERGES = ("out_dtype", "tokenizer_source", "tokenizer", "chat_template", "parameters", "random_seed")
"""What configurations of merges have, and mergekit-moe passes over."""
_OWN_FIELDS = ("gate_mode", "base_model", "experts_per_token")
_READING = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
"""Gates that read prompts; the first is the default."""
_DRAWN = ("random", "uniform_random")
_FORMATS = {"mixtral": "mixtral", "deepseek moe": None, "qwen moe": "qwen2_moe", "qwen3 moe": "qwen3_moe"}
"""What mergekit-moe calls its architectures, of which the start of a name is enough, and the format here."""
_READ_BY_DEFAULT = 128
"""Prompts of an expert that gates read where the recipe does not say; mergekit-moe reads all."""


def is_moe(data: Mapping[str, Any]) -> bool:
    """Whether a YAML file is a configuration of mergekit-moe."""
    if "version" in data or "merge_method" in data or "experts" not in data:
        return False
    entries = data["experts"] if isinstance(data["experts"], list) else []
    has_sources = any(isinstance(entry, dict) and "source_model" in entry for entry in entries)
    return has_sources or any(key in data for key in _OWN_FIELDS)


def from_moe(source: Source) -> tuple[dict[str, Any], dict[FieldPath, int], tuple[str, ...]]:
    """Translate a configuration; like `from_mergekit`."""
    problems = [*_check_models(source), *_check_choices(source)]
    if problems:
        raise RecipeError(problems)
    draft = Draft(source, {"version": 1, "kind": "moe"}, {(): 1, ("version",): 1, ("kind",): 1})
    names = _write_models(draft)
    _write_mixture(draft, names)
    _tell(draft)
    if problems := list(write_dtype(draft, "dtype")):
        raise RecipeError(problems)
    return draft.data, draft.lines, tuple(draft.notices)


def _check_models(source: Source) -> Iterator[Problem]:
    base = reference_of(source.data.get("base_model"))
    if base is None:
        yield source.problem(("base_model",), "names no model", "write `base_model: PATH`")
    elif "+" in base:
        message = f"the base is a model with an adapter: '{base}'"
        yield source.problem(("base_model",), message, "merge the adapter before")
    entries = source.data["experts"]
    if not isinstance(entries, list) or not entries:
        yield source.problem(("experts",), "lists no experts", "write `- source_model: PATH`")
        return
    for index, entry in enumerate(entries):
        at: FieldPath = ("experts", index)
        model = reference_of(entry.get("source_model")) if isinstance(entry, dict) else None
        if model is None:
            yield source.problem(at, "names no source_model", "write `- source_model: PATH`")
        else:
            if "+" in model and model.split("+")[0] != base:
                message = f"an adapter on another model than base_model: '{model}'"
                yield source.problem((*at, "source_model"), message, "merge the adapter into its model first")
            yield from _check_expert(source, entry, at)


def _check_expert(source: Source, entry: Mapping[str, Any], at: FieldPath) -> Iterator[Problem]:
    for key, value in entry.items():
        if key not in _EXPERT_KEYS:
            yield source.problem((*at, key), f"unknown key '{key}'", did_you_mean(str(key), _EXPERT_KEYS))
        elif key in _PROMPTS and not _are_texts(value):
            yield source.problem((*at, key), "is no list of texts", f'write `{key}: ["some text", "another"]`')
        elif key in _SCALES and not (value is None or type(value) in (int, float)):
            yield source.problem((*at, key), f"is no number (got {value!r})", f"write `{key}: 0.1`")
    if not entry.get("positive_prompts") and _mode(source) in _READING:
        message = f"has no positive_prompts, of which gate_mode '{_mode(source)}' makes gates"
        yield source.problem(at, message, f"add some, or write `gate_mode: {_DRAWN[0]}`")


def _are_texts(value: Any) -> bool:  # noqa: ANN401 - YAML data
    return value is None or (isinstance(value, list) and all(isinstance(text, str) and text for text in value))


def _mode(source: Source) -> str:
    return str(source.data.get("gate_mode", _READING[0]))


def _check_choices(source: Source) -> Iterator[Problem]:
    if _mode(source) not in (*_READING, *_DRAWN):
        hint = did_you_mean(_mode(source), (*_READING, *_DRAWN))
        yield source.problem(("gate_mode",), f"mergekit-moe has no gate_mode '{_mode(source)}'", hint)
    chosen = _architectures(source)
    able = [name for name, made in _FORMATS.items() if made]
    if not chosen:
        given = source.data["architecture"]
        hint = did_you_mean(str(given), able)
        yield source.problem(("architecture",), f"mergekit-moe has no architecture '{given}'", hint)
    elif not any(_FORMATS[name] for name in chosen):
        message = "a DeepSeek-MoE of these models needs code from the Hub, which is not run here"
        yield source.problem(("architecture",), message, f"one of {', '.join(able)}")
    if source.data.get("shared_experts"):
        message = "experts that answer every token beside the chosen ones have no counterpart here"
        hint = "list them among `experts` and raise `experts_per_token`; or write a recipe of kind moe with "
        hint += "`format: granitemoeshared`, where a merged block answers every token"
        yield source.problem(("shared_experts",), message, hint)
    for key in source.data:
        if key not in (*_KEYS, *_OF_MERGES):
            yield source.problem((key,), f"unknown key '{key}'", did_you_mean(str(key), _KEYS))


def _architectures(source: Source) -> list[str]:
    """List the architectures that the configuration allows: those whose names begin with what it gives."""
    wanted = str(source.data.get("architecture") or "").lower()
    return [name for name in _FORMATS if name.startswith(wanted)]


def _write_models(draft: Draft) -> list[str]:
    """Write base and experts; give the experts' names, in their order."""
    data = draft.source.data
    # `base+adapter` is the adapter: here its base is that of the recipe.
    paths = [(reference_of(entry["source_model"]) or "").split("+", 1)[-1] for entry in data["experts"]]
    names = names_of(paths)
    draft.data |= {
        "base": reference_of(data["base_model"]),
        "experts": [{"name": name, "model": path} for name, path in zip(names, paths, strict=True)],
        "assign": {"rule": "all"},
    }
    draft.copy_lines(("base_model",), ("base",))
    for index in range(len(paths)):
        draft.copy_lines(("experts", index), ("experts", index))
        draft.copy_lines(("experts", index, "source_model"), ("experts", index, "model"))
    return names


def _write_mixture(draft: Draft, names: Sequence[str]) -> None:
    source = draft.source
    gates: dict[str, Any] = {"method": _mode(source), "temperature": 1.0, "chat": False}
    moe: dict[str, Any] = {"shared_from": "base", "gates": gates, "experts": {}}
    draft.data["moe"] = moe
    if "gate_mode" in source.data:
        draft.copy_lines(("gate_mode",), ("moe", "gates", "method"))
    if "experts_per_token" in source.data:
        moe["experts_per_token"] = source.data["experts_per_token"]
        draft.copy_lines(("experts_per_token",), ("moe", "experts_per_token"))
    chosen = _architectures(source)
    if source.data.get("architecture"):
        moe["format"] = _FORMATS[chosen[0]] if len(chosen) == 1 else "auto"
        draft.copy_lines(("architecture",), ("moe", "format"))
    for index, name in enumerate(names):
        own = source.data["experts"][index]
        moe["experts"][name] = {key: own[key] for key in _EXPERT_KEYS[1:] if own.get(key) is not None}
        draft.copy_lines(("experts", index), ("moe", "experts", name))
    _write_count(gates, list(moe["experts"].values()))


def _write_count(gates: dict[str, Any], experts: Sequence[Mapping[str, Any]]) -> None:
    most = max(len(own.get(key, ())) for own in experts for key in _PROMPTS)
    if most > _READ_BY_DEFAULT:
        gates["prompts"] = most


def _tell(draft: Draft) -> None:
    """Tell what is passed over, and what is otherwise than a reader of the configuration expects."""
    source, chosen = draft.source, _architectures(draft.source)
    for key in source.data:
        if key in _OF_MERGES:
            draft.notice((key,), f"'{key}' has no effect, as in mergekit-moe")
    if source.data.get("architecture") and len(chosen) > 1:
        message = "the base decides: qwen3_moe for Qwen3, qwen2_moe for Qwen2, mixtral for Llama; "
        draft.notice(("architecture",), f"{message}`qwen moe` is qwen2_moe, which takes Llama too")
    experts = source.data["experts"]
    if len(experts) > 1 and len({reference_of(entry["source_model"]) for entry in experts}) == 1:
        draft.notice(("experts",), "all experts are one model, so the MoE answers as it does until it is trained")
    if _mode(source) == "hidden_avg" and any(_has_several(entry) for entry in experts):
        draft.notice(("gate_mode",), "padding is left out of the mean of a prompt's states; mergekit-moe counts it")


def _has_several(entry: Mapping[str, Any]) -> bool:
    return any(len(entry.get(key) or ()) > 1 for key in _PROMPTS)
