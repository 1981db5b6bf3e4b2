"""Modules whose parameters are mixed for each row of a batch: linear layers, embeddings and vectors.

They take over the modules of a loaded model in place, so that names, hooks and parameters stay what they were. What
mixes is a `Mixer`; it is told the parts of the batch before each pass. Without parts a module is the dense expert's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mediator_cli.errors import BundleError, Problem
from mediator_cli.runtime.forms import call_with, form_of, takes_rows
from mediator_cli.runtime.gated import GatedStack, gated_product, gated_rows
from mediator_cli.runtime.low_rank import LowRankStack
from mediator_cli.runtime.stack import Stack, slice_stack, sparse_product, sparse_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mediator_cli.runtime.deltas import Deltas
    from mediator_cli.runtime.held_deltas import HeldDeltas
    from mediator_cli.runtime.mixing import Part, User
    from mediator_cli.runtime.stack import Slice


@dataclass
class Matrix:
    """The deltas of one matrix, which tied modules share.

    `stack` is made when products are first needed, and kept if `keeps`; `slices` are views of it by experts held.
    """

    deltas: Deltas | HeldDeltas
    keeps: bool = True
    stack: Stack | GatedStack | LowRankStack | None = None
    slices: dict[tuple[int, int], Slice] = field(default_factory=dict)

    def stacked(self, device: torch.device) -> Stack | GatedStack | LowRankStack:
        """Return the stack, made anew unless it is kept."""
        stack = self.deltas.stack(device) if self.stack is None else self.stack
        if self.keeps:
            self.stack = stack
        return stack

    def product(self, tokens: torch.Tensor, part: Part, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Compute Σ weight · delta · x for a part in float32: tokens [columns, tokens] → [rows, tokens].

        `weights` [tokens, experts] are those that gates chose, which low-rank experts alone take.
        """
        stack = self.stacked(tokens.device)
        if isinstance(stack, LowRankStack):
            if weights is not None:
                return stack.product(tokens, weights, is_chosen=True)
            return stack.product(tokens, _per_token(part.weights, tokens.shape[1]))
        if isinstance(stack, GatedStack):
            return gated_product(stack, tokens, part)
        if users := part.users(tokens.shape[1]):
            return self._apart(stack, tokens, users)
        run = self._slice(stack, part.used)
        return sparse_product(run, tokens, part.scales(run.first, run.count, tokens.shape[1]))

    def _apart(self, stack: Stack, tokens: torch.Tensor, users: Sequence[User]) -> torch.Tensor:
        """Multiply each expert with the tokens that use it alone."""
        total = torch.zeros(stack.shape[0], tokens.shape[1], device=tokens.device)
        for expert, own, weights in users:
            alone = torch.sparse.mm(self._slice(stack, (expert,)).matrix, tokens[:, own])
            total.index_add_(1, own, alone.mul_(weights))
        return total

    def _slice(self, stack: Stack, used: Sequence[int]) -> Slice:
        key = used[0], used[-1]
        found = self.slices.get(key) or slice_stack(stack, used)
        if self.keeps:
            self.slices[key] = found
        return found

    def rows(self, indices: torch.Tensor, part: Part) -> torch.Tensor:
        """Mix single rows of the deltas: indices [tokens] → float32 [tokens, columns]."""
        stack = self.stacked(indices.device)
        if isinstance(stack, LowRankStack):
            return stack.rows(indices, _per_token(part.weights, len(indices)))
        if isinstance(stack, GatedStack):
            return gated_rows(stack, indices, part)
        return sparse_rows(stack, indices, _per_token(part.weights, len(indices)))


@dataclass
class Mixer:
    """What one module mixes: its matrix, the deltas of its vectors [experts, n], and the parts of the batch.

    `choose` makes weights [tokens, experts] of its input [rows, tokens, in], where gates choose experts.
    """

    matrix: Matrix | None = None
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def name(self) -> str:
        """The matrix's name in the bundle; empty without one."""
        return self.matrix.deltas.name if self.matrix else ""

    def add_product(self, y: torch.Tensor, x: torch.Tensor, part: Part) -> torch.Tensor:
        """Add the sparse experts' share for x [rows, …, columns] to y [rows, …, n]; summed in float32, rounded once."""
        if self.matrix is None or not part.used:
            return y
        weights = self.choose(x) if part.is_gated and self.choose is not None else None
        share = self.matrix.product(part.tokens(x), part, weights)
        return (y.view(-1, y.shape[-1]) + share.t()).to(y.dtype).view(y.shape)

    def vector(self, name: str, dense: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Mix a vector [n] for each row of weights [rows, experts] → [rows, n]; in float32, rounded once."""
        deltas = self.vectors.get(name)
        if deltas is None:
            return dense.expand(len(weights), -1)
        return (dense.float() + weights @ deltas).to(dense.dtype)


def count_rows(parts: tuple[Part, ...]) -> int:
    """Count the rows of the batch that parts divide."""
    return sum(len(part.weights) for part in parts)


def _by_rows(name: str, x: torch.Tensor, n_rows: int, one: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Call `one` with x laid out by the rows of the batch: x [rows, …], [rows · tokens, …], or one for all rows."""
    if len(x) == n_rows:
        return one(x)
    if len(x) == 1:
        return one(x.expand(n_rows, *x.shape[1:]))
    if len(x) % n_rows:
        message = f"is called with {len(x)} rows in a batch of {n_rows}"
        raise BundleError(Problem(name, message, "average it: assign.rule=listed without its unit"))
    return one(x.reshape(n_rows, -1, *x.shape[1:])).flatten(0, 1)


def _in_parts(mixer: Mixer, x: torch.Tensor, one: Callable[[Part, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    def divided(rows: torch.Tensor) -> torch.Tensor:
        if len(mixer.parts) == 1:
            return one(mixer.parts[0], rows)
        results = [one(part, rows[part.rows]) for part in mixer.parts]
        whole = results[0].new_empty(len(rows), *results[0].shape[1:])
        for part, result in zip(mixer.parts, results, strict=True):
            whole[part.rows] = result
        return whole

    return _by_rows(mixer.name, x, count_rows(mixer.parts), divided)


class MixedLinear(nn.Linear):
    """A linear layer whose matrix and bias are mixed for each row."""

    mixer: Mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x · Wᵀ + b with each row's own W and b: x [rows, …, in] → [rows, …, out]."""
        if not self.mixer.parts:
            return functional.linear(x, self.weight, self.bias)
        return _in_parts(self.mixer, x, self._one)

    def _one(self, part: Part, x: torch.Tensor) -> torch.Tensor:
        if part.matrices is None:
            y = self.mixer.add_product(functional.linear(x, self.weight), x, part)
        else:
            y = functional.linear(x, part.matrices.get(self.mixer.name, self.weight))
        if self.bias is None:
            return y
        bias = self.mixer.vector("bias", self.bias, part.weights)
        return y + bias.view(len(x), *(1,) * (x.ndim - 2), -1)


class MixedConv1D(Conv1D):
    """GPT-2's linear layer, whose matrix [in, out] lies the other way round."""

    mixer: Mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x · W + b with each row's own W and b: x [rows, …, in] → [rows, …, out]."""
        if not self.mixer.parts:
            return super().forward(x)  # type: ignore[no-any-return,no-untyped-call]
        return _in_parts(self.mixer, x, self._one)

    def _one(self, part: Part, x: torch.Tensor) -> torch.Tensor:
        if part.matrices is None:
            y = self.mixer.add_product(x @ self.weight, x, part)
        else:
            y = x @ part.matrices.get(self.mixer.name, self.weight)
        return y + self.mixer.vector("bias", self.bias, part.weights).view(len(x), *(1,) * (x.ndim - 2), -1)


class MixedEmbedding(nn.Embedding):
    """An embedding whose matrix is mixed for each row; put before the class of one that does more than look up."""

    mixer: Mixer

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids [rows, …] → [rows, …, n] in each row's own matrix."""
        if not self.mixer.parts:
            return super().forward(ids)
        return _in_parts(self.mixer, ids, self._one)

    def _one(self, part: Part, ids: torch.Tensor) -> torch.Tensor:
        forward = super().forward
        if part.matrices is not None:
            weight = part.matrices.get(self.mixer.name, self.weight)
            return call_with(self, {"weight": weight}, ids, forward)
        if self.mixer.matrix is None or not part.used:
            return forward(ids)
        share = self.mixer.matrix.rows(ids.flatten(), part)
        rows = (self.weight[ids.flatten()].float() + share).to(self.weight.dtype)
        return call_with(self, {"weight": rows}, torch.arange(len(rows), device=ids.device).view(ids.shape), forward)


class MixedVectors(nn.Module):
    """Put before the class of a norm, or of any module of vectors, so that its vectors are mixed for each row.

    Modules that only scale and shift take one vector for each row in one call; others are called row by row.
    """

    mixer: Mixer
    takes_rows: bool
    mixed: dict[str, torch.Tensor]
    mixed_for: tuple[Part, ...]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call the module with each row's own vectors: x [rows, …, n]."""
        parts = self.mixer.parts
        if not parts:
            return super().forward(x)  # type: ignore[no-any-return]
        n_rows = count_rows(parts)
        if self.mixed_for is not parts:
            self.mixed, self.mixed_for = self._mix(parts, n_rows), parts
        if next(iter(self.mixed.values())).ndim == 1:
            return self._call(self.mixed, x)
        return _by_rows(type(self).__name__, x, n_rows, self._each)

    def _call(self, vectors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return call_with(self, vectors, x, super().forward)

    def _each(self, x: torch.Tensor) -> torch.Tensor:
        if self.takes_rows:
            shape = (len(x), *(1,) * (x.ndim - 2), -1)
            return self._call({name: rows.view(shape) for name, rows in self.mixed.items()}, x)
        single = ({name: rows[row] for name, rows in self.mixed.items()} for row in range(len(x)))
        return torch.cat([self._call(own, x[row : row + 1]) for row, own in enumerate(single)])

    def _mix(self, parts: tuple[Part, ...], n_rows: int) -> dict[str, torch.Tensor]:
        weights = _row_weights(parts, n_rows)
        dense = dict(self.named_parameters(recurse=False))
        if len(parts) == 1 and parts[0].is_uniform:
            return {name: self.mixer.vector(name, parameter, weights[:1])[0] for name, parameter in dense.items()}
        return {name: self.mixer.vector(name, parameter, weights) for name, parameter in dense.items()}


def take_over(module: Any, mixer: Mixer) -> None:  # noqa: ANN401 - its class changes
    """Make a module, whose form is known, mix by `mixer`; its parameters, name and hooks stay."""
    form, own = form_of(module), type(module)
    module.mixer = mixer
    if form == "vectors":
        module.takes_rows, module.mixed, module.mixed_for = takes_rows(module), {}, ()
        module.__class__ = type(f"Mixed{own.__name__}", (MixedVectors, own), {})
    elif form == "lookup":
        # Only training asks which row is padding, and rows looked up beforehand have other numbers.
        module.padding_idx = None
        module.__class__ = type(f"Mixed{own.__name__}", (MixedEmbedding, own), {})
    else:
        module.__class__ = MixedConv1D if form == "transposed" else MixedLinear


def _per_token(weights: torch.Tensor, n_tokens: int) -> torch.Tensor:
    return weights if len(weights) == n_tokens else weights.repeat_interleave(n_tokens // len(weights), dim=0)


def _row_weights(parts: tuple[Part, ...], n_rows: int) -> torch.Tensor:
    if parts[0].rows is None:
        return parts[0].weights
    weights = parts[0].weights.new_empty(n_rows, parts[0].weights.shape[1])
    for part in parts:
        weights[part.rows] = part.weights
    return weights
