"""What a strategy is: a function that fits something on a bench, and what it then answers with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from mediator_cli.runtime.combine import Combine
from mediator_cli.runtime.gates import Gates
from mediator_cli.runtime.router import Router

if TYPE_CHECKING:
    from mediator_cli.strategies.library import Change

Group = Literal["reference", "ensemble", "merge", "route"]
Weights = Mapping[str, float]


@dataclass(frozen=True)
class Fixed:
    """One mixture for every input; none is the dense model alone."""

    weights: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class ByTask:
    """A mixture that is known for each task, as no user's prompt tells it: for references alone."""

    weights: Mapping[str, Weights]


Decision = Fixed | ByTask | Router | Gates
"""Who decides on a mixture: nobody, the name of the task, a router that reads the prompt, or gates inside the model."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a fitted strategy answers with, and all that a bundle of it would hold.

    `experts` are those that are mixed, by name; `folded` is added to the dense model once and for all. `decision` says
    who chooses the mixture, `combine` how several experts answer. `facts` is what was learned, for people and JSON.
    """

    experts: Mapping[str, Change] = field(default_factory=dict)
    folded: tuple[Change, ...] = ()
    decision: Decision = field(default_factory=Fixed)
    combine: Combine = "parameters"
    facts: Mapping[str, Any] = field(default_factory=dict)


Fit = Callable[..., Fitted]


@dataclass(frozen=True)
class Strategy:
    """A strategy by name, how it is fitted, and its parameters with their bounds.

    `needs` is what the recipe has to give: rows to fit on, and tasks that each expert was trained on.
    """

    name: str
    group: Group
    fit: Fit
    summary: str
    reference: str
    schema: type[BaseModel]
    needs: frozenset[Literal["rows", "tasks"]]


def strategy(
    *, group: Group, reference: str, needs: tuple[Literal["rows", "tasks"], ...] = ()
) -> Callable[[Fit], Strategy]:
    """Turn `fit(bench, *, parameters) -> Fitted` into a strategy named like the function.

    Parameters are keyword-only, annotated with bounds, and have defaults.
    """

    def register(fit: Fit) -> Strategy:
        summary = (inspect.getdoc(fit) or "").split("\n", 1)[0]
        return Strategy(fit.__name__, group, fit, summary, reference, _schema(fit), frozenset(needs))

    return register


def _schema(fit: Fit) -> type[BaseModel]:
    given = {n: p for n, p in inspect.signature(fit).parameters.items() if p.kind is p.KEYWORD_ONLY}
    # Of all annotations only these are needed, and only these have to be imported at run time.
    own = type(fit.__name__, (), {"__annotations__": {name: p.annotation for name, p in given.items()}})
    hints = get_type_hints(own, globalns=fit.__globals__, include_extras=True)
    fields: dict[str, Any] = {name: (hints[name], parameter.default) for name, parameter in given.items()}
    return create_model(fit.__name__, __config__=ConfigDict(extra="forbid"), **fields)
