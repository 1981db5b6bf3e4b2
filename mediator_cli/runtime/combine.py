"""Several experts for one input, each run apart: their outputs averaged for every token with the shares of its mixture.

Every row of a batch becomes one row for each of its experts, with keys and values of its own. What a mixture's weights
leave to 1 is the dense expert's share, so that one row of zeros is the dense expert alone, as with mixed parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from mediator_cli.errors import BundleError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

Combine = Literal["parameters", "probabilities", "logits", "hidden"]
COMBINATIONS: tuple[Combine, ...] = ("parameters", "probabilities", "logits", "hidden")
_ROUNDING = 1e-5
"""Weights that sum to 1 but for this leave nothing to the dense expert."""
_BY_ROWS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


@dataclass(frozen=True, eq=False)
class Members:
    """The models that answer the rows of a batch: `owners` [members] are their rows, `shares` [members] their parts.

    `rows` [rows, experts] are the mixtures asked for, `weights` [members, experts] mixtures of one expert, or of none
    for the dense expert. The first member of every row comes first, in the order of rows, then the second of those that
    have one: so what a cache holds of a single row can be repeated.
    """

    owners: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor
    rows: torch.Tensor

    @property
    def n_rows(self) -> int:
        """Count the rows of the batch."""
        return len(self.rows)

    @property
    def is_alone(self) -> bool:
        """Whether each row is answered by one model, so that there is nothing to combine."""
        return len(self.owners) == self.n_rows


def find_members(weights: torch.Tensor, combine: Combine, place: str) -> Members:
    """List who answers each row of weights [rows, experts].

    Raises BundleError for shares below zero where probabilities are combined.
    """
    left = 1 - weights.sum(1, keepdim=True)
    shares = torch.cat([weights, torch.where(left.abs() > _ROUNDING, left, 0.0)], dim=1)
    if combine == "probabilities" and bool((shares < 0).any()):
        message = "weights below 0, or above 1 together, are no shares of probability"
        raise BundleError(Problem(place, message, "combine logits, hidden or parameters"))
    rows, models = torch.nonzero(shares, as_tuple=True)
    # The n-th member of its row: rows come sorted, so members of a row stand together.
    turn = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    order = torch.argsort(turn, stable=True)
    owners, models = rows[order], models[order]
    one_hot = torch.eye(shares.shape[1], device=weights.device)[models, :-1]
    return Members(owners, one_hot, shares[owners, models], weights)


def expand(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], members: Members
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat the inputs of a model's call for the members of each row; caches hold them already."""
    if kwargs.get("labels") is not None:
        message = "the loss of combined outputs is not computed"
        raise BundleError(Problem("labels", message, "leave them out and take log-probabilities of the logits"))
    first = tuple(_expanded(value, members) for value in args[:1])
    others = {name: _expanded(value, members) if name in _BY_ROWS else value for name, value in kwargs.items()}
    return (*first, *args[1:]), others


def _expanded(value: Any, members: Members) -> Any:  # noqa: ANN401 - a tensor, masks by kind of layer, or None
    if isinstance(value, dict):
        return {name: _expanded(each, members) for name, each in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == members.n_rows:
        return value[members.owners]
    return value


def join_hidden(hidden: torch.Tensor, members: Members) -> torch.Tensor:
    """Average hidden states [members, …] within each row, and give each member the mean of its row."""
    return _averaged(hidden, members)[members.owners].to(hidden.dtype)


def join_logits(logits: torch.Tensor, members: Members, combine: Combine) -> torch.Tensor:
    """Combine logits [members, …, vocabulary] into [rows, …, vocabulary], float32; probabilities into their logarithms.

    With hidden states combined before, the average of the heads' logits is what the averaged head gives: it is linear.
    """
    if combine != "probabilities":
        return _averaged(logits, members)
    logs = logits.float().log_softmax(-1) + members.shares.log().view(-1, *(1,) * (logits.ndim - 1))
    total = logs[: members.n_rows].clone()
    for at in range(members.n_rows, len(logs)):
        row = int(members.owners[at])
        total[row] = torch.logaddexp(total[row], logs[at])
    return total


def _averaged(values: torch.Tensor, members: Members) -> torch.Tensor:
    total = torch.zeros(members.n_rows, *values.shape[1:], device=values.device)
    shares = members.shares.view(-1, *(1,) * (values.ndim - 1))
    return total.index_add_(0, members.owners, values.float() * shares)
