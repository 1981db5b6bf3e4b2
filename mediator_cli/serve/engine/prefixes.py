"""Keys and values of answers that are finished, for prompts that begin alike and are answered by the same mixture."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Weights = tuple[float, ...]
_LEAST = 16
"""Fewer tokens than this are read sooner than looked up and copied."""


@dataclass(frozen=True)
class Kept:
    """The tokens of a row, with their keys and values [heads, tokens, size] of all layers in turn."""

    tokens: tuple[int, ...]
    arrays: tuple[torch.Tensor, ...]

    @property
    def n_bytes(self) -> int:
        """Count the bytes held."""
        return sum(array.nbytes for array in self.arrays)


@dataclass
class Prefixes:
    """What is kept within a budget of bytes; what was used longest ago goes first."""

    budget: int
    entries: OrderedDict[tuple[Weights, tuple[int, ...]], Kept] = field(default_factory=OrderedDict)
    n_bytes: int = 0

    def find(self, weights: Weights, prompt: tuple[int, ...]) -> tuple[Kept, int] | None:
        """Find what shares most tokens with a prompt, and how many; the last token is always read, for its logits."""
        best, n_best = None, _LEAST - 1
        for key, kept in self.entries.items():
            if key[0] != weights:
                continue
            n_same = min(_n_same(kept.tokens, prompt), len(prompt) - 1)
            if n_same > n_best:
                best, n_best = key, n_same
        if best is None:
            return None
        self.entries.move_to_end(best)
        return self.entries[best], n_best

    def wants(self, n_tokens: int) -> bool:
        """Tell whether a row of so many tokens is worth keeping."""
        return n_tokens >= _LEAST and self.budget > 0

    def keep(self, weights: Weights, kept: Kept) -> None:
        """Keep a row; what it begins with is not kept beside it."""
        beginnings = [key for key in self.entries if key[0] == weights and key[1] == kept.tokens[: len(key[1])]]
        for key in beginnings:
            self._drop(key)
        self.entries[weights, kept.tokens] = kept
        self.n_bytes += kept.n_bytes
        while self.n_bytes > self.budget:
            self._drop(next(iter(self.entries)))

    def _drop(self, key: tuple[Weights, tuple[int, ...]]) -> None:
        self.n_bytes -= self.entries.pop(key).n_bytes


def _n_same(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(at for at in range(shorter) if one[at] != other[at])
