"""Modules whose parameters are mixed for each row of a batch: linear layers, embeddings and vectors.

They take over the modules of a loaded model in place, so that names, hooks and parameters stay what they were. What
mixes is a `Mixer`; it is told the parts of the batch before each pass. Without parts a module is the dense expert's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from mediator_cli.runtime.stack import slice_stack, sparse_product, sparse_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from mediator_cli.runtime.deltas import Deltas
    from mediator_cli.runtime.mixing import Part
    from mediator_cli.runtime.stack import Slice, Stack


@dataclass
class Matrix:
    """The deltas of one matrix, which tied modules share.

    `stack` is made when products are first needed, and kept if `keeps`; `slices` are views of it by experts held.
    """

    deltas: Deltas
    keeps: bool = True
    stack: Stack | None = None
    slices: dict[tuple[int, int], Slice] = field(default_factory=dict)

    def stacked(self, device: torch.device) -> Stack:
        """Return the stack, made anew unless it is kept."""
        stack = self.deltas.stack(device) if self.stack is None else self.stack
        if self.keeps:
            self.stack = stack
        return stack

    def slice(self, used: tuple[int, ...], device: torch.device) -> Slice:
        """Return the part of the stack that holds the experts used."""
        key = (used[0], used[-1])
        found = self.slices.get(key) or slice_stack(self.stacked(device), used)
        if self.keeps:
            self.slices[key] = found
        return found


@dataclass
class Mixer:
    """What one module mixes: its matrix, the deltas of its vectors [experts, n], and the parts of the batch."""

    matrix: Matrix | None = None
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    @property
    def name(self) -> str:
        """The matrix's name in the bundle; empty without one."""
        return self.matrix.deltas.name if self.matrix else ""

    def add_product(self, y: torch.Tensor, x: torch.Tensor, part: Part) -> torch.Tensor:
        """Add the sparse experts' share for x [rows, …, columns] to y [rows, …, n]; summed in float32, rounded once."""
        if self.matrix is None or not part.used:
            return y
        tokens = part.tokens(x)
        found = self.matrix.slice(part.used, x.device)
        share = sparse_product(found, tokens, part.scales(found.first, found.count, tokens.shape[1]))
        return (y.view(-1, y.shape[-1]) + share.t()).to(y.dtype).view(y.shape)

    def vector(self, name: str, dense: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Mix a vector [n] for each row of weights [rows, experts] → [rows, n]; in float32, rounded once."""
        deltas = self.vectors.get(name)
        if deltas is None:
            return dense.expand(len(weights), -1)
        return (dense.float() + weights @ deltas).to(dense.dtype)


def _in_parts(mixer: Mixer, x: torch.Tensor, one: Callable[[Part, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if len(mixer.parts) == 1:
        return one(mixer.parts[0], x)
    results = [one(part, x[part.rows]) for part in mixer.parts]
    whole = results[0].new_empty(len(x), *results[0].shape[1:])
    for part, result in zip(mixer.parts, results, strict=True):
        whole[part.rows] = result
    return whole


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


class MixedEmbedding(nn.Embedding):
    """An embedding whose matrix is mixed for each row."""

    mixer: Mixer

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids [rows, …] → [rows, …, n] in each row's own matrix."""
        if not self.mixer.parts:
            return super().forward(ids)
        return _in_parts(self.mixer, ids, self._one)

    def _one(self, part: Part, ids: torch.Tensor) -> torch.Tensor:
        if part.matrices is not None:
            return functional.embedding(ids, part.matrices.get(self.mixer.name, self.weight))
        found = functional.embedding(ids, self.weight)
        if self.mixer.matrix is None or not part.used:
            return found
        each = _per_token(part.weights, ids.numel())
        share = sparse_rows(self.mixer.matrix.stacked(ids.device), ids.flatten(), each)
        return (found.float() + share.view(found.shape)).to(found.dtype)


class MixedVectors(nn.Module):
    """A norm, or any module of vectors, whose vectors are mixed for each row.

    Modules that only scale and shift take one vector for each row in one call; others are called row by row.
    """

    def __init__(self, inner: nn.Module, mixer: Mixer) -> None:
        super().__init__()
        self.inner = inner
        self.mixer = mixer
        self.takes_rows = takes_rows(inner)
        self.mixed: dict[str, torch.Tensor] = {}
        self.mixed_for: tuple[Part, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call the module with each row's own vectors: x [rows, …, n]."""
        parts = self.mixer.parts
        if not parts:
            return self.inner(x)  # type: ignore[no-any-return]
        if self.mixed_for is not parts:
            self.mixed, self.mixed_for = self._mix(parts, len(x)), parts
        if next(iter(self.mixed.values())).ndim == 1:
            return _call(self.inner, self.mixed, x)
        if self.takes_rows:
            shape = (len(x), *(1,) * (x.ndim - 2), -1)
            return _call(self.inner, {name: rows.view(shape) for name, rows in self.mixed.items()}, x)
        single = ({name: rows[row] for name, rows in self.mixed.items()} for row in range(len(x)))
        return torch.cat([_call(self.inner, own, x[row : row + 1]) for row, own in enumerate(single)])

    def _mix(self, parts: tuple[Part, ...], n_rows: int) -> dict[str, torch.Tensor]:
        weights = _row_weights(parts, n_rows)
        dense = dict(self.inner.named_parameters(recurse=False))
        if len(parts) == 1 and parts[0].is_uniform:
            return {name: self.mixer.vector(name, parameter, weights[:1])[0] for name, parameter in dense.items()}
        return {name: self.mixer.vector(name, parameter, weights) for name, parameter in dense.items()}


def _call(module: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    # What torch.func.functional_call does, without its walk over the module: it runs for every norm of every token.
    own = module._parameters
    kept = dict(own)
    try:
        own.update(parameters)  # type: ignore[arg-type]
        return module(x)  # type: ignore[no-any-return]
    finally:
        own.update(kept)


def _per_token(weights: torch.Tensor, n_tokens: int) -> torch.Tensor:
    return weights if len(weights) == n_tokens else weights.repeat_interleave(n_tokens // len(weights), dim=0)


def _row_weights(parts: tuple[Part, ...], n_rows: int) -> torch.Tensor:
    if parts[0].rows is None:
        return parts[0].weights
    weights = parts[0].weights.new_empty(n_rows, parts[0].weights.shape[1])
    for part in parts:
        weights[part.rows] = part.weights
    return weights


def takes_rows(module: nn.Module) -> bool:
    """Tell whether a module of vectors [n] computes the same with a vector for each row, [rows, 1, n]."""
    parameters = dict(module.named_parameters(recurse=False))
    size = next(iter(parameters.values())).shape[-1]
    generator = torch.Generator().manual_seed(0)
    like = next(iter(parameters.values()))
    x, *drawn = torch.randn(1 + len(parameters), 2, 3, size, generator=generator).to(like).unbind()
    rows = {name: values[:, :1] for name, values in zip(parameters, drawn, strict=True)}
    try:
        together = _call(module, rows, x)
    except RuntimeError:
        return False
    single = [_call(module, {n: v[row, 0] for n, v in rows.items()}, x[row : row + 1]) for row in range(2)]
    return together.shape == x.shape and bool(torch.allclose(together, torch.cat(single), atol=1e-6))
