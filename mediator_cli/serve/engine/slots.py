"""Keys and values of many rows, each in a place of its own: rows come and go without moving those of others.

A row's tokens lie from column 0 on; what lies behind them is never looked at. The rows of a pass are neighbours, so the
model reads them without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_STEP = 256
"""Columns are added in steps of at least this many, and then by doubling."""


@dataclass
class Window:
    """What a pass reads and writes: rows `first` and following, at positions [rows, tokens]; `width` columns count."""

    first: int
    positions: torch.Tensor
    width: int
    n_rows: int
    n_columns: int

    @property
    def rows(self) -> slice:
        """The rows of the pass."""
        return slice(self.first, self.first + len(self.positions))


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [rows, heads, columns, size]."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room of zeros: a masked NaN would still be NaN, and pages of zeros that nobody wrote cost nothing."""
        self.keys = _room(key_states, self.window)
        self.values = _room(value_states, self.window)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [rows, heads, tokens, size] at the window's positions; give all columns that count."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        keys, values = self.arrays
        return _put(keys, key_states, window), _put(values, value_states, window)

    @property
    def arrays(self) -> tuple[torch.Tensor, ...]:
        """Give keys and values; nothing before the first pass."""
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    def forget(self) -> None:
        """Give the memory back."""
        self.keys = self.values = None
        self.is_initialized = False

    def resize(self, window: Window) -> None:
        """Move what is held into larger or smaller room."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = _moved(self.keys, window), _moved(self.values, window)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tell how many columns the model sees; masks are made by the caller."""
        return self.window.width, 0

    def get_seq_length(self) -> int:
        """Tell how many columns were written before the pass, at least; positions are given by the caller."""
        return self.window.width - self.window.positions.shape[1]

    def get_max_length(self) -> int:
        """Tell that there is no limit."""
        return -1


class SlotCache(Cache):
    """Keys and values of all layers, one window for all of them."""

    def __init__(self, n_layers: int, device: torch.device) -> None:
        self.window = Window(0, torch.zeros(0, 1, dtype=torch.long, device=device), 0, 1, _STEP)
        self.slots = [SlotLayer(self.window) for _ in range(n_layers)]
        super().__init__(layers=list(self.slots))

    def look_at(self, first: int, positions: torch.Tensor) -> None:
        """Say which rows the next pass is for, with the positions [rows, tokens] of its tokens; room is made."""
        width = int(positions.max()) + 1
        self.make_room(first + len(positions), width)
        self.window.first, self.window.positions, self.window.width = first, positions, width

    def make_room(self, n_rows: int, n_columns: int) -> None:
        """Grow until there are this many rows and columns."""
        window = self.window
        if n_rows <= window.n_rows and n_columns <= window.n_columns:
            return
        window.n_rows = max(n_rows, window.n_rows)
        if n_columns > window.n_columns:
            window.n_columns = max(2 * window.n_columns, -(-n_columns // _STEP) * _STEP)
        for layer in self.slots:
            layer.resize(window)

    def clear(self) -> None:
        """Give all memory back."""
        self.window.n_rows, self.window.n_columns = 1, _STEP
        for layer in self.slots:
            layer.forget()

    def swap(self, one: int, other: int, width: int) -> None:
        """Exchange two rows up to a column."""
        for held in self._arrays():
            kept = held[one, :, :width].clone()
            held[one, :, :width] = held[other, :, :width]
            held[other, :, :width] = kept

    def move(self, source: int, target: int, width: int) -> None:
        """Put one row in place of another, up to a column."""
        for held in self._arrays():
            held[target, :, :width] = held[source, :, :width]

    def copy_out(self, row: int, n_tokens: int) -> tuple[torch.Tensor, ...]:
        """Copy the first tokens of a row: keys and values [heads, tokens, size] of all layers in turn."""
        return tuple(held[row, :, :n_tokens].clone() for held in self._arrays())

    def copy_in(self, row: int, kept: tuple[torch.Tensor, ...], n_tokens: int) -> None:
        """Write what `copy_out` gave, up to some tokens, into a row."""
        self.make_room(row + 1, n_tokens)
        if not self._arrays():
            for layer, keys, values in zip(self.slots, kept[::2], kept[1::2], strict=True):
                layer.lazy_initialization(keys[None], values[None])
        for held, array in zip(self._arrays(), kept, strict=True):
            held[row, :, :n_tokens] = array[:, :n_tokens]

    def _arrays(self) -> list[torch.Tensor]:
        return [held for layer in self.slots for held in layer.arrays]


def slot_cache(model: Any, context: int | None) -> SlotCache | None:  # noqa: ANN401 - models differ
    """Make the cache of a model that reads so many tokens at most.

    None where some layer keeps other things than the keys and values of all tokens.
    """
    layers = DynamicCache(config=model.config).layers
    if not layers or not all(_keeps_all(layer, context) for layer in layers):
        return None
    return SlotCache(len(layers), model.device)


def _keeps_all(layer: object, context: int | None) -> bool:
    """Whether a layer looks at all tokens: one with a window does while there are no more tokens than it spans."""
    if type(layer) is DynamicLayer:
        return True
    return isinstance(layer, DynamicSlidingWindowLayer) and context is not None and context <= layer.sliding_window


def _room(like: torch.Tensor, window: Window) -> torch.Tensor:
    return like.new_zeros(window.n_rows, like.shape[1], window.n_columns, like.shape[3])


def _moved(held: torch.Tensor, window: Window) -> torch.Tensor:
    larger = _room(held, window)
    larger[: held.shape[0], :, : held.shape[2]] = held
    return larger


def _put(held: torch.Tensor, given: torch.Tensor, window: Window) -> torch.Tensor:
    rows = torch.arange(window.first, window.first + len(given), device=held.device)
    held[rows[:, None], :, window.positions] = given.transpose(1, 2)
    return held[window.rows, :, : window.width]
