"""Where the tokens of many questions stand in a batch, so that no token is computed twice. No model here.

A bin is one row of a batch. It holds a tree: questions that open alike share the tokens of their opening, and the
choices of one question share its prompt. The attention mask lets each token see its own ancestors alone, so that a
token gets the same logits as in a sequence of its own. Tokens whose logits are needed stand last in the row.
Bins of a single question with an ordinary mask (`is_tree` False) serve models that cannot take such masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Query:
    """Token ids of a prompt and of an answer to it; with `ends`, the end of the turn after it counts too."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    ends: bool = True

    @property
    def fed(self) -> tuple[int, ...]:
        """The tokens that the model reads: all but one that only has to be predicted."""
        return self.prompt + (self.answer if self.ends else self.answer[:-1])

    @property
    def first(self) -> int:
        """Index of the token that predicts the answer's first token."""
        return len(self.prompt) - 1


@dataclass
class Bin:
    """A tree of tokens without the opening of `n_opening` tokens that all bins share.

    `depths` count from the opening's end. `paths` name, for each query by its index, the tokens from root to leaf,
    `reads` those of them that predict its answer, `needed` the ones of all queries.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)
    reads: dict[int, list[int]] = field(default_factory=dict)
    needed: set[int] = field(default_factory=set)

    def add(self, index: int, tokens: Sequence[int], shared: Sequence[int], first_read: int) -> None:
        """Add a query whose leading tokens are the tokens `shared` of the bin."""
        start = len(self.tokens)
        path = [*shared, *range(start, start + len(tokens) - len(shared))]
        self.tokens += tokens[len(shared) :]
        self.depths += range(len(shared), len(tokens))
        self.paths[index] = path
        self.reads[index] = path[first_read:]
        self.needed.update(path[first_read:])


@dataclass(frozen=True)
class Batch:
    """Bins side by side: `ids`, `positions` [rows, width], `mask` [rows, width, opening + width].

    The last `n_kept` columns hold all tokens that predict; `reads` give for each query its row and, in the order of
    its answer, their columns counted from the first kept one.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    mask: NDArray[np.bool_]
    n_kept: int
    reads: dict[int, tuple[int, list[int]]]


def common_opening(queries: Sequence[Query]) -> int:
    """Count the leading tokens that all prompts share, short of the token that predicts the first answer token."""
    least, most = min(q.prompt for q in queries), max(q.prompt for q in queries)
    return min(_n_common(least, most), min(len(q.prompt) for q in queries) - 1)


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n


def pack_bins(queries: Sequence[Query], indices: Iterable[int], n_opening: int, capacity: int) -> list[Bin]:
    """Put the queries at `indices` into bins of about `capacity` tokens, those that open alike together."""
    order = sorted(indices, key=lambda i: queries[i].fed)
    bins = [Bin()]
    before: tuple[int, ...] = ()
    path: list[int] = []
    for index in order:
        tokens = queries[index].fed[n_opening:]
        n_shared = _n_common(before, tokens)
        n_after = len(bins[-1].tokens) + len(tokens) - n_shared
        if bins[-1].tokens and not _fits(n_after, n_shared, len(tokens), capacity):
            bins.append(Bin())
            n_shared = 0
        bins[-1].add(index, tokens, path[:n_shared], queries[index].first - n_opening)
        before, path = tokens, bins[-1].paths[index]
    return bins


def _fits(n_after: int, n_shared: int, n_tokens: int, capacity: int) -> bool:
    # Choices of a question longer than a bin still share it: attention within a large bin is cheaper than a copy.
    return n_after <= capacity or (2 * n_shared > n_tokens and n_after <= 2 * n_tokens)


def single_bins(queries: Sequence[Query], indices: Iterable[int]) -> list[Bin]:
    """Put each of the queries at `indices` into a bin of its own."""
    bins = []
    for index in indices:
        bins.append(Bin())
        bins[-1].add(index, queries[index].fed, [], queries[index].first)
    return bins


def group_bins(bins: Iterable[Bin], budget: int) -> Iterator[list[int]]:
    """Give the indices of bins of like size that make a batch of at most `budget` tokens, padding included."""
    sizes = [(len(item.tokens) - len(item.needed), len(item.needed)) for item in bins]
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: sum(sizes[i]), reverse=True):
        grown = [*batch, index]
        width = max(sizes[i][0] for i in grown) + max(sizes[i][1] for i in grown)
        if batch and width * len(grown) > budget:
            yield batch
            grown = [index]
        batch = grown
    if batch:
        yield batch


def lay_out(bins: Sequence[Bin], n_opening: int, pad: int) -> Batch:
    """Place bins in the rows of one batch, at the right, behind an opening of `n_opening` cached tokens."""
    n_kept = max(len(item.needed) for item in bins)
    width = n_kept + max(len(item.tokens) - len(item.needed) for item in bins)
    ids = np.full((len(bins), width), pad, np.int64)
    positions = np.zeros((len(bins), width), np.int64)
    mask = np.zeros((len(bins), width, n_opening + width), np.bool_)
    # Padding sees itself, so that its softmax is not empty.
    mask[:, np.arange(width), n_opening + np.arange(width)] = True
    reads: dict[int, tuple[int, list[int]]] = {}
    for row, item in enumerate(bins):
        order = sorted(range(len(item.tokens)), key=lambda token: token in item.needed)
        columns = np.empty(len(order), np.int64)
        columns[order] = np.arange(width - len(order), width)
        ids[row, columns] = item.tokens
        positions[row, columns] = n_opening + np.array(item.depths)
        mask[row, columns, :n_opening] = True
        for index, path in item.paths.items():
            own = columns[path]
            mask[row, own[:, None], n_opening + own[None, :]] = np.tri(len(own), dtype=np.bool_)
            reads[index] = (row, [int(columns[token]) - width + n_kept for token in item.reads[index]])
    return Batch(ids, positions, mask, n_kept, reads)
