"""Keys and values of all experts while a text is generated, with the mixture that its prompt decided."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import Cache, DynamicCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig


class ExpertCaches(Cache):
    """One cache for each expert, which holds only the rows of the batch that the expert answers.

    `mixture` [rows, experts] is None before the first pass; `seen` is the number of tokens read.
    """

    def __init__(self, configs: Sequence[PreTrainedConfig]) -> None:
        super().__init__(layers=[])
        self.caches = [DynamicCache(config=config) for config in configs]
        self.mixture: torch.Tensor | None = None
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens read."""
        return self.seen

    def reset(self) -> None:
        """Forget all."""
        self.mixture, self.seen = None, 0
        for cache in self.caches:
            cache.reset()

    def crop(self, *lengths: Any, **options: Any) -> None:  # noqa: ANN401 - as in transformers
        """Refuse: experts may hold states that cannot be cut."""
        raise NotImplementedError("assisted generation is not possible with this model; generate without it")

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row n be what row `beam_idx[n]` was, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.mixture is not None:
            rows = torch.arange(len(self.mixture), device=self.mixture.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Let row n be what row `indices[n]` was."""
        if self.mixture is None:
            return
        for expert, cache in enumerate(self.caches):
            held = torch.cumsum(self.mixture[:, expert] > 0, dim=0) - 1
            wanted = indices[self.mixture[indices, expert] > 0]
            for layer in cache.layers if len(wanted) else ():
                if getattr(layer, "is_initialized", True):
                    layer.reorder_cache(cast("torch.LongTensor", held[wanted]))
        self.mixture = self.mixture[indices]
