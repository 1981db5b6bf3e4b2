"""Which rows of a batch get which mixture, and by which of the two ways it is computed.

A mixture is a tuple of weights, one for each expert; all zeros is the dense expert. A part is a set of rows that are
computed alike: with one matrix (the dense one, or one mixed for them), or with the dense matrix and sparse products.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from mediator_cli.errors import BundleError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

Mixture = tuple[float, ...]
Matrices = dict[str, torch.Tensor]
Wanted = str | Mapping[str, float] | torch.Tensor | NDArray[np.float32] | Sequence[Sequence[float]]
User = tuple[int, torch.Tensor, torch.Tensor]
"""An expert, the tokens [k] that use it, and their weights [k]."""
DENSE = "dense"
PASS_TOKENS = 20
"""What a pass of products costs beside its tokens, in tokens; measured by scripts/bench_runtime.py."""

_MOST_WAITING = 1024
_MANY, _MOST_USED = 32, 0.5
"""Tokens that are worth a computation of their own beside those of other rows: matrices for a mixture, products for an
expert. The latter only where rows use at most this share of the experts.
"""


@dataclass
class Scratch:
    """What modules that run one after the other with one part need again: every operation counts for few tokens."""

    x: torch.Tensor | None = None
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    scales: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    users: dict[int, tuple[User, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Rows computed alike; `rows` None = all of the batch. Of a gated part the gates choose the weights of each token.

    `matrices` are the mixed matrices by name, an empty mapping for the dense expert, None for sparse products, whose
    weights [rows, experts] then say how much of each expert a row gets.
    """

    rows: torch.Tensor | None
    weights: torch.Tensor
    matrices: Mapping[str, torch.Tensor] | None
    is_gated: bool = False
    scratch: Scratch = field(default_factory=Scratch, compare=False)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Lay x [rows, …, columns] out for products: float32 [columns, tokens]; once for layers that share an input."""
        if self.scratch.x is not x:
            self.scratch.x, self.scratch.tokens = x, x.reshape(-1, x.shape[-1]).t().float().contiguous()
        return self.scratch.tokens

    def scales(self, first: int, count: int, n_tokens: int) -> torch.Tensor:
        """Give the weights of a run of experts for each token, [count, 1, tokens]."""
        key = (first, count, n_tokens)
        if key not in self.scratch.scales:
            each = self.weights.repeat_interleave(n_tokens // len(self.weights), dim=0)
            self.scratch.scales[key] = each[:, first : first + count].t()[:, None].contiguous()
        return self.scratch.scales[key]

    def users(self, n_tokens: int) -> tuple[User, ...]:
        """List the experts used, each with the tokens [k] that use it and their weights [k].

        Nothing where products of all of them with all tokens cost less: few tokens, or most of them use most experts.
        """
        if n_tokens < _MANY or self.used_share > _MOST_USED:
            return ()
        if n_tokens not in self.scratch.users:
            each = self.weights.repeat_interleave(n_tokens // len(self.weights), dim=0)
            tokens = {expert: torch.nonzero(each[:, expert]).flatten() for expert in self.used}
            self.scratch.users[n_tokens] = tuple((expert, own, each[own, expert]) for expert, own in tokens.items())
        return self.scratch.users[n_tokens]

    @cached_property
    def used_share(self) -> float:
        """Tell which share of the experts used a row uses on average."""
        return float((self.weights[:, list(self.used)] != 0).float().mean()) if self.used else 1.0

    @cached_property
    def used(self) -> tuple[int, ...]:
        """List the experts that any row uses."""
        return tuple(torch.nonzero(self.weights.any(0)).flatten().tolist())

    @cached_property
    def mixtures(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """List the different mixtures [experts] that are not the dense expert, each with the rows [k] that have it."""
        found, which = torch.unique(self.weights, dim=0, return_inverse=True)
        pairs = ((mixture, torch.nonzero(which == at).flatten()) for at, mixture in enumerate(found))
        return tuple((mixture, rows) for mixture, rows in pairs if bool(mixture.any()))

    @cached_property
    def is_uniform(self) -> bool:
        """Tell whether all rows have one mixture."""
        return bool((self.weights == self.weights[:1]).all())


@dataclass
class MixtureCache:
    """Mixed matrices of recent mixtures within a budget of bytes, and how many tokens waited for the others.

    `entry_bytes` are those of a mixture that changes every matrix; `count` tells what another takes.
    """

    budget: int
    entry_bytes: int
    build: Callable[[Mixture], Matrices]
    entries: OrderedDict[Mixture, Matrices] = field(default_factory=OrderedDict)
    waited: dict[Mixture, int] = field(default_factory=dict)
    count: Callable[[Mixture], int] | None = None

    @property
    def room(self) -> int:
        """Count the mixtures that fit, whatever they change."""
        return self.budget // self.entry_bytes if self.entry_bytes else 0

    def size(self, mixture: Mixture) -> int:
        """Count the bytes that a mixture's matrices take."""
        return self.count(mixture) if self.count is not None else self.entry_bytes

    def fits(self, mixture: Mixture, held: int = 0) -> bool:
        """Tell whether a mixture's matrices fit into the budget beside `held` bytes of others."""
        return self.entry_bytes > 0 and held + self.size(mixture) <= self.budget

    def get(self, mixture: Mixture, n_tokens: int, switch: int) -> Matrices | None:
        """Return the mixture's matrices; build them once `switch` tokens have asked for them, None before.

        Waiting until the products have cost as much as building never costs more than twice the best choice. A pass
        counts as PASS_TOKENS more.
        """
        if mixture in self.entries:
            self.entries.move_to_end(mixture)
            return self.entries[mixture]
        if not self.fits(mixture):
            return None
        # Those asked for last stand last; a mixture of its own for every prompt must not be remembered for ever.
        self.waited[mixture] = self.waited.pop(mixture, 0) + PASS_TOKENS + n_tokens
        if len(self.waited) > _MOST_WAITING:
            del self.waited[next(iter(self.waited))]
        if self.waited[mixture] < switch:
            return None
        del self.waited[mixture]
        while self.entries and not self.fits(mixture, sum(map(self.size, self.entries))):
            self.entries.popitem(last=False)
        self.entries[mixture] = self.build(mixture)
        return self.entries[mixture]


def as_mixture(weights: torch.Tensor) -> Mixture:
    """Turn one row of weights [experts] into a key."""
    return tuple(weights.tolist())


@dataclass(frozen=True)
class Division:
    """A batch in parts; `waits` tells that some rows may get matrices of their own when more tokens have asked."""

    parts: tuple[Part, ...]
    waits: bool


def divide(weights: torch.Tensor, n_tokens: int, cache: MixtureCache, switch: int) -> Division:
    """Divide a batch with weights [rows, experts] and `n_tokens` tokens a row into parts.

    Rows with one mixture share matrices when tokens enough have asked to pay for them. The others, and few tokens of
    several mixtures, share one part of sparse products: one pass over the dense matrix serves all of them.
    """
    groups: dict[Mixture, list[int]] = {}
    for row, mixture in enumerate(map(as_mixture, weights)):
        groups.setdefault(mixture, []).append(row)
    parts: list[Part] = []
    products: list[int] = []
    waits, held = False, 0
    for mixture, rows in groups.items():
        # No more mixtures than fit: parts hold their matrices as long as the batch runs.
        fits = not any(mixture) or cache.fits(mixture, held)
        worth_it = fits and (len(groups) == 1 or len(rows) * n_tokens >= min(switch, _MANY))
        matrices = _matrices(mixture, len(rows) * n_tokens, cache, switch) if worth_it else None
        waits |= worth_it and matrices is None and cache.fits(mixture)
        if matrices is None:
            products += rows
        else:
            held += cache.size(mixture) if any(mixture) else 0
            parts.append(_part(weights, rows, matrices))
    if products:
        parts.append(_part(weights, sorted(products), None))
    return Division(tuple(parts), waits)


def gated_division(n_rows: int, n_experts: int, device: torch.device) -> Division:
    """Make the one part of a batch whose experts are chosen by gates."""
    weights = torch.ones(n_rows, n_experts, device=device)
    return Division((Part(None, weights, None, is_gated=True),), waits=False)


def _matrices(mixture: Mixture, n_tokens: int, cache: MixtureCache, switch: int) -> Mapping[str, torch.Tensor] | None:
    return cache.get(mixture, n_tokens, switch) if any(mixture) else {}


def _part(weights: torch.Tensor, rows: list[int], matrices: Mapping[str, torch.Tensor] | None) -> Part:
    chosen = None if len(rows) == len(weights) else torch.tensor(rows, device=weights.device)
    return Part(chosen, weights if chosen is None else weights[chosen], matrices)


def as_weights(mixture: Wanted, experts: Sequence[str], place: str) -> torch.Tensor:
    """Read a mixture: `dense`, an expert, {expert: weight}, or weights [rows, experts]; float32 [rows, experts].

    Raises BundleError for unknown experts, wrong shapes, and weights that are not finite.
    """
    if isinstance(mixture, str):
        mixture = {} if mixture == DENSE else {mixture: 1.0}
    if isinstance(mixture, Mapping):
        for name in mixture:
            if name not in experts:
                raise BundleError(Problem(place, f"no expert '{name}'", did_you_mean(name, [*experts, DENSE])))
        mixture = [[mixture.get(name, 0.0) for name in experts]]
    weights = torch.as_tensor(mixture, dtype=torch.float32)
    if weights.ndim == 2 and weights.shape[0] and weights.shape[1] == len(experts) and bool(weights.isfinite().all()):
        return weights
    message = f"a mixture of shape {list(weights.shape)}, or with values that are not finite"
    raise BundleError(Problem(place, message, f"give finite weights [rows, {len(experts)}] for {', '.join(experts)}"))


def spread(weights: torch.Tensor, n_rows: int, place: str) -> torch.Tensor:
    """Repeat weights [rows, experts] for a batch of `n_rows`, a whole multiple, as beams and samples lie in it."""
    if n_rows % len(weights):
        message = f"{len(weights)} mixtures for a batch of {n_rows} rows"
        raise BundleError(Problem(place, message, "give one mixture, or one for each row"))
    return weights.repeat_interleave(n_rows // len(weights), dim=0)
