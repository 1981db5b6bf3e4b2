"""The plan as data: every output tensor exactly once, with its method and parameters resolved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.layout import layers_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.spans import Layout
    from mediator_cli.checkpoint.vocabulary import Vocabulary
    from mediator_cli.methods.registry import ResolvedMethod
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.router import RouterSpec
    from mediator_cli.recipe.schema import ValueCodec


@dataclass(frozen=True)
class ExpertSource:
    """One expert, opened: headers only. `layout` makes tensors under the base's names from its own."""

    name: str
    weight: float | tuple[float, ...]
    source: Checkpoint | Adapter
    prompts: Path | None = None
    layout: Layout = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def kind(self) -> Literal["lora", "full"]:
        """Whether the expert is an adapter or a full checkpoint."""
        return "lora" if isinstance(self.source, Adapter) else "full"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that are stored for this expert."""
        return self.source.tensors


@dataclass(frozen=True)
class ResolvedExtract:
    """How sparse experts of one tensor are made, after overrides and defaults; `rescale` multiplies kept values.

    With `over` = model, `density` is that of all such tensors of an expert together.
    """

    density: float
    over: Literal["tensor", "model"]
    select: Literal["magnitude", "random"]
    rescale: float
    values: ValueCodec


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor; `average` is None where it is the base's as it is: kept, or of no float dtype.

    `weights` are the experts' merge coefficients on this tensor, in recipe order. Only `mixable` ones
    differ by input in a routed unit; the others are averaged there too.
    """

    name: str
    unit: str
    shape: tuple[int, ...]
    size: int
    dtype: str
    average: ResolvedMethod | None
    extract: ResolvedExtract
    weights: tuple[float, ...]
    mixable: bool = True

    @property
    def can_be_routed(self) -> bool:
        """Whether experts keep a delta of it where its unit is routed."""
        return self.average is not None and self.mixable


@dataclass(frozen=True)
class Difference:
    """A setting in which the sources differ: whose value the bundle gets, and what the others say."""

    setting: str
    winner: str
    value: Any
    others: Mapping[str, Any]


@dataclass(frozen=True)
class TokenSettings:
    """What config.json and generation_config.json of the output say; `generation` is None where no source has one."""

    config: Mapping[str, Any] = field(repr=False)
    generation: Mapping[str, Any] | None = field(repr=False)
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All that a merge needs to know before the first tensor is read; `router` None = no router is fitted.

    `settings` are config and generation config of the output. `vocabulary` makes, by source (`base` or an expert), the
    tensors with a row per token in the output's order. `union` has the tokens that the base's tokenizer has to get.
    """

    loaded: LoadedRecipe
    base: Checkpoint
    experts: tuple[ExpertSource, ...]
    tensors: tuple[TensorPlan, ...]
    candidates: tuple[str, ...]
    listed: tuple[str, ...]
    tokenizer_folder: Path
    settings: TokenSettings
    differences: tuple[Difference, ...]
    notices: tuple[str, ...]
    router: RouterSpec | None = None
    vocabulary: Mapping[str, Layout] = field(default_factory=dict)
    union: Vocabulary | None = None

    @property
    def units(self) -> tuple[str, ...]:
        """All units of assignment, layers by their number."""
        return tuple(dict.fromkeys(tensor.unit for tensor in self.tensors))

    @property
    def layers(self) -> tuple[str, ...]:
        """The decoder layers found in the tensor names."""
        return layers_of(tensor.name for tensor in self.tensors)
