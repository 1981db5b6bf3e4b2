"""What is minimised: cross-entropy of the tokens that are due and, if asked for, Switch's load-balance loss."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch.nn import functional

from mediator_cli.moe.train.lines import grid_of, grid_tokens, line_of, line_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from mediator_cli.moe.train.rows import Example


@dataclass(frozen=True)
class Pass:
    """What one pass over some rows gives: `logits` [targets, vocabulary], `targets` and `owners` [targets].

    `owners` is the row that a target is of; `balance` the load-balance loss, 1 where all experts get as much.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    balance: torch.Tensor


class Passes(Protocol):
    """Runs rows through a model."""

    def tokens(self, rows: Sequence[Example]) -> int:
        """Count the tokens that go through it for some rows."""
        ...

    def __call__(self, rows: Sequence[Example]) -> Pass:
        """Give the logits of all tokens that the rows have to predict."""
        ...


@dataclass(frozen=True)
class LinePasses:
    """Passes of a model whose experts are chosen token by token: rows in one line.

    `call` runs it: the model, or what wraps it. `routers` are its routers.
    """

    call: nn.Module
    model: PreTrainedModel
    routers: tuple[nn.Module, ...]
    top_k: int
    dtype: torch.dtype

    def tokens(self, rows: Sequence[Example]) -> int:
        """Count the tokens of a line."""
        return line_tokens(rows)

    def __call__(self, rows: Sequence[Example]) -> Pass:
        """Give the logits of all tokens that the rows have to predict; all tokens of the line count for balance."""
        line, device = line_of(rows, self.dtype), self.model.device
        with _heard(self.routers) as states:
            found = self.call(
                input_ids=line.ids.to(device), position_ids=line.positions.to(device),
                attention_mask=line.mask.to(device), logits_to_keep=line.predicting.to(device), use_cache=False,
            )  # fmt: skip
            each = [
                balance_loss(functional.linear(seen.float(), cast("torch.Tensor", router.weight).float()), self.top_k)
                for router, seen in zip(self.routers, states, strict=True)
            ]
        balance = torch.stack(each).mean() if each else found.logits.new_zeros(())
        return Pass(found.logits[0].float(), line.targets.to(device), line.owners.to(device), balance)


@dataclass(frozen=True)
class GridPasses:
    """Passes of a model whose experts are chosen row by row, by the prompt: each row by itself."""

    call: nn.Module
    model: PreTrainedModel
    pad: int

    def tokens(self, rows: Sequence[Example]) -> int:
        """Count the tokens of a grid."""
        return grid_tokens(rows)

    def __call__(self, rows: Sequence[Example]) -> Pass:
        """Give the logits of all tokens that the rows have to predict; rows count for balance."""
        grid, device = grid_of(rows, self.pad), self.model.device
        found: Any = self.call(
            input_ids=grid.ids.to(device), attention_mask=grid.mask.to(device), labels=grid.labels.to(device),
            use_cache=False,
        )  # fmt: skip
        return Pass(found.logits.float(), grid.targets.to(device), grid.owners.to(device), found.aux_loss)


def cross_entropy(found: Pass) -> torch.Tensor:
    """Sum the cross-entropy of all targets, in nats."""
    return functional.cross_entropy(found.logits, found.targets, reduction="sum")


def balance_loss(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Give N · Σ fᵢ · Pᵢ of router logits [tokens, N]: 1 where all experts get as much, up to N where one gets all.

    fᵢ is the share of the chosen places that expert i has among the tokens, Pᵢ its mean probability over all experts:
    Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961), equations 4 to 6, for one layer. That of
    transformers joins the tokens of all layers first, so layers that differ from each other look balanced.
    """
    probabilities = logits.float().softmax(dim=-1)
    n = logits.shape[-1]
    chosen = probabilities.topk(min(top_k, n), dim=-1).indices
    shares = torch.bincount(chosen.flatten(), minlength=n) / chosen.numel()
    return n * (shares * probabilities.mean(dim=0)).sum()


@contextmanager
def _heard(routers: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Note the states [tokens, hidden] that each router reads in one pass, in the order of routers."""
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # With checkpointing the backward pass reads them again.
        if len(seen) < len(routers):
            seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]))

    hooks = [router.register_forward_pre_hook(note) for router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
