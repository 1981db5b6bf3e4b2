"""Spherical interpolation between two experts."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mediator_cli.methods.registry import Slab, Sum, always, merge_method, over_tensor


def _gram(slab: Slab) -> torch.Tensor:
    wide = slab.inputs.double()
    return torch.stack([(wide[i] * wide[j]).sum() for i, j in ((0, 0), (0, 1), (1, 1))])


@merge_method(
    space="weight",
    reference="https://doi.org/10.1145/325165.325242",
    statistics=(Sum("gram", _gram, over_tensor, always),),
    n_inputs=(2, 2),
    symmetric=False,
    uses_weights=False,
)
def slerp(
    tensors: torch.Tensor,
    weights: torch.Tensor,
    *,
    t: Annotated[float, Field(ge=0, le=1, description="0 gives the first expert, 1 the second.")] = 0.5,
    dot_threshold: Annotated[
        float, Field(gt=0, le=1, description="Interpolate linearly above this |cosine|.")
    ] = 0.9995,
    gram: torch.Tensor | None = None,
) -> torch.Tensor:
    """Interpolate two experts along the great circle between them, each tensor as one vector.

    (sin((1-t)θ)·W₁ + sin(tθ)·W₂) / sin θ with θ the angle between the tensors. Two fine-tunes of one base are
    nearly parallel, so most tensors fall under the threshold and are interpolated linearly.

    >>> slerp(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2), t=1.0)
    tensor([0., 1.])
    """
    first, cross, second = (_gram_of(tensors) if gram is None else gram).tolist()
    norms = [first**0.5 if first**0.5 > 1e-8 else 1.0, second**0.5 if second**0.5 > 1e-8 else 1.0]
    cosine = max(-1.0, min(1.0, cross / (norms[0] * norms[1])))
    if abs(cosine) > dot_threshold:
        return tensors[0] * (1 - t) + tensors[1] * t
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    near, far = (torch.sin(torch.stack([(1 - t) * angle, t * angle])) / torch.sin(angle)).float()
    merged: torch.Tensor = tensors[0] * near + tensors[1] * far
    return merged


def _gram_of(tensors: torch.Tensor) -> torch.Tensor:
    return _gram(Slab(tensors, torch.ones(2), {}, {}, None))
