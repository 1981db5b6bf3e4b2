"""Passes of the model over rows of different mixtures and lengths."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import DynamicCache

from mediator_cli.serve.engine.slots import slot_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.serve.engine.prefixes import Kept, Weights
    from mediator_cli.serve.engine.slots import SlotCache

_NEAR = 0.05
_PROBED = (12, 7)


@dataclass(frozen=True)
class Chunk:
    """Tokens of a row from position `start` on, and whether the logits of all of them are wanted, or of the last."""

    tokens: Sequence[int]
    start: int
    weights: Weights
    wants_all: bool = False


class Batch(Protocol):
    """Where rows are read and answered; a row is known by its place."""

    @property
    def most_rows(self) -> int:
        """How many rows there may be."""

    @property
    def can_split(self) -> bool:
        """Whether a prompt may be read in several passes, and several rows in one."""

    def run(self, first: int, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Read chunks of neighbouring rows; give the logits [tokens or 1, vocabulary] of each, float32."""

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Put one row in place of another."""

    def swap(self, one: int, other: int, n_tokens: int) -> None:
        """Exchange two rows."""

    def copy_out(self, row: int, n_tokens: int) -> tuple[torch.Tensor, ...]:
        """Copy what is held of a row; nothing where that cannot be used again."""

    def copy_in(self, row: int, kept: Kept, n_tokens: int) -> None:
        """Begin a row with what was held of another."""

    def clear(self) -> None:
        """Forget all rows."""


@dataclass
class Mixing:
    """Keeps the mixtures of the last pass set, as deciding on them anew for every token takes time."""

    model: RoutedModel
    held: ExitStack = field(default_factory=ExitStack)
    rows: tuple[Weights, ...] | None = None

    def use(self, rows: tuple[Weights, ...]) -> None:
        """Mix by these weights from now on."""
        if rows == self.rows:
            return
        self.end()
        shape = (len(rows), len(self.model.expert_names))
        self.held.enter_context(self.model.mixing(torch.tensor(rows, dtype=torch.float32).reshape(shape)))
        self.rows = rows

    def end(self) -> None:
        """Set nothing."""
        self.held.close()
        self.rows = None


@dataclass
class SlotBatch:
    """Many rows in one pass, each with its own mixture."""

    model: RoutedModel
    cache: SlotCache
    most_rows: int
    mixing: Mixing
    can_split: bool = True

    def run(self, first: int, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Read chunks of neighbouring rows, padded behind; what padding writes is overwritten before it counts."""
        counts = [len(chunk.tokens) for chunk in chunks]
        longest, device = max(counts), self.model.device
        padded = [[*chunk.tokens, *[0] * (longest - len(chunk.tokens))] for chunk in chunks]
        ids = torch.tensor(padded, device=device)
        positions = torch.tensor([chunk.start for chunk in chunks], device=device)[:, None] + torch.arange(
            longest, device=device
        )
        self.cache.look_at(first, positions)
        columns = torch.arange(self.cache.window.width, device=device)
        mask = (columns <= positions[:, :, None])[:, None]
        self.mixing.use(tuple(chunk.weights for chunk in chunks))
        kept, places = _kept(chunks, longest)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=torch.tensor(kept, device=device),
        )  # fmt: skip
        return [output.logits[row, at].float() for row, at in enumerate(places)]

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Put one row in place of another."""
        self.cache.move(source, target, n_tokens)

    def swap(self, one: int, other: int, n_tokens: int) -> None:
        """Exchange two rows."""
        self.cache.swap(one, other, n_tokens)

    def copy_out(self, row: int, n_tokens: int) -> tuple[torch.Tensor, ...]:
        """Copy the keys and values of a row."""
        return self.cache.copy_out(row, n_tokens)

    def copy_in(self, row: int, kept: Kept, n_tokens: int) -> None:
        """Begin a row with keys and values of another."""
        self.cache.copy_in(row, kept.arrays, n_tokens)

    def clear(self) -> None:
        """Give the memory of all rows back."""
        self.mixing.end()
        self.cache.clear()


@dataclass
class SoloBatch:
    """One row at a time, for what cannot share a pass: gates, experts that run apart, windows, states."""

    model: RoutedModel
    mixing: Mixing
    cache: Any = None
    most_rows: int = 1
    can_split: bool = False

    def run(self, first: int, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Read a whole prompt, or one more token."""
        (chunk,) = chunks
        if chunk.start == 0:
            self.cache = DynamicCache(config=self.model.config)
        # Where gates choose, no mixture is set.
        if chunk.weights or not self.model.expert_names:
            self.mixing.use((chunk.weights,))
        else:
            self.mixing.end()
        ids = torch.tensor([list(chunk.tokens)], device=self.model.device)
        names = inspect.signature(self.model.forward).parameters
        holds = "cache_params" if "cache_params" in names else "past_key_values"
        # There is no padding, so no mask: some states would take one for the tokens of this pass.
        logits = self.model(input_ids=ids, use_cache=True, **{holds: self.cache}).logits[0]
        return [(logits if chunk.wants_all else logits[-1:]).float()]

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Do nothing: there is one row."""

    def swap(self, one: int, other: int, n_tokens: int) -> None:
        """Do nothing: there is one row."""

    def copy_out(self, row: int, n_tokens: int) -> tuple[torch.Tensor, ...]:
        """Give nothing."""
        return ()

    def copy_in(self, row: int, kept: Kept, n_tokens: int) -> None:
        """Do nothing: nothing is ever kept."""

    def clear(self) -> None:
        """Forget the row."""
        self.mixing.end()
        self.cache = None


def make_batch(model: RoutedModel, most_rows: int, context: int | None) -> Batch:
    """Choose how a model is asked: many rows in a pass if that gives what one row alone gives, else one at a time."""
    mixing = Mixing(model)
    solo = SoloBatch(model, mixing)
    if model.combine != "parameters" or model.gating is not None or most_rows == 1:
        return solo
    if (cache := slot_cache(model, context)) is None:
        return solo
    batch = SlotBatch(model, cache, most_rows, mixing)
    return batch if _agrees(batch, solo) else solo


def _agrees(batch: SlotBatch, solo: SoloBatch) -> bool:
    """Try two prompts of different lengths together and alone, each with one token more.

    There is no list of architectures: what a model makes of positions and masks of its caller's is seen best this way.
    """
    n_ids = count_ids(batch.model)
    dense = (0.0,) * len(batch.model.expert_names)
    prompts = [[(7 * at + n) % n_ids for at in range(n)] for n in _PROBED]
    rounds = [
        [Chunk(prompt, 0, dense) for prompt in prompts],
        [Chunk([n % n_ids], n, dense) for n in _PROBED],
    ]
    try:
        together = [batch.run(0, chunks) for chunks in rounds]
        alone = [[solo.run(0, [rounds[n][row]])[0] for n in range(len(rounds))] for row in range(len(prompts))]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError):
        return False
    finally:
        batch.clear()
        solo.clear()
    pairs = [(together[n][row], alone[row][n]) for row in range(len(prompts)) for n in range(len(rounds))]
    return all(bool((one - other).norm() <= _NEAR * other.norm()) for one, other in pairs)


def count_ids(model: RoutedModel) -> int:
    """Count the token ids that a model takes."""
    table: Any = model.get_input_embeddings().weight
    return int(table.shape[0])


def _kept(chunks: Sequence[Chunk], longest: int) -> tuple[list[int], list[list[int]]]:
    """Choose the columns whose logits are computed, for all rows alike, and where each row finds its own among them."""
    wanted = [list(range(len(chunk.tokens))) if chunk.wants_all else [len(chunk.tokens) - 1] for chunk in chunks]
    kept = sorted({column for columns in wanted for column in columns})
    if kept == list(range(longest)):
        return kept, wanted
    place = {column: at for at, column in enumerate(kept)}
    return kept, [[place[column] for column in columns] for columns in wanted]
