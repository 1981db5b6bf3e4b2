"""Rows laid out for one pass: many in one line behind what they share, or each in a row of its own.

Prompts of one template open with the same tokens, and the state of a token depends on those before it alone. So a
line holds the tokens that all its rows open with once, and behind them the rest of each row; the mask lets a row see
the opening and itself, and its positions count on from the opening. Each row gets the logits that it would get alone,
nothing is padded, and short rows cost half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mediator_cli.moe.train.rows import Example

_SHARED = 0
IGNORED = -100
"""The label of what is not predicted, as transformers has it."""


@dataclass(frozen=True)
class Line:
    """Rows in one line: `ids` and `positions` [1, tokens], `mask` [1, 1, tokens, tokens], 0 where a token is seen.

    `predicting` [targets] are the places that predict, `targets` [targets] what they should; `owners` [targets] is
    the row that each is of.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    predicting: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor


@dataclass(frozen=True)
class Grid:
    """Rows one by one, padded at the right: `ids`, `mask` (1 at tokens) and `labels`, all [rows, tokens]."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    @property
    def targets(self) -> torch.Tensor:
        """What is to be predicted [targets], row by row."""
        return self.labels[:, 1:][self.labels[:, 1:] != IGNORED]

    @property
    def owners(self) -> torch.Tensor:
        """The row that each target is of [targets]."""
        return (self.labels[:, 1:] != IGNORED).nonzero()[:, 0]


def groups(rows: Sequence[Example], width: int, tokens: Callable[[Sequence[Example]], int]) -> list[list[Example]]:
    """Share rows among passes of at most `width` tokens, as `tokens` counts them; a longer row gets one of its own.

    Rows that open alike come together.
    """
    found: list[list[Example]] = []
    for row in sorted(rows, key=lambda row: (row.ids, row.task)):
        tried = [*found[-1], row] if found else []
        if tried and tokens(tried) <= width:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def line_tokens(rows: Sequence[Example]) -> int:
    """Count the tokens of a line of rows, what they open with once."""
    start = opening(rows)
    return start + sum(len(row.ids) - 1 - start for row in rows)


def grid_tokens(rows: Sequence[Example]) -> int:
    """Count the tokens of a grid of rows, padding among them."""
    return len(rows) * max(len(row.ids) for row in rows)


def opening(rows: Sequence[Example]) -> int:
    """Count the tokens that all rows open with, before the first that predicts one."""
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    most = min(row.first for row in rows) - 1
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b or at == most), most)


def line_of(rows: Sequence[Example], dtype: torch.dtype) -> Line:
    """Lay rows out in one line; the mask is of a dtype."""
    start = opening(rows)
    ids, positions, owned = list(rows[0].ids[:start]), list(range(start)), [_SHARED] * start
    predicting: list[int] = []
    owners: list[int] = []
    for number, row in enumerate(rows):
        own = row.ids[start:-1]
        ids += own
        positions += range(start, start + len(own))
        owned += [number + 1] * len(own)
        n_targets = len(row.ids) - row.first
        predicting += range(len(ids) - n_targets, len(ids))
        owners += [number] * n_targets
    targets = [token for row in rows for token in row.ids[row.first :]]
    return Line(
        torch.tensor([ids]), torch.tensor([positions]), _mask(owned, dtype), torch.tensor(predicting),
        torch.tensor(targets), torch.tensor(owners),
    )  # fmt: skip


def _mask(owned: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    owner = torch.tensor(owned)
    seen = (owner[:, None] == owner[None, :]) | (owner[None, :] == _SHARED)
    seen &= torch.ones_like(seen).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def grid_of(rows: Sequence[Example], pad: int) -> Grid:
    """Lay each row out in a row of its own."""
    width = max(len(row.ids) for row in rows)
    spare = [width - len(row.ids) for row in rows]
    ids = [[*row.ids, *[pad] * n] for row, n in zip(rows, spare, strict=True)]
    mask = [[1] * len(row.ids) + [0] * n for row, n in zip(rows, spare, strict=True)]
    labels = [
        [IGNORED] * row.first + list(row.ids[row.first :]) + [IGNORED] * n for row, n in zip(rows, spare, strict=True)
    ]
    return Grid(torch.tensor(ids), torch.tensor(mask), torch.tensor(labels))
