"""Stored arrays as torch tensors, for those who compute with a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mediator_cli.checkpoint.read import open_files, read_slab

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mediator_cli.checkpoint.header import TensorInfo

_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


def as_tensor(stored: NDArray[Any], dtype: str) -> torch.Tensor:
    """See a stored array of a dtype such as BF16 as a tensor; shares its memory."""
    tensor = torch.from_numpy(stored)
    return tensor.view(_HALVES[dtype]) if dtype in _HALVES else tensor


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Read a tensor in its own dtype and shape; raise CheckpointError when its file does not give it."""
    with open_files([info.file]) as descriptors:
        return as_tensor(read_slab(descriptors, info, 0, info.size), info.dtype).view(info.shape)
