"""How a server is asked for a mixture: by the name of an adapter, of a built mixture, or by the adapters' scales."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from mediator_cli.errors import first_line
from mediator_cli.serve.api.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Headers = Mapping[str, str]

SHARE = 0.75
"""Top-1: the weight from which an expert answers for a whole mixture; below it the dense expert does."""


def _nothing(status: int) -> None:
    pass


@dataclass(frozen=True)
class Placed:
    """A mixture in a server's words: `fields` of the body; `weights` are what will answer.

    `error` bounds how far that is from what was wanted, ‖Σ(p - q)Δ‖ / ‖ΣpΔ‖; None where it is the same or not known.
    `over` is told the status of the answer, 0 without one; `may_be_gone` where the server may have lost the model.
    """

    fields: Mapping[str, Any]
    weights: Mapping[str, float]
    error: float | None = None
    over: Callable[[int], None] = _nothing
    may_be_gone: bool = False


class Target(Protocol):
    """A kind of server; `paths` are those that it asks for itself, and that nobody else should."""

    @property
    def paths(self) -> frozenset[str]:
        """Paths of the server."""
        ...

    async def place(self, weights: Mapping[str, float], headers: Headers) -> Placed:
        """Say how to ask for a mixture, empty = the dense expert; `headers` are those that authorise the request."""
        ...


@dataclass(frozen=True)
class TopOne:
    """A server that has one adapter for each expert and answers with one of them, or with none."""

    dense: str
    models: Mapping[str, str]
    share: float = SHARE
    paths: frozenset[str] = frozenset()

    async def place(self, weights: Mapping[str, float], headers: Headers) -> Placed:
        """Choose the expert that has at least `share` of the weight, else the dense expert."""
        return self.nearest(weights)

    def nearest(self, weights: Mapping[str, float]) -> Placed:
        """Do the same without waiting for anything."""
        expert = max(weights, key=lambda name: weights[name], default=None)
        if expert is None or weights[expert] < self.share:
            return Placed({"model": self.dense}, {})
        return Placed({"model": self.models[expert]}, {expert: 1.0})


@dataclass
class Scales:
    """llama.cpp's server, which mixes adapters as we do: exactly, by a scale for each adapter of each request.

    `models` are the file names of the adapters without their ending, by expert.
    """

    client: httpx.AsyncClient
    models: Mapping[str, str]
    ids: dict[str, int] = field(default_factory=dict)
    paths: frozenset[str] = frozenset({"/lora-adapters"})

    async def place(self, weights: Mapping[str, float], headers: Headers) -> Placed:
        """Give every adapter its scale, so that none keeps the one that the server was started with."""
        if not all(expert in self.ids for expert in weights) or not self.ids:
            await self._look(headers)
        if missing := [expert for expert in weights if expert not in self.ids]:
            hint = f"start it with --lora-init-without-apply --lora {self.models[missing[0]]}.gguf"
            raise ApiError(503, f"the server behind us has no adapter for '{missing[0]}'; {hint}", code="no_adapter")
        scales = [{"id": number, "scale": weights.get(expert, 0.0)} for expert, number in self.ids.items()]
        return Placed({"lora": scales}, dict(weights), over=self._over)

    async def _look(self, headers: Headers) -> None:
        try:
            answer = await self.client.get("/lora-adapters", headers=dict(headers))
            listed = json.loads(answer.raise_for_status().content)
            found = {PurePath(one["path"]).stem: int(one["id"]) for one in listed}
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            message = f"the server behind us does not tell its adapters: {first_line(error)}"
            raise ApiError(503, message, code="upstream_down", headers={"retry-after": "1"}) from None
        self.ids = {expert: found[name] for expert, name in self.models.items() if name in found}

    def _over(self, status: int) -> None:
        # After a failure another server may stand there, with adapters in another order.
        if status == 0 or status >= 500:
            self.ids = {}
