"""What a module computes from its parameters, which decides whether they can be mixed for each row.

There is no list of architectures: subclasses of linear layers and embeddings, which scale their output or multiply in
another way, are tried with a few random numbers.
"""

from __future__ import annotations

import inspect
from copy import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Form = Literal["linear", "transposed", "lookup", "vectors"]
"""x · Wᵀ + b; x · W + b, as GPT-2's Conv1D; rows of W, scaled or not; a module of vectors alone, such as a norm."""
_ROWS, _COLUMNS = 5, 3


def form_of(module: nn.Module) -> Form | None:
    """Tell how the parameters of a module are mixed; None where they cannot be. The module may be on `meta`."""
    own = dict(module.named_parameters(recurse=False))
    if not own or next(module.children(), None) is not None:
        return None
    if _is_conv1d(module):
        return "transposed"
    if isinstance(module, nn.Linear):
        return "linear" if type(module) is nn.Linear or _is_linear(module) else None
    if isinstance(module, nn.Embedding):
        return "lookup" if type(module) is nn.Embedding or _is_lookup(module) else None
    is_vectors = all(parameter.ndim == 1 for parameter in own.values()) and _takes_one(module)
    return "vectors" if is_vectors else None


def call_with(
    module: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    forward: Callable[[torch.Tensor], Any] | None = None,
) -> torch.Tensor:
    """Call a module, or a `forward` of it, with other tensors in place of some of its parameters."""
    # What torch.func.functional_call does, without its walk over the module: it runs for every norm of every token.
    own = module._parameters
    kept = dict(own)
    try:
        own.update(parameters)  # type: ignore[arg-type]
        return (forward or module)(x)  # type: ignore[no-any-return]
    finally:
        own.update(kept)


def takes_rows(module: nn.Module) -> bool:
    """Tell whether a module of vectors [n] computes the same with a vector for each row, [rows, 1, n]."""
    parameters = dict(module.named_parameters(recurse=False))
    like = next(iter(parameters.values()))
    generator = torch.Generator().manual_seed(0)
    x, *drawn = torch.randn(1 + len(parameters), 2, 3, like.shape[-1], generator=generator).to(like).unbind()
    rows = {name: values[:, :1] for name, values in zip(parameters, drawn, strict=True)}
    try:
        together = call_with(module, rows, x)
    except RuntimeError:
        return False
    single = [call_with(module, {n: v[row, 0] for n, v in rows.items()}, x[row : row + 1]) for row in range(2)]
    return together.shape == x.shape and bool(torch.allclose(together, torch.cat(single), atol=1e-6))


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def _is_linear(module: nn.Linear) -> bool:
    shapes = {"weight": (_ROWS, _COLUMNS), "bias": (_ROWS,)}
    small = _small(module, {name: shapes[name] for name, own in module._parameters.items() if own is not None})
    x = torch.randn(2, 4, _COLUMNS, generator=torch.Generator().manual_seed(1))
    found = _answer(small, x)
    return found is not None and _same(found, functional.linear(x, small.weight, small.bias))


def _is_lookup(module: nn.Embedding) -> bool:
    """Tell whether rows looked up beforehand, in a table of their own, give the same."""
    small = _small(module, {"weight": (_ROWS, _COLUMNS)})
    ids = torch.tensor([[1, 4, 1], [0, 2, 4]])
    rows = small.weight.detach()[ids].flatten(0, 1)
    found = _answer(small, ids)
    alone = _answer(small, torch.arange(len(rows)).view(ids.shape), {"weight": rows})
    return found is not None and alone is not None and _same(found, alone)


def _small(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Any:  # noqa: ANN401 - any kind of module
    """Copy a module with few random numbers for parameters and buffers, whatever device it is on."""
    generator = torch.Generator().manual_seed(0)
    small: Any = copy(module)
    own: dict[str, nn.Parameter | None] = dict.fromkeys(module._parameters)
    own |= {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    buffers = {
        name: None if buffer is None else torch.rand(buffer.shape, generator=generator)
        for name, buffer in module._buffers.items()
    }
    small.__dict__ |= {"_parameters": own, "_buffers": buffers, "padding_idx": None}
    return small


def _answer(
    module: nn.Module, x: torch.Tensor, parameters: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor | None:
    try:
        with torch.no_grad():
            found = call_with(module, parameters or {}, x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        return None
    return found if isinstance(found, torch.Tensor) else None


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool(torch.allclose(found, expected, atol=1e-6))
