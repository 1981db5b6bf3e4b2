"""What a plan of a heterogeneous Mixture of Experts knows: headers, configs and vocabularies, no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.vocabulary import Vocabulary
    from mediator_cli.checkpoint.write import NewTensor
    from mediator_cli.moe.heterogeneous.bodies import Body
    from mediator_cli.recipe.heterogeneous import LoadedHeterogeneous


@dataclass(frozen=True)
class PlannedExpert:
    """One expert: its checkpoint, its parts, its place in the shared width, and its rows of the output's tokens.

    `rows` [tokens of the output] are numbers of its own rows, -1 where it has none.
    """

    name: str
    source: Checkpoint
    body: Body
    vocabulary: Vocabulary = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    start: int = 0
    prompts: Path | None = None

    def info(self, name: str) -> TensorInfo:
        """Say where one of its stored tensors lies."""
        return self.source.tensors[name]


@dataclass(frozen=True)
class HeterogeneousPlan:
    """All that will be written: tensors by name, in order, and where each comes from.

    `copied` gives expert and stored name of the tensors of the bodies; all others are made. `vocabulary` is the
    output's, `adds_tokens` tells whether the tokenizer's files have to be changed for it.
    """

    loaded: LoadedHeterogeneous
    experts: tuple[PlannedExpert, ...]
    vocabulary: Vocabulary = field(repr=False)
    adds_tokens: bool
    width: int
    tensors: tuple[NewTensor, ...] = field(repr=False)
    copied: Mapping[str, tuple[PlannedExpert, str]] = field(repr=False)
    is_tied: bool
    dtype: str
    router_init: str
    notices: tuple[str, ...] = ()

    @property
    def owner(self) -> PlannedExpert:
        """The expert whose tokenizer is the output's."""
        return next(e for e in self.experts if e.name == self.loaded.recipe.tokenizer_of)

    @property
    def n_tokens(self) -> int:
        """Rows of the shared embedding."""
        return self.vocabulary.end

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    def tensor(self, name: str) -> NewTensor | None:
        """Find a tensor that will be written."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)
