"""A mergekit configuration as a recipe: the same merge, or a refusal that names what has no counterpart here.

What differs in spite of the same recipe: random draws, and which of equally large entries are kept. A relative path
starts at the file's folder, as in every recipe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mediator_cli.errors import Problem, RecipeError, did_you_mean
from mediator_cli.recipe.names import unique_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    FieldPath = tuple[str | int, ...]

_DELTA = ("int8_mask", "lambda", "normalize", "weight")
_TAKES: dict[str, tuple[str, ...]] = {
    "linear": ("normalize", "weight"),
    "slerp": ("t",),
    "task_arithmetic": _DELTA,
    "ties": ("density", *_DELTA),
    "dare_ties": ("density", "rescale", *_DELTA),
    "dare_linear": ("density", "rescale", *_DELTA),
    "breadcrumbs": ("density", "gamma", *_DELTA),
    "breadcrumbs_ties": ("density", "gamma", *_DELTA),
    "della": ("density", "epsilon", "rescale", *_DELTA),
    "della_linear": ("density", "epsilon", "rescale", *_DELTA),
    "sce": ("select_topk", "int8_mask"),
}
_SHARED = ("density", "gamma", "epsilon")
"""What mergekit lets each model have for itself, and all experts of a method share here."""
_PER_MODEL = ("weight", *_SHARED)
_ELECTING = ("ties", "dare_ties", "breadcrumbs_ties", "della")
_SWITCHES = ("normalize", "rescale")
_KEYS = (
    "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer"
)  # fmt: skip
_UNSUPPORTED = {
    "slices": "layers cannot be taken from several models or repeated; list the models under `models`",
    "modules": "parts of a model cannot have methods of their own; use a recipe with `overrides`",
    "chat_template": "the chat template goes with the tokenizer; choose it by `tokenizer_source`",
}


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether a YAML file is a mergekit configuration."""
    return "merge_method" in data and "version" not in data


def from_mergekit(
    data: Mapping[str, Any], lines: Mapping[FieldPath, int], place: Callable[..., str]
) -> tuple[dict[str, Any], dict[FieldPath, int]]:
    """Translate a configuration; the lines of the recipe's fields are those of the fields that they came from.

    `place` says where a field of the configuration stands. Raises RecipeError with all that has no counterpart.
    """
    source = _Source(data, lines, place)
    problems = [*_check_keys(source), *_check_models(source)]
    if problems:
        raise RecipeError(problems)
    draft = _Draft({"version": 1, "base": _base_of(data), "assign": {"rule": "none"}}, {(): 1, ("version",): 1})
    source.copy_lines(("base_model",) if data.get("base_model") else ("models", 0, "model"), ("base",), draft.lines)
    experts = _experts(source, draft)
    problems = [
        *_weights(source, draft, experts),
        *_parameters(source, draft, experts),
        *_others(source, draft, experts),
    ]
    if problems:
        raise RecipeError(problems)
    return draft.data, draft.lines


@dataclass(frozen=True)
class _Source:
    """The configuration and where its fields stand."""

    data: Mapping[str, Any]
    lines: Mapping[FieldPath, int]
    place: Callable[..., str]

    @property
    def method(self) -> str:
        return str(self.data["merge_method"])

    def copy_lines(self, old: FieldPath, new: FieldPath, into: dict[FieldPath, int]) -> None:
        found = {new + at[len(old) :]: line for at, line in self.lines.items() if at[: len(old)] == old}
        # Fields around it that the configuration lacks stand where this one does.
        line = found.get(new, 1)
        into.update({new[:n]: line for n in range(1, len(new)) if new[:n] not in into})
        into.update(found)


@dataclass
class _Draft:
    """The recipe as far as it is translated."""

    data: dict[str, Any]
    lines: dict[FieldPath, int] = field(default_factory=dict)

    def override(self, source: _Source, setting: _Setting, fields: dict[str, Any], inner: FieldPath) -> None:
        """Add an override for the names that a filter finds; `inner` is where its value stands in it."""
        overrides = self.data.setdefault("overrides", [])
        at: FieldPath = ("overrides", len(overrides))
        overrides.append({"match": _glob_of(setting.filter or ""), **fields})
        source.copy_lines((*setting.at, "filter"), (*at, "match"), self.lines)
        source.copy_lines(setting.value_at, (*at, *inner), self.lines)


@dataclass(frozen=True)
class _Setting:
    """One value of a parameter, for tensors whose name holds `filter`, None for all; `at` is where it stands."""

    filter: str | None
    value: Any
    at: FieldPath
    value_at: FieldPath


def _check_keys(source: _Source) -> Iterator[Problem]:
    if source.method not in _TAKES:
        message = f"mergekit's method '{source.method}' has no counterpart here"
        yield Problem(source.place("merge_method"), message, f"those that have one: {', '.join(_TAKES)}")
    for key in source.data:
        if key in _UNSUPPORTED:
            yield Problem(source.place(key), f"mergekit's `{key}` has no counterpart here", _UNSUPPORTED[key])
        elif key not in _KEYS:
            yield Problem(source.place(key), f"unknown key '{key}'", did_you_mean(key, _KEYS))
    if not isinstance(source.data.get("parameters") or {}, dict):
        yield Problem(source.place("parameters"), "is no mapping", "write `parameters: {NAME: VALUE}`")


def _check_models(source: _Source) -> Iterator[Problem]:
    models, base = source.data.get("models"), source.data.get("base_model")
    if "slices" in source.data or "modules" in source.data:
        return
    if not isinstance(models, list) or not models:
        yield Problem(source.place("models"), "lists no models", "write `models: [{model: …, parameters: …}]`")
        return
    for index, entry in enumerate(models):
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            yield Problem(source.place("models", index), "names no model", "write `- model: PATH`")
            continue
        yield from _check_model(source, index, entry)
    if base is None and source.method != "linear":
        yield Problem(source.place("merge_method"), f"{source.method} needs base_model", "name the common base")
    named = [entry.get("model") for entry in models if isinstance(entry, dict)]
    if source.method == "slerp" and (len(named) != 2 or base not in named):
        message = "slerp is between two models, one of them base_model"
        yield Problem(source.place("models"), message, "t = 0 gives base_model, t = 1 the other")
    elif source.method != "linear" and all(name == base for name in named):
        yield Problem(source.place("models"), "there is no model beside the base", "add a fine-tune")


def _check_model(source: _Source, index: int, entry: dict[str, Any]) -> Iterator[Problem]:
    name, base = entry["model"], source.data.get("base_model")
    if "+" in name and name.split("+")[0] != base:
        message = f"an adapter on another model than base_model: '{name}'"
        yield Problem(source.place("models", index, "model"), message, "merge the adapter into its model first")
    if not isinstance(entry.get("parameters") or {}, dict):
        place = source.place("models", index, "parameters")
        yield Problem(place, "is no mapping", "write `parameters: {weight: 1.0}`")
    for key in entry:
        if key not in ("model", "parameters"):
            place = source.place("models", index, key)
            yield Problem(place, f"unknown key '{key}'", did_you_mean(key, ("model", "parameters")))


def _base_of(data: Mapping[str, Any]) -> str:
    base: str = data.get("base_model") or data["models"][0]["model"]
    return base


def _experts(source: _Source, draft: _Draft) -> list[tuple[int, str]]:
    """Make the experts; give the index of each in `models`, and its name."""
    base, models = source.data.get("base_model"), source.data["models"]
    chosen = [
        index for index, entry in enumerate(models) if source.method in ("linear", "slerp") or entry["model"] != base
    ]
    if source.method == "slerp":
        chosen.sort(key=lambda index: models[index]["model"] != base)
    # `base+adapter` is the adapter: here its base is that of the recipe.
    paths = [models[index]["model"].split("+", 1)[-1] for index in chosen]
    names = _names(paths)
    draft.data["experts"] = [{"name": name, "model": path} for name, path in zip(names, paths, strict=True)]
    for at, index in enumerate(chosen):
        source.copy_lines(("models", index), ("experts", at), draft.lines)
    return list(zip(chosen, names, strict=True))


def _names(paths: Sequence[str]) -> list[str]:
    """Name experts after the last part of their paths.

    >>> _names(["org/My.Model@v1", "./a", "b/a"])
    ['My-Model', 'a', 'a-2']
    """
    last = (path.rstrip("/").rsplit("/", 1)[-1].split("@")[0] for path in paths)
    return unique_names([re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:56] or "expert" for name in last])


def _settings(value: Any, at: FieldPath) -> list[_Setting]:  # noqa: ANN401 - YAML data
    """List a parameter's values; the first whose filter fits a name holds."""
    if isinstance(value, dict):
        return [_condition(value, at)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [_condition(item, (*at, index)) for index, item in enumerate(value)]
    return [_Setting(None, value, at, at)]


def _condition(item: Any, at: FieldPath) -> _Setting:  # noqa: ANN401 - YAML data
    if not isinstance(item, dict):
        return _Setting(None, item, at, at)
    wanted = item.get("filter")
    return _Setting(None if wanted in (None, "*") else str(wanted), item.get("value"), at, (*at, "value"))


def _up_to_default(settings: list[_Setting]) -> list[_Setting]:
    """Leave out what stands behind the first value for all names."""
    first = next((at for at, setting in enumerate(settings) if setting.filter is None), len(settings))
    return settings[: first + 1]


def _glob_of(text: str) -> str:
    """Write a glob for names that hold a text.

    >>> _glob_of("self_attn"), _glob_of("a[0]")
    ('*self_attn*', '*a[[]0]*')
    """
    return "*" + re.sub(r"([\[*?])", r"[\1]", text) + "*"


def _of_model(source: _Source, index: int, name: str) -> list[_Setting]:
    """Give a parameter of one model: its own values, then those for all models."""
    own = source.data["models"][index].get("parameters") or {}
    common = source.data.get("parameters") or {}
    found = _settings(own[name], ("models", index, "parameters", name)) if name in own else []
    found += _settings(common[name], ("parameters", name)) if name in common else []
    return _up_to_default(found)


def _weights(source: _Source, draft: _Draft, experts: list[tuple[int, str]]) -> Iterator[Problem]:
    for at, (index, name) in enumerate(experts):
        given = source.data["models"][index].get("parameters") or {}
        for key in given:
            if key not in _PER_MODEL or key not in _TAKES[source.method]:
                known = [item for item in _TAKES[source.method] if item in _PER_MODEL]
                hint = did_you_mean(key, known) if known else f"{source.method} takes none"
                place = source.place("models", index, "parameters", key)
                yield Problem(place, f"{source.method} takes no '{key}' of a model", hint)
        for setting in reversed(_of_model(source, index, "weight") if "weight" in _TAKES[source.method] else []):
            if setting.filter is None:
                draft.data["experts"][at]["weight"] = setting.value
                source.copy_lines(setting.value_at, ("experts", at, "weight"), draft.lines)
            else:
                draft.override(source, setting, {"weights": {name: setting.value}}, ("weights", name))


def _parameters(source: _Source, draft: _Draft, experts: list[tuple[int, str]]) -> Iterator[Problem]:
    takes, given = _TAKES[source.method], source.data.get("parameters") or {}
    draft.data["average"] = {"method": source.method}
    source.copy_lines(("merge_method",), ("average", "method"), draft.lines)
    if source.method not in ("linear", "slerp"):
        draft.data["average"]["preset"] = "mergekit"
    for key in given:
        if key not in takes:
            yield Problem(
                source.place("parameters", key), f"{source.method} takes no '{key}'", did_you_mean(key, takes)
            )
    for key in [key for key in takes if key in given and key not in (*_PER_MODEL, "int8_mask")]:
        yield from _parameter(source, draft, key, _up_to_default(_settings(given[key], ("parameters", key))))
    for key in [key for key in takes if key in _SHARED]:
        yield from _shared(source, draft, key, [_of_model(source, index, key) for index, _ in experts])


def _shared(source: _Source, draft: _Draft, key: str, of_models: list[list[_Setting]]) -> Iterator[Problem]:
    """Translate what each model may have for itself, and refuse it where models differ."""
    first = of_models[0]
    for other in of_models[1:]:
        if [(s.filter, s.value) for s in other] != [(s.filter, s.value) for s in first]:
            message = f"models have different values of '{key}'; here all experts of a method share one"
            hint = f"give all models the same {key}, or set it once under `parameters`"
            yield Problem(source.place(*(other or first)[0].at), message, hint)
            return
    yield from _parameter(source, draft, key, first)


def _parameter(source: _Source, draft: _Draft, key: str, settings: list[_Setting]) -> Iterator[Problem]:
    """Translate a parameter of the method: for all tensors, and by overrides where it has filters."""
    for setting in reversed(settings):
        if key in _SWITCHES and not isinstance(setting.value, bool | int | float):
            yield Problem(source.place(*setting.value_at), f"'{key}' is neither true nor false", "write true or false")
            continue
        name, value = _translated(source.method, key, setting.value)
        if setting.filter is None:
            draft.data["average"][name] = value
            source.copy_lines(setting.value_at, ("average", name), draft.lines)
        else:
            draft.override(source, setting, {"average": {name: value}}, ("average", name))


def _translated(method: str, key: str, value: Any) -> tuple[str, Any]:  # noqa: ANN401 - YAML data
    if key == "rescale":
        return "rescale", "l1" if value else "none"
    if key == "normalize":
        return ("merge", "mean" if value else "sum") if method in _ELECTING else ("normalize", bool(value))
    return key, value


def _others(source: _Source, draft: _Draft, experts: list[tuple[int, str]]) -> Iterator[Problem]:
    """Translate the output's dtype and the tokenizer."""
    dtype = next((key for key in ("out_dtype", "dtype") if source.data.get(key) is not None), None)
    if dtype is not None:
        draft.data["output"] = {"dtype": source.data[dtype]}
        source.copy_lines((dtype,), ("output", "dtype"), draft.lines)
    tokenizer, at = source.data.get("tokenizer_source"), ("tokenizer_source",)
    if isinstance(whole := source.data.get("tokenizer"), dict):
        tokenizer, at = whole.get("source"), ("tokenizer",)
        for key in whole:
            if key != "source":
                message = f"mergekit's `tokenizer.{key}` has no counterpart here"
                yield Problem(source.place("tokenizer", key), message, "leave it out")
    if tokenizer is None:
        return
    models = {source.data["models"][index]["model"]: f"expert:{name}" for index, name in experts}
    known = {"union": "union", "base": "base", **models, str(_base_of(source.data)): "base"}
    wanted = str(tokenizer).removeprefix("model:")
    if wanted not in known:
        yield Problem(source.place(*at), f"'{wanted}' is none of the models", did_you_mean(wanted, known))
        return
    draft.data["tokenizer"] = known[wanted]
    source.copy_lines(at, ("tokenizer",), draft.lines)
