"""The config of a model whose layers come from others: their number, and all that it says of single layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_INSIDE = ("text_config", "llm_config", "language_config")
_LISTED = (
    "mlp_only_layers", "moe_layers", "attn_layer_indices", "attn_layer_idxs", "full_attn_idxs",
    "cross_attention_layers",
)  # fmt: skip
"""Lists of the numbers of layers of one kind."""
_LEADING = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "n_dense_layers")
"""Numbers of layers of one kind, which come first."""
_PERIODS = (
    "attn_layer_period", "expert_layer_period", "decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step",
    "no_rope_layer_interval", "global_attn_every_n_layers",
)  # fmt: skip
_PERIODS_OF_TYPES = ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval")
"""Periods that say nothing where `layer_types` names each layer's kind."""
_ALTERNATING = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4}
"""Models whose layers alternate by their number though no field says so, unless `layer_types` names their kinds."""


@dataclass(frozen=True)
class Origin:
    """The layer that a layer of the output is, of the model with this config."""

    config: Mapping[str, Any]
    number: int


@dataclass(frozen=True)
class StackedConfig:
    """A config, and what it cannot say of some layers."""

    config: Mapping[str, Any]
    faults: tuple[str, ...] = ()


def stacked_config(base: Mapping[str, Any], layers: Sequence[Origin]) -> StackedConfig:
    """Give the base's config for these layers: as many, and of each what its own model's config says of it."""
    at = next((name for name in _INSIDE if isinstance(base.get(name), dict) and not _counted(base)), None)
    inner = base if at is None else base[at]
    origins = [Origin(_inner(origin.config), origin.number) for origin in layers]
    changed = {**inner, **_changes(inner, origins)}
    faults = tuple(_faults(inner, changed, origins))
    return StackedConfig(changed if at is None else {**base, at: changed}, faults)


def _counted(config: Mapping[str, Any]) -> bool:
    return any(isinstance(config.get(name), int) for name in _COUNTS)


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = next((config[name] for name in _INSIDE if isinstance(config.get(name), dict)), None)
    return config if found is None or _counted(config) else found


def _n_layers(config: Mapping[str, Any]) -> int:
    return next((config[name] for name in _COUNTS if isinstance(config.get(name), int)), 0)


def _changes(inner: Mapping[str, Any], origins: Sequence[Origin]) -> dict[str, Any]:
    own = _n_layers(inner)
    changes: dict[str, Any] = {name: len(origins) for name in _COUNTS if inner.get(name) == own}
    for name, value in inner.items():
        if name in _LISTED and isinstance(value, list):
            changes[name] = [at for at, origin in enumerate(origins) if origin.number in (_of(origin, name, inner))]
        elif isinstance(value, list | str) and own > 1 and len(value) == own and _is_per_layer(name, value):
            each = [_of(origin, name, inner)[origin.number] for origin in origins]
            changes[name] = "".join(each) if isinstance(value, str) else each
        elif name in _LEADING and isinstance(value, int):
            leads = [origin.number < _of(origin, name, inner) for origin in origins]
            changes[name] = leads.index(False) if False in leads else len(leads)
    return {**changes, **_window_types(inner, origins)}


def _is_per_layer(name: str, value: Any) -> bool:  # noqa: ANN401 - JSON data
    """Whether a list as long as there are layers tells of each layer; of texts only what is called a pattern does."""
    if isinstance(value, str):
        return name.endswith("pattern")
    return not name.endswith(("_ids", "_id", "architectures"))


def _of(origin: Origin, name: str, inner: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON data
    """Read a field where a layer comes from; of a model that lacks it, or has it otherwise, the base's."""
    value = origin.config.get(name)
    fits = isinstance(value, type(inner[name])) and (not isinstance(value, list | str) or name in _LISTED
                                                     or len(value) > origin.number)  # fmt: skip
    if fits:
        return value
    base = inner[name]
    is_short = isinstance(base, list | str) and name not in _LISTED and len(base) <= origin.number
    return [base[-1]] * (origin.number + 1) if is_short else base


def _window_types(inner: Mapping[str, Any], origins: Sequence[Origin]) -> dict[str, Any]:
    """Name the kind of each layer where only the first ones have a wide view, which stacking may put anywhere."""
    if not (inner.get("use_sliding_window") and isinstance(inner.get("max_window_layers"), int)):
        return {}
    if isinstance(inner.get("layer_types"), list):
        return {}
    wide = [origin.number < _of(origin, "max_window_layers", inner) for origin in origins]
    return {"layer_types": ["full_attention" if each else "sliding_attention" for each in wide]}


def _faults(inner: Mapping[str, Any], changed: Mapping[str, Any], origins: Sequence[Origin]) -> Iterator[str]:
    """Say which layers would be taken for others: kinds that come first or alternate, and no list to name them in."""
    for name in _LEADING[1:]:
        if isinstance(inner.get(name), int):
            leads = [origin.number < _of(origin, name, inner) for origin in origins]
            if any(leads[changed[name] :]):
                yield f"layers before {name} come first, and here one stands at {leads.index(True, changed[name])}"
    has_types = isinstance(changed.get("layer_types"), list)
    periods = {name: inner[name] for name in _PERIODS if isinstance(inner.get(name), int)}
    if not has_types:
        hidden = _ALTERNATING.get(str(inner.get("model_type")), 1)
        named = {name: inner[name] for name in _PERIODS_OF_TYPES if isinstance(inner.get(name), int)}
        periods |= named or ({"its architecture": hidden} if hidden > 1 else {})
    for name, period in periods.items():
        if period < 2:
            continue
        moved = next((at for at, origin in enumerate(origins) if at % period != origin.number % period), None)
        if moved is not None:
            yield f"layers alternate by {period} ({name}), and layer {origins[moved].number} would stand at {moved}"
