"""The plan as data: every output tensor exactly once, with its method and parameters resolved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.layout import layers_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.adapter.pairs import Pair
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.spans import Layout
    from mediator_cli.checkpoint.vocabulary import Vocabulary
    from mediator_cli.methods.method import ResolvedMethod
    from mediator_cli.methods.statistics import Role
    from mediator_cli.plan.moe_plan import MoePlan
    from mediator_cli.plan.units import AlignPlan
    from mediator_cli.recipe.extract import ValueCodec
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.modes import ExtractMode
    from mediator_cli.recipe.router import RouterSpec


@dataclass(frozen=True)
class ExpertSource:
    """One expert, opened: headers only. `layout` makes tensors under the base's names from its own.

    `moments` has the second moments of those tensors that are merged by them.
    """

    name: str
    weight: float | tuple[float, ...]
    source: Checkpoint | Adapter
    prompts: Path | None = None
    layout: Layout = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    moments: Checkpoint | None = None

    @property
    def kind(self) -> Literal["lora", "full"]:
        """Whether the expert is an adapter or a full checkpoint."""
        return "lora" if isinstance(self.source, Adapter) else "full"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that are stored for this expert."""
        return self.source.tensors

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """All that is read for this expert: its tensors, and their second moments where these are needed."""
        return (*self.tensors.values(), *(self.moments.tensors.values() if self.moments else ()))


@dataclass(frozen=True)
class ResolvedExtract:
    """How sparse experts of one tensor are made, after overrides and defaults; `rescale` multiplies kept values.

    With `over` = model, `density` is that of all such tensors of an expert together. Other modes than sparse keep all
    entries, `values` are then those of shared arrays; `scale`, `mask_lambda` and `directions` belong to one mode each.
    """

    density: float
    over: Literal["tensor", "model"]
    select: Literal["magnitude", "random"]
    rescale: float
    values: ValueCodec
    mode: ExtractMode = "sparse"
    scale: Literal["elements", "tensors"] | None = None
    mask_lambda: float | None = None
    directions: int | None = None

    @property
    def n_shared(self) -> int:
        """Count the arrays that experts share."""
        return {"emr": 1, "tall_mask": 1, "basis": 1 + (self.directions or 0)}.get(self.mode, 0)

    @property
    def has_bits(self) -> bool:
        """Whether each expert keeps a bit an entry."""
        return self.mode in ("sign", "emr", "tall_mask")


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor; `average` is None where it is the base's as it is: kept, or of no float dtype.

    `weights` are the experts' merge coefficients on this tensor, in recipe order. Only `mixable` ones
    differ by input in a routed unit; the others are averaged there too. `role` tells tensors with a row per token.
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
    role: Role = "linear"

    @property
    def can_be_routed(self) -> bool:
        """Whether experts keep a delta of it where its unit is routed."""
        return self.average is not None and self.mixable


@dataclass(frozen=True)
class ModulePlan:
    """One module of an adapter that is made of adapters; `pairs` by expert, None where one leaves it as it is.

    `tensor` is the base's, or the first of them, that it changes. `weights` are the merge coefficients in recipe order.
    """

    name: str
    tensor: str
    pairs: tuple[Pair | None, ...]
    dtype: str
    average: ResolvedMethod
    weights: tuple[float, ...]

    @property
    def like(self) -> Pair:
        """A pair that has the form of all."""
        return next(pair for pair in self.pairs if pair is not None)


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
    With `modules` the output is an adapter of these, and `tensors` are those of the base that it changes.
    `inputs` makes, for layers that are stacked, what stands in for the base, and then the inputs of each tensor, the
    first with the first weight and so on; empty where these are the base and the experts. `chat_template` is written
    instead of the tokenizer's. `moe` is the MoE that is made of these dense tensors, when its layers are known.
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
    modules: tuple[ModulePlan, ...] = ()
    align: AlignPlan | None = None
    inputs: Mapping[str, Layout] = field(default_factory=dict)
    chat_template: str | None = None
    moe: MoePlan | None = None

    @property
    def n_inputs(self) -> int:
        """Count what is merged at most: all experts, or the sources of the largest slice."""
        return max(1, len(self.inputs) - 1) if self.inputs else len(self.experts)

    @property
    def n_rows(self) -> int:
        """Count what is read side by side: inputs, and second moments of experts that have them."""
        return self.n_inputs + sum(expert.moments is not None for expert in self.experts)

    @property
    def units(self) -> tuple[str, ...]:
        """All units of assignment, layers by their number."""
        return tuple(dict.fromkeys(tensor.unit for tensor in self.tensors))

    @property
    def layers(self) -> tuple[str, ...]:
        """The decoder layers found in the tensor names."""
        return layers_of(tensor.name for tensor in self.tensors)
