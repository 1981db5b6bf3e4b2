"""The next token of a row: from logits, by the row's own wishes and its own random numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mediator_cli.serve.engine.request import Draw


@dataclass
class Chooser:
    """Chooses the tokens of one row; `seen` counts those of its answer."""

    draw: Draw
    generator: torch.Generator | None
    seen: Counter[int] = field(default_factory=Counter)

    @property
    def is_plain(self) -> bool:
        """Whether the most probable token is taken, whatever was said before."""
        draw = self.draw
        return not (draw.temperature or draw.bias or draw.presence_penalty or draw.frequency_penalty)

    def choose(self, logits: torch.Tensor) -> int:
        """Choose a token by logits [vocabulary], float32; with the same seed the same one, whoever else is answered."""
        adjusted = self._adjusted(logits)
        token = int(adjusted.argmax()) if self.draw.temperature == 0 else self._drawn(adjusted)
        self.seen[token] += 1
        return token

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        draw = self.draw
        if self.is_plain or not (draw.bias or draw.presence_penalty or draw.frequency_penalty):
            return logits
        changed = logits.clone()
        for token, bias in draw.bias.items():
            changed[token] += bias
        for token, count in self.seen.items():
            changed[token] -= draw.presence_penalty + draw.frequency_penalty * count
        return changed

    def _drawn(self, logits: torch.Tensor) -> int:
        """Draw from the most probable tokens: the first `top_k`, and of them those that hold `top_p`."""
        draw = self.draw
        # In float64, so that the last of many small probabilities still count.
        scaled = (logits.double() - float(logits.max())) / draw.temperature
        if 0 < draw.top_k < len(scaled):
            scaled = scaled.masked_fill(scaled < scaled.topk(draw.top_k).values[-1], -torch.inf)
        probabilities = scaled.softmax(0)
        if draw.top_p >= 1:
            return int(torch.multinomial(probabilities, 1, generator=self.generator))
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        # The token that reaches the share is in; the first one always.
        kept = ordered.cumsum(0) - ordered < draw.top_p
        kept[0] = True
        at = int(torch.multinomial(ordered * kept, 1, generator=self.generator))
        return int(tokens[at])


def make_chooser(draw: Draw) -> Chooser:
    """Make the chooser of a row; without a seed its random numbers are the system's."""
    if draw.temperature == 0:
        return Chooser(draw, None)
    generator = torch.Generator()
    if draw.seed is None:
        generator.seed()
    else:
        # The generator takes 64 bits.
        generator.manual_seed(draw.seed % (1 << 63))
    return Chooser(draw, generator)
