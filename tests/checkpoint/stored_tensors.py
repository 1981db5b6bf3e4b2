"""Stored tensors as torch holds them, read by us."""

import numpy as np
import torch

from mediator_cli.checkpoint.read import read_slab
from mediator_cli.checkpoint.torch_file import DTYPES

BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def read_stored(descriptors, info):
    """Read a whole tensor in its own dtype and shape."""
    found = torch.empty(info.shape, dtype=BY_NAME[info.dtype])
    found.view(-1).view(torch.uint8).numpy()[:] = read_slab(descriptors, info, 0, info.size).view(np.uint8)
    return found


def as_bytes(tensor):
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
