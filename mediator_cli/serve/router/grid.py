"""Mixtures on a grid: the nearest mixture of at most two experts in fixed steps, as an adapter built on demand."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING
from weakref import finalize

import httpx
import numpy as np

from mediator_cli.errors import BundleError, MediatorError, Problem, first_line
from mediator_cli.serve.router.low_rank import Adapter, concatenate, gram, open_adapter
from mediator_cli.serve.router.targets import Placed, TopOne

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_OK, _NOT_FOUND = 200, 404
_log = logging.getLogger(__name__)


def points(n_experts: int, step: float) -> Floats:
    """List the mixtures of at most two of so many experts whose weights are steps and sum to at most 1 [m, experts].

    >>> points(2, 0.5).tolist()
    [[0.0, 0.0], [0.5, 0.0], [1.0, 0.0], [0.0, 0.5], [0.0, 1.0], [0.5, 0.5]]
    """
    n = round(1 / step)
    return np.array(list(_points(n_experts, n))) / n


def _points(n_experts: int, n: int) -> Iterator[list[float]]:
    yield [0.0] * n_experts
    for expert in range(n_experts):
        for count in range(1, n + 1):
            yield [float(count) if at == expert else 0.0 for at in range(n_experts)]
    for one, other in combinations(range(n_experts), 2):
        for count in range(1, n):
            for rest in range(1, n - count + 1):
                yield [float({one: count, other: rest}.get(at, 0)) for at in range(n_experts)]


def nearest(weights: Floats, inner: Floats, step: float) -> tuple[Floats, float]:
    """Round a mixture [experts] to the point of the grid whose Σ(p - q)Δ is shortest, by the deltas' inner products.

    Only experts that take part are considered. Gives the point and ‖Σ(p - q)Δ‖ / ‖ΣpΔ‖.
    """
    members = np.flatnonzero(weights)
    p, products = weights[members], inner[np.ix_(members, members)]
    found = points(len(members), step)
    away = found - p
    squares = np.einsum("mi,ij,mj->m", away, products, away)
    best = int(np.argmin(squares))
    whole = float(p @ products @ p)
    rounded = np.zeros(len(weights))
    rounded[members] = found[best]
    return rounded, float(np.sqrt(max(squares[best], 0.0) / whole)) if whole > 0 else 0.0


@dataclass
class _Slot:
    """A built mixture in the server: whether it is there yet, and how many requests are being answered with it."""

    ready: asyncio.Task[None]
    users: int = 0


@dataclass
class Shelf:
    """Built mixtures that a server has loaded, at most `most` of them, the longest unused unloaded first.

    They are built in `folder`, which belongs to this process alone and ends with it.
    One thing is built, loaded or unloaded at a time, so that the server sees them in the order in which they are meant.
    """

    client: httpx.AsyncClient
    folder: Path
    most: int
    slots: OrderedDict[str, _Slot] = field(default_factory=OrderedDict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def take(self, name: str, parts: Sequence[tuple[Adapter, float]], headers: Mapping[str, str]) -> bool:
        """Have a mixture in the server; False where it cannot be. Every True needs a `give_back`."""
        slot = self.slots.get(name)
        if slot is None:
            if not await self._make_room(headers):
                return False
            # Another request for the same mixture may have come first while there was room to be made.
            slot = self.slots.setdefault(name, _Slot(asyncio.create_task(self._load(name, parts, headers))))
        slot.users += 1
        self.slots.move_to_end(name)
        try:
            await asyncio.shield(slot.ready)
        except BaseException as error:
            slot.users -= 1
            has_failed = slot.ready.done() and (slot.ready.cancelled() or slot.ready.exception() is not None)
            if has_failed and self.slots.get(name) is slot:
                del self.slots[name]
            if not isinstance(error, (MediatorError, httpx.HTTPError)):
                raise
            _log.warning("mixture %s is not loaded, one expert answers instead: %s", name, first_line(error))
            return False
        return True

    def give_back(self, name: str, status: int) -> None:
        """Note that a request is over; a server that no longer knows the name gets the mixture again next time."""
        slot = self.slots.get(name)
        if slot is not None:
            slot.users -= 1
            if status == _NOT_FOUND:
                del self.slots[name]

    async def _make_room(self, headers: Mapping[str, str]) -> bool:
        while len(self.slots) >= self.most:
            idle = next((name for name, slot in self.slots.items() if not slot.users and slot.ready.done()), None)
            if idle is None:
                return False
            del self.slots[idle]
            async with self.turn:
                if idle not in self.slots:
                    await self._tell(UNLOAD, {"lora_name": idle}, headers)
                    await asyncio.to_thread(shutil.rmtree, self.folder / idle, ignore_errors=True)
        return True

    async def _load(self, name: str, parts: Sequence[tuple[Adapter, float]], headers: Mapping[str, str]) -> None:
        async with self.turn:
            await asyncio.to_thread(concatenate, parts, self.folder / name)
            body = {"lora_name": name, "lora_path": str((self.folder / name).resolve())}
            refusal = await self._tell(LOAD, body, headers)
        if refusal and "already" not in refusal:
            hint = "is it started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and --max-lora-rank large enough?"
            raise BundleError(Problem(name, f"the server does not load it: {refusal[:300]}", hint))

    async def _tell(self, path: str, body: Mapping[str, str], headers: Mapping[str, str]) -> str:
        """Ask the server; give what it says against it, nothing where it agrees."""
        try:
            answer = await self.client.post(path, json=dict(body), headers=dict(headers))
        except httpx.HTTPError as error:
            return f"it does not answer: {first_line(error)}"
        return "" if answer.status_code == _OK else (answer.text or f"status {answer.status_code}")


@dataclass
class Grid:
    """A server that loads adapters while it runs: mixtures are rounded to the grid, built, and asked for by name.

    Where that fails, what TopOne chooses answers. `inner` are the inner products of the experts' deltas.
    """

    top_one: TopOne
    adapters: Mapping[str, Adapter]
    inner: Floats
    shelf: Shelf
    step: float = 0.25
    paths: frozenset[str] = frozenset({LOAD, UNLOAD})

    async def place(self, weights: Mapping[str, float], headers: Mapping[str, str]) -> Placed:
        """Ask for the nearest mixture of the grid; an expert alone and the dense one are asked for by their names."""
        if not weights:
            return self.top_one.nearest(weights)
        rounded, error = self._round(weights)
        if not rounded:
            return Placed({"model": self.top_one.dense}, {}, error)
        alone = next((name for name, weight in rounded.items() if weight == 1.0), None)
        if alone is not None:
            return Placed({"model": self.top_one.models[alone]}, rounded, error or None)
        parts = [(self.adapters[name], weight) for name, weight in rounded.items()]
        name = name_of(rounded, parts)
        if await self.shelf.take(name, parts, headers):
            return Placed({"model": name}, rounded, error, partial(self.shelf.give_back, name), may_be_gone=True)
        return self.top_one.nearest(weights)

    def _round(self, weights: Mapping[str, float]) -> tuple[dict[str, float], float]:
        known = list(self.adapters)
        point, error = nearest(np.array([weights.get(name, 0.0) for name in known]), self.inner, self.step)
        return {name: float(weight) for name, weight in zip(known, point, strict=True) if weight}, error


def name_of(weights: Mapping[str, float], parts: Sequence[tuple[Adapter, float]]) -> str:
    """Name a mixture by what is in it: another content never has the same name, so no server's cache mistakes it."""
    said = "".join(f"{adapter.digest} {adapter.scale!r} {weight!r}\n" for adapter, weight in parts)
    readable = "-".join(f"{name}-{weight:g}" for name, weight in weights.items())
    return f"mixture-{readable}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def make_grid(
    top_one: TopOne,
    adapters: Path,
    client: httpx.AsyncClient,
    *,
    built: Path | None = None,
    most: int = 16,
    step: float = 0.25,
) -> Grid:
    """Open the adapters, one folder for each expert's name on the server, and a shelf for what is built of them.

    Raises BundleError when an adapter is missing or not plain, and for a step that does not divide 1.
    """
    if not 0 < step <= 1 or abs(round(1 / step) * step - 1) > 1e-9:
        raise BundleError(Problem("step", f"{step:g} does not divide 1", "take 0.25, 0.5 or 0.1"))
    opened = {expert: open_adapter(adapters / name) for expert, name in top_one.models.items()}
    inner = gram(list(opened.values()))
    shelf = Shelf(client, Path(mkdtemp(prefix="mediator-mixtures-", dir=built)), most)
    finalize(shelf, shutil.rmtree, shelf.folder, ignore_errors=True)
    return Grid(top_one, opened, inner, shelf, step)
