"""An adapter that stays low-rank: the factors of each matrix that it changes, and what of it is no product of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.adapter.read import read_window
from mediator_cli.checkpoint.read import open_files
from mediator_cli.errors import CheckpointError, Problem, some_names
from mediator_cli.kernels.factors import Factors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.adapter.changes import Change, Product
    from mediator_cli.checkpoint.adapter.open import Adapter
    from mediator_cli.checkpoint.read import Handle

_PLAIN = "leave that out of the training, or make a plain adapter of it: mediator extract-lora BASE ADAPTER -o DIR"


def read_factors(adapter: Adapter) -> dict[str, Factors]:
    """Read all factors of a plain LoRA adapter by the base's tensor names, in float32; a and b as the base lies.

    Tensors of several products, such as fused ones, get one pair whose rank is the sum. Raises CheckpointError, with
    every reason, for what two small matrices do not hold: DoRA, biases, saved modules, trained tokens; and for NaN.
    """
    if problems := list(not_factors(adapter)):
        raise CheckpointError(problems)
    found: dict[str, Factors] = {}
    with open_files([adapter.file]) as handles:
        for name, change in adapter.changes.items():
            found[name] = read_change(handles, change)
            if not (np.isfinite(found[name].a).all() and np.isfinite(found[name].b).all()):
                message = "holds NaN or infinite values"
                raise CheckpointError(Problem(f"{adapter.file}: {name}", message, "train or fetch the adapter again"))
    return found


def read_change(handles: Mapping[Path, Handle], change: Change) -> Factors:
    """Read the factors of one tensor of a plain LoRA adapter, from its open file; NaN stays."""
    return _join([_read(handles, product, change) for product in change.products])


def not_factors(adapter: Adapter) -> Iterator[Problem]:
    """Say what of an adapter is no product of two small matrices; nothing for a plain LoRA adapter."""
    kinds: dict[str, list[str]] = {}
    for name, change in adapter.changes.items():
        for kind in _beside_products(change):
            kinds.setdefault(kind, []).append(name)
    for kind, names in kinds.items():
        message = f"{kind} ({some_names(names)}), which low-rank factors do not hold"
        yield Problem(str(adapter.path), message, _PLAIN)


def _beside_products(change: Change) -> Iterator[str]:
    if any(product.magnitude for product in change.products):
        yield "is a DoRA adapter"
    if change.whole is not None:
        yield "holds whole tensors (modules_to_save, or save_embedding_layers of PEFT's save_pretrained)"
    if change.shift is not None:
        yield "has trained biases"
    if change.rows is not None:
        yield "has trained rows of single tokens"
    if len(change.shape) != 2 and change.products:
        yield f"changes tensors of {len(change.shape)} dimensions"


def _read(handles: Mapping[Path, Handle], product: Product, change: Change) -> Factors:
    """Read one product; rows of the tensor that it leaves alone are zeros of b."""
    left = read_window(handles, product.left).astype(np.float32)
    b = np.zeros((change.shape[0], left.shape[1]), np.float32)
    b[product.at : product.at + product.n_rows] = left
    a = np.ascontiguousarray(read_window(handles, product.right), np.float32)
    return Factors(a, b, product.scale)


def _join(parts: list[Factors]) -> Factors:
    if len(parts) == 1:
        return parts[0]
    b = np.concatenate([np.float32(part.scaling) * part.b for part in parts], axis=1)
    return Factors(np.concatenate([part.a for part in parts]), b)
