"""What a recipe may say: form only. What it means for given checkpoints is checked by `plan`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from mediator_cli.recipe.router import RouterSpec
from mediator_cli.recipe.strict import Finite, Fraction, Strict

Unit = Literal["layer", "block", "tensor"]
Measure = Literal["sign", "any_sign", "cosine"]
Rule = Literal["none", "all", "threshold", "top_k", "mean_std", "listed"]
ValueCodec = Literal["fp32", "bf16", "fp16", "int8", "sign"]
OutputDtype = Literal["base", "float32", "float16", "bfloat16"]

ExpertName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$",
        description="Unique name; letters, digits, - and _. It becomes a file name in the bundle.",
    ),
]

RESERVED_NAMES = ("base", "dense", "auto", "router")
"""Names that mean something else where an expert is named at run time."""


class ExpertSpec(Strict):
    """One fine-tune of the base: a full checkpoint or a LoRA adapter."""

    name: ExpertName
    model: Annotated[str, Field(min_length=1, description="Folder of a checkpoint or of a PEFT LoRA adapter.")]
    weight: Annotated[Finite, Field(description="Merge coefficient of this expert.")] = 1.0
    prompts: Annotated[
        str | None, Field(description="JSON lines with a `prompt` each; the router is fitted on them.")
    ] = None


class DenoiseSpec(Strict):
    """Which small entries of a delta are left out when conflict is counted; `none` or one of the two."""

    keep_above_std: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="Keep entries further from the mean than this many deviations."),
    ] = None
    top_fraction: Annotated[
        Fraction | None, Field(description="Keep this fraction of each tensor, the largest by magnitude.")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _none_is_empty(cls, data: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the file holds
        return {} if data == "none" else data

    @model_validator(mode="after")
    def _one_at_most(self) -> DenoiseSpec:
        if self.keep_above_std is not None and self.top_fraction is not None:
            raise ValueError("give keep_above_std or top_fraction, not both")
        return self


class ConflictSpec(Strict):
    """How disagreement between experts is measured."""

    measure: Annotated[
        Measure,
        Field(
            description="Score that the assignment uses: `sign` = share of opposite signs, mean over pairs; "
            "`any_sign` = share of entries where any two disagree; `cosine` = (1 - cosine) / 2, mean over pairs."
        ),
    ] = "sign"
    denoise: DenoiseSpec = DenoiseSpec(keep_above_std=1.0)
    unit: Annotated[
        Unit, Field(description="What is averaged or routed as a whole: a decoder layer, a block of it, or a tensor.")
    ] = "layer"


RULE_FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "all": ("candidates",),
    "threshold": ("threshold", "candidates"),
    "top_k": ("k", "candidates"),
    "mean_std": ("std", "candidates"),
    "listed": ("units",),
}
"""The fields of `assign` that each rule takes."""


class AssignSpec(Strict):
    """Which units are routed; the others are averaged."""

    rule: Annotated[
        Rule,
        Field(
            description="none: average all. all: route all candidates. threshold: score > threshold. "
            "top_k: the k highest scores. "
            "mean_std: score > mean + std deviations. listed: the units named."
        ),
    ] = "mean_std"
    threshold: Annotated[
        float | None, Field(ge=0, le=1, allow_inf_nan=False, description="Score above which a unit is routed.")
    ] = None
    k: Annotated[int | None, Field(ge=0, description="Number of units that are routed.")] = None
    std: Annotated[Finite | None, Field(description="Deviations above the mean; default 0.")] = None
    units: Annotated[
        tuple[str, ...] | None, Field(strict=False, description="Unit names or globs, for rule `listed`.")
    ] = None
    candidates: Annotated[
        Literal["layers", "all"] | None,
        Field(
            description="layers: only decoder layers may be routed. all: embedding, final norm and head too. "
            "Default: all for rule `all`, else layers."
        ),
    ] = None

    @model_validator(mode="after")
    def _fields_fit_rule(self) -> AssignSpec:
        allowed = RULE_FIELDS[self.rule]
        given = self.model_fields_set - {"rule"}
        if extra := sorted(given - set(allowed)):
            raise ValueError(f"rule '{self.rule}' takes no {', '.join(extra)}")
        for name in ("threshold", "k", "units"):
            if name in allowed and getattr(self, name) is None:
                raise ValueError(f"rule '{self.rule}' needs {name}")
        return self


class AverageSpec(BaseModel):
    """A merge method and its parameters; which parameters exist is the method's business."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    method: Annotated[str, Field(description="Name of a merge method; `mediator methods` lists them.")] = "linear"
    preset: Annotated[str | None, Field(description="Named defaults of the method, such as `mergekit`.")] = None

    @property
    def params(self) -> dict[str, Any]:
        """The method's own parameters as written."""
        return dict(self.model_extra or {})


Rescale = Annotated[
    bool | Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
    Field(
        description="Multiply kept values by this number, to make up for what is not kept; true = 1 / density, "
        "false = 1. Default: 1 / density when selected at random, else density ** -0.4, which measured best."
    ),
]


class ExtractSpec(Strict):
    """How the experts of routed units are stored: one dense expert and a sparse delta for each."""

    dense: Annotated[
        Literal["average", "base"], Field(description="The dense expert: the merged tensor or the base's.")
    ] = "average"
    density: Annotated[Fraction, Field(description="Share of the entries of each tensor that are kept.")] = 0.05
    select: Annotated[Literal["magnitude", "random"], Field(description="Which entries are kept.")] = "magnitude"
    rescale: Rescale = None
    values: Annotated[ValueCodec, Field(description="How kept values are stored.")] = "sign"


class OverrideExtract(Strict):
    """The extract fields that an override may set."""

    density: Fraction | None = None
    select: Literal["magnitude", "random"] | None = None
    rescale: Rescale = None
    values: ValueCodec | None = None


class OverrideSpec(Strict):
    """Other settings for the tensors whose name matches a glob; later overrides win."""

    match: Annotated[str, Field(min_length=1, description="Glob on tensor names, such as `*.self_attn.*`.")]
    average: AverageSpec | None = None
    extract: OverrideExtract | None = None

    @model_validator(mode="after")
    def _sets_something(self) -> OverrideSpec:
        if self.average is None and self.extract is None:
            raise ValueError("an override needs average or extract")
        return self


_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str | int) -> int:
    """Read a number of bytes such as `5GB`, `512MiB` or `1000`; raise ValueError for anything else.

    >>> parse_size("5GB"), parse_size("1.5 KiB"), parse_size(7)
    (5000000000, 1536, 7)
    """
    raw = str(text).strip()
    digits = raw.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = raw[len(digits) :].strip().upper()
    try:
        size = float(digits) * _SIZE_UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"'{text}' is not a size; write 5GB, 512MiB or a number of bytes") from None
    if not math.isfinite(size) or size < 1:
        raise ValueError(f"'{text}' is not a size of at least one byte")
    return int(size)


class OutputSpec(Strict):
    """Where and how the bundle is written."""

    path: Annotated[
        str | None, Field(description="Folder of the bundle; default: a folder named after the recipe.")
    ] = None
    dtype: Annotated[OutputDtype, Field(description="base: each tensor keeps the base's dtype.")] = "base"
    shard_size: Annotated[int | str, Field(description="Largest size of one safetensors file.")] = "5GB"

    @field_validator("shard_size")
    @classmethod
    def _is_size(cls, value: int | str) -> int | str:
        parse_size(value)
        return value


class Recipe(Strict):
    """What the user asked: base, experts, and the decisions of each stage."""

    version: Annotated[Literal[1], Field(description="Version of the recipe format.")]
    kind: Annotated[Literal["mediator"], Field(description="Kind of merge; a static merge is rule none.")] = "mediator"
    base: Annotated[str, Field(min_length=1, description="Folder of the model that all experts were tuned from.")]
    experts: Annotated[
        tuple[ExpertSpec, ...], Field(strict=False, min_length=1, description="The fine-tunes to merge, in order.")
    ]
    conflict: ConflictSpec = ConflictSpec()
    assign: AssignSpec = AssignSpec(rule="all", candidates="layers")
    average: AverageSpec = AverageSpec()
    extract: ExtractSpec = ExtractSpec()
    overrides: Annotated[
        tuple[OverrideSpec, ...], Field(strict=False, description="Other settings for some tensors; later ones win.")
    ] = ()
    router: Annotated[
        RouterSpec | None,
        Field(description="How the router is made; without it, by defaults where all experts have prompts."),
    ] = None
    tokenizer: Annotated[
        str,
        Field(
            pattern=r"^(base|expert:.+)$",
            description="base or expert:NAME: whose tokenizer, chat template, generation config and token ids win.",
        ),
    ] = "base"
    output: OutputSpec = OutputSpec()
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of everything random.")] = 0

    @field_validator("experts")
    @classmethod
    def _names_are_unique(cls, experts: tuple[ExpertSpec, ...]) -> tuple[ExpertSpec, ...]:
        names = [expert.name.lower() for expert in experts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expert names must differ, also on disks that ignore case: {', '.join(twice)}")
        if reserved := sorted(set(names) & set(RESERVED_NAMES)):
            raise ValueError(f"reserved expert names: {', '.join(reserved)}")
        return experts

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_names_an_expert(cls, tokenizer: str, info: ValidationInfo) -> str:
        kind, _, name = tokenizer.partition(":")
        experts: tuple[ExpertSpec, ...] | None = info.data.get("experts")
        if kind == "expert" and experts is not None and name not in [expert.name for expert in experts]:
            raise ValueError(f"tokenizer names no expert: '{name}'")
        return tokenizer
