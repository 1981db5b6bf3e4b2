"""Between the width of the shared embedding and that of an expert: an MLP, with or without a path past it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.activations import ACT2FN

from mediator_cli.checkpoint.heterogeneous import layer_sizes

if TYPE_CHECKING:
    from mediator_cli.moe.heterogeneous.configuration import ProjectorConfig


class Projector(nn.Module):
    """`proj(x) = keep(x) + mlp(x)` for states x [..., from]; gives [..., to].

    `keep` cuts the part of x at `start` out, or puts x there among zeros; without `config.skip` it is left out.
    """

    def __init__(self, config: ProjectorConfig, sizes: tuple[int, int], start: int) -> None:
        super().__init__()
        self.skip, self.start, self.sizes = config.skip, start, sizes
        self.activation = ACT2FN[config.activation]
        self.layers = nn.ModuleList(
            nn.Linear(first, second) for first, second in layer_sizes(sizes, config.depth, config.width)
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Project states [..., from] to [..., to]."""
        found = states
        for number, layer in enumerate(self.layers):
            found = layer(found if number == 0 else self.activation(found))
        return found + self._keep(states) if self.skip else found

    def _keep(self, states: torch.Tensor) -> torch.Tensor:
        wide, narrow = self.sizes
        if wide >= narrow:
            return states[..., self.start : self.start + narrow]
        return nn.functional.pad(states, (self.start, narrow - wide - self.start))
