"""The names that a request may give as its model, and who answers then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mediator_cli.errors import BundleError, did_you_mean
from mediator_cli.runtime.mixing import DENSE
from mediator_cli.runtime.wanted import check_experts, read_mixture
from mediator_cli.serve.api.errors import ApiError, from_problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.serve.api.settings import Served

AUTO = "auto"
MIXTURE = "mixture"
_MOST_WEIGHT = 100.0


@dataclass(frozen=True)
class Model:
    """Who answers: `name` as a request gave it, `label` one of few words, `mixture` None = as the bundle decides."""

    name: str
    label: str
    mixture: Mapping[str, float] | None


def find_model(served: Served, name: str | None) -> Model:
    """Find who answers to a name, None = the bundle itself; raise ApiError 404 with a suggestion."""
    if name in (None, AUTO, served.name) and (served.routes or not served.experts):
        label = AUTO if served.routes else DENSE
        return Model(name or label, label, None if served.routes else {})
    if name is None:
        raise ApiError(400, f"is missing; {_known(served)}", param="model")
    if name == DENSE:
        return Model(name, DENSE, {})
    if name in served.experts:
        return Model(name, name, {name: 1.0})
    if "=" in name:
        return Model(name, MIXTURE, _written(served, name))
    why = "the bundle has no router; " if name in (AUTO, served.name) else ""
    hint = _known(served) if why else did_you_mean(name, model_names(served))
    raise ApiError(404, f"no model '{name}'; {why}{hint}", param="model", code="model_not_found")


def given_mixture(served: Served, model: Model, weights: Mapping[str, float]) -> Model:
    """Answer with the weights that a request gives beside its model, which must not name others."""
    if model.name not in (AUTO, served.name, DENSE) and model.label != AUTO:
        message = f"model '{model.name}' says already who answers; give model '{AUTO}' with a mixture"
        raise ApiError(400, message, param="mediator.mixture")
    _check(served, weights, "mediator.mixture", 400)
    return Model(model.name, MIXTURE, dict(weights))


def model_names(served: Served) -> list[str]:
    """List the models by name, the one that a client should take first."""
    return [*([AUTO] if served.routes else []), *served.experts, DENSE]


def model_list(served: Served) -> list[dict[str, Any]]:
    """Describe all models as `GET /v1/models` does."""
    return [_entry(served, name) for name in model_names(served)]


def _entry(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "mediator",
        "root": served.name,
        "parent": None if name in (AUTO, DENSE) else DENSE,
        "max_model_len": served.context,
        "description": _description(served, name),
    }


def _description(served: Served, name: str) -> str:
    if name == DENSE:
        return "the average of what the experts agree on, without any of them"
    if name != AUTO:
        return f"the expert {name} alone"
    how = "the router decides for every request" if served.pins else "gates decide for every token"
    return f"{how} which experts answer"


def _written(served: Served, text: str) -> dict[str, float]:
    try:
        weights = read_mixture(text, "model")
    except BundleError as error:
        raise from_problem(error.problems[0], 404, "model_not_found") from None
    _check(served, weights, "model", 404)
    return weights


def _check(served: Served, weights: Mapping[str, float], place: str, status: int) -> None:
    try:
        check_experts(weights, served.experts, place)
    except BundleError as error:
        raise from_problem(error.problems[0], status, "model_not_found") from None
    if wild := [name for name, weight in weights.items() if abs(weight) > _MOST_WEIGHT]:
        raise ApiError(400, f"the weight of '{wild[0]}' is not between -100 and 100", param=place)


def _known(served: Served) -> str:
    return f"known: {', '.join(model_names(served))}"
