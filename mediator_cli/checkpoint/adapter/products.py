"""From factors as PEFT stores them to products for the rows of the base's tensors as they are stored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.adapter.changes import Magnitude, Product, Window
from mediator_cli.checkpoint.layout import place_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mediator_cli.checkpoint.adapter.pairs import Pair
    from mediator_cli.checkpoint.adapter.places import Landing
    from mediator_cli.checkpoint.header import TensorInfo


def stored_flipped(base: Mapping[str, TensorInfo]) -> dict[str | None, bool]:
    """Say of each layer whether its linear weights are stored [in, out], as the Conv1D of GPT-2 is.

    A bias has as many entries as the layer has outputs. Layers without a bias that could tell are left out.
    """
    found: dict[str | None, bool] = {}
    for name, info in base.items():
        bias = base.get(f"{name.removesuffix('.weight')}.bias") if name.endswith(".weight") else None
        if bias is not None and len(info.shape) == 2 and info.shape[0] != info.shape[1]:
            found.setdefault(place_of(name).layer, bias.shape == info.shape[1:])
    return found


def stacked_flipped(
    pairs: Iterable[Pair], landings: Mapping[str, tuple[Landing, ...]], base: Mapping[str, TensorInfo]
) -> bool | None:
    """Say whether PEFT took the experts of this adapter as stored [in, out]; None where no shape can tell.

    Versions of PEFT and classes of transformers differ in this, but not within one adapter.
    """
    votes = {
        landing.rows is None and base[landing.name].shape == (pair.n_experts, *pair.shape[:0:-1])
        for pair in pairs
        for landing in landings.get(pair.tensor, ())
        if pair.n_experts > 1 and not pair.is_square
    }
    return votes.pop() if len(votes) == 1 else None


def make_products(pair: Pair, landing: Landing, shape: tuple[int, ...], is_flipped: bool) -> tuple[Product, ...] | None:
    """Give the products for the rows of a tensor of this shape; None where they do not fit it.

    `is_flipped` tells of a square matrix, and of stacked experts, whether they are stored [in, out].
    """
    if pair.n_experts > 1:
        return _split_experts(pair, landing) if landing.rows is not None else _stacked_experts(pair, shape, is_flipped)
    if landing.rows is not None:
        fits = pair.shape[0] == landing.rows and pair.shape[-1] == shape[-1]
        return (_matrix(pair, at=landing.at),) if fits and _has_length(pair, pair.shape[0]) else None
    rows_first = shape == pair.shape or shape == (1, *pair.shape)
    if pair.is_embedding:
        return (_matrix(pair, is_flipped=True),) if rows_first and _has_length(pair, shape[1]) else None
    columns_first = len(shape) == 2 and shape == pair.shape[::-1]
    if not (rows_first or columns_first) or not _has_length(pair, pair.shape[0]):
        return None
    return (_matrix(pair, is_flipped=columns_first and (is_flipped or not rows_first)),)


def _has_length(pair: Pair, count: int) -> bool:
    return pair.magnitude is None or pair.magnitude.size == count


def _matrix(pair: Pair, *, at: int = 0, is_flipped: bool = False) -> Product:
    """Make B·A, or its transposed: PEFT's factors of embeddings have the tokens as columns of A."""
    rank, width = pair.a.shape[0], math.prod(pair.a.shape[1:])
    magnitude = Magnitude(pair.magnitude, is_flipped) if pair.magnitude else None
    a, b = Window(pair.a, width, 0, rank), Window(pair.b, rank, 0, pair.b.shape[0])
    return _product(a, b, pair.scale, at, is_flipped, magnitude)


def _product(
    a: Window, b: Window, scale: float, at: int, is_flipped: bool, magnitude: Magnitude | None = None
) -> Product:
    left, right = (_flip(a), _flip(b)) if is_flipped else (b, a)
    return Product(left, right, scale, at, magnitude)


def _flip(window: Window) -> Window:
    return Window(window.info, window.width, window.top, window.bottom, window.left, window.step, is_flipped=True)


def _expert(pair: Pair, number: int, first: int, last: int) -> tuple[Window, Window]:
    """Cut A and rows `first` to `last` of B of one expert out: A has its experts in turn, B has them interleaved."""
    a = Window(pair.a, pair.a.shape[1], number * pair.rank, (number + 1) * pair.rank)
    return a, Window(pair.b, pair.b.shape[1], first, last, number, pair.n_experts)


def _split_experts(pair: Pair, landing: Landing) -> tuple[Product, ...] | None:
    """Give the one expert, or half of it, that the base holds as a tensor of its own."""
    number, first = divmod(landing.first, pair.b.shape[0])
    last = first + (landing.rows or 0)
    if last > pair.b.shape[0]:
        return None
    return (_product(*_expert(pair, number, first, last), pair.scale, landing.at, is_flipped=False),)


def _stacked_experts(pair: Pair, shape: tuple[int, ...], is_flipped: bool) -> tuple[Product, ...] | None:
    n_out, n_in = pair.shape[1:]
    if shape != ((pair.n_experts, n_in, n_out) if is_flipped else pair.shape):
        return None
    return tuple(
        _product(*_expert(pair, number, 0, n_out), pair.scale, number * shape[1], is_flipped)
        for number in range(pair.n_experts)
    )
