"""Whether a bundle of this plan can be answered with, and which tensors its run time can mix for each input."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from mediator_cli.checkpoint.cache import read_note, write_note
from mediator_cli.errors import BundleError, Problem, RecipeError
from mediator_cli.plan.factors import check_changes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.plan.model import Plan

_NEEDED = "routing answers with a causal language model"
_STATIC = "use assign: {rule: none}"
_MAKERS = ("mediator-merge", "transformers", "torch")


class Mixable(BaseModel):
    """What a model makes of its tensors: by name, why one cannot be mixed, and the parameters that none gives."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kinds: dict[str, str]
    missing: tuple[str, ...]


def check_routing(plan: Plan) -> Plan:
    """Mark the tensors that the run time cannot mix for each row, which are averaged even in routed units, and say so.

    Reads nothing but the base's config. Units that hold nothing else are no candidates any more. A plan that routes
    nothing is given back as it is. Raises RecipeError when transformers builds no causal language model of the base.
    """
    if plan.loaded.recipe.assign.rule == "none":
        return plan
    place, kind = plan.loaded.place("assign", "rule"), plan.base.config.get("model_type")
    try:
        found = find_mixable(plan.base.config, plan.base.tensors)
    except BundleError as error:
        reason = error.problems[0].message
        message = f"{_NEEDED}; {kind} is not one that transformers can build here: it {reason}"
        raise RecipeError(Problem(place, message, _STATIC)) from None
    if found.missing:
        raise RecipeError(Problem(place, f"{_NEEDED}; the base lacks {found.missing[0]}, which it needs", _STATIC))
    kinds = {tensor.name: found.kinds[tensor.name] for tensor in plan.tensors if tensor.name in found.kinds}
    return check_changes(_mark(plan, kinds))


def find_mixable(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Mixable:
    """Ask the model of a config which of a checkpoint's tensors can be mixed, unless that is noted from before.

    Raises BundleError when transformers builds no causal language model of it, which is never noted: a package that is
    missing can be installed.
    """
    key = _key(config, tensors)
    text = read_note("mixable", key)
    try:
        return Mixable.model_validate_json(text or "")
    except ValueError:
        found = _ask_model(config, tensors)
    write_note("mixable", key, found.model_dump_json())
    return found


def _key(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    shapes = [(name, tensor.shape) for name, tensor in tensors.items()]
    facts = [dict(config), shapes, [_version(package) for package in _MAKERS]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _ask_model(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Mixable:
    from mediator_cli.runtime.mixable import empty_model, find_unmixable  # noqa: PLC0415 - takes seconds

    found = find_unmixable(empty_model(config), tensors)
    return Mixable(kinds=found.kinds, missing=found.missing)


def _mark(plan: Plan, kinds: Mapping[str, str]) -> Plan:
    tensors = tuple(replace(tensor, mixable=tensor.name not in kinds) for tensor in plan.tensors)
    able = {tensor.unit for tensor in tensors if tensor.can_be_routed}
    open_units = {*plan.candidates, *plan.listed}
    affected = {t.name: kinds[t.name] for t in tensors if not t.mixable and t.average is not None}
    affected = {t.name: affected[t.name] for t in tensors if t.name in affected and t.unit in open_units}
    return replace(
        plan,
        tensors=tensors,
        candidates=tuple(unit for unit in plan.candidates if unit in able),
        listed=tuple(unit for unit in plan.listed if unit in able),
        notices=(*plan.notices, _notice(affected)) if affected else plan.notices,
    )


def _notice(kinds: Mapping[str, str]) -> str:
    counts = Counter(kinds.values())
    listed = "; ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return (
        f"{len(kinds)} tensors are averaged even where their unit is routed, since the run time cannot mix them for "
        f"each input: {listed}; such as {next(iter(kinds))}"
    )
