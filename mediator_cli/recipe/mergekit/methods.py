"""What mergekit's methods take, and the method here that does the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

BaseRole = Literal["origin", "first", "input", "origin_if_any"]
"""origin: deltas are taken from it. first: one of two inputs, and the first here. input: merged like any other, even
where it is not listed. origin_if_any: deltas are taken from it, and where there is none weights are merged."""

_ARITHMETIC = ("density", "int8_mask", "lambda", "normalize", "rescale", "weight")
PER_MODEL = ("weight", "density", "gamma", "epsilon", "scale")
"""What each model may have for itself."""
UNUSED = ("int8_mask",)
"""What changes no result in mergekit: the memory that masks take."""


@dataclass(frozen=True)
class Counterpart:
    """What a method of mergekit takes; `without_effect` is taken and has none. `defaults` are given to ours."""

    takes: tuple[str, ...]
    base: BaseRole = "origin"
    defaults: tuple[tuple[str, Any], ...] = (("preset", "mergekit"),)
    without_effect: tuple[str, ...] = ()


COUNTERPARTS: dict[str, Counterpart] = {
    "linear": Counterpart(("normalize", "weight"), "input", ()),
    "slerp": Counterpart(("t",), "first", ()),
    "nuslerp": Counterpart(("nuslerp_flatten", "nuslerp_row_wise", "weight"), "origin_if_any", ()),
    "multislerp": Counterpart(("eps", "normalize_weights", "weight"), "origin_if_any", ()),
    "karcher": Counterpart(("max_iter", "tol"), "input", (("space", "weight"),)),
    "passthrough": Counterpart(("scale",), "input", ()),
    "nearswap": Counterpart(("t",), defaults=()),
    "arcee_fusion": Counterpart((), defaults=()),
    "model_stock": Counterpart(("filter_wise",)),
    "ram": Counterpart(("epsilon",), defaults=()),
    "ramplus_tl": Counterpart(("alpha", "epsilon", "r"), defaults=()),
    "task_arithmetic": Counterpart(_ARITHMETIC, without_effect=("density", "rescale")),
    "ties": Counterpart(_ARITHMETIC),
    "dare_ties": Counterpart(_ARITHMETIC),
    "dare_linear": Counterpart(_ARITHMETIC),
    "breadcrumbs": Counterpart((*_ARITHMETIC, "gamma")),
    "breadcrumbs_ties": Counterpart((*_ARITHMETIC, "gamma")),
    "della": Counterpart((*_ARITHMETIC, "epsilon")),
    "della_linear": Counterpart((*_ARITHMETIC, "epsilon")),
    "sce": Counterpart(("int8_mask", "select_topk")),
}
KNOWN = tuple(sorted({name for each in COUNTERPARTS.values() for name in each.takes}))
IGNORED = ("residual_weight", "embed_slerp", "override_architecture")
"""What mergekit once read, or what only its own list of architectures needs."""
_SHARED_EPSILON = ("ram", "ramplus_tl")
_ELECTING = ("ties", "dare_ties", "breadcrumbs_ties", "della")
_SWITCHES = ("normalize", "rescale", "normalize_weights", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise")


def per_model(method: str) -> tuple[str, ...]:
    """List what each model may have for itself under a method."""
    takes = COUNTERPARTS[method].takes
    return tuple(n for n in PER_MODEL if n in takes and not (n == "epsilon" and method in _SHARED_EPSILON))


def fault_of(key: str, value: Any) -> str:  # noqa: ANN401 - YAML data
    """Say what is wrong with the value of a switch; empty if nothing is."""
    is_wrong = key in _SWITCHES and not isinstance(value, bool | int | float)
    return f"'{key}' is neither true nor false" if is_wrong else ""


def translated(method: str, key: str, value: Any) -> tuple[str, Any]:  # noqa: ANN401 - YAML data
    """Give name and value of a parameter here."""
    if key == "rescale":
        return "rescale", "l1" if value else "none"
    if key == "normalize":
        return ("merge", "mean" if value else "sum") if method in _ELECTING else ("normalize", bool(value))
    if key == "normalize_weights":
        return "normalize", bool(value)
    if key == "filter_wise":
        return "over", "row" if value else "tensor"
    return key, value


def vectors_of(flatten: bool, columns: bool) -> str:
    """Name what nuslerp takes as one vector: its `row_wise` means columns of what is stored."""
    return "tensor" if flatten else "column" if columns else "row"
