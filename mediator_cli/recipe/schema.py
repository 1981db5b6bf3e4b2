"""What a recipe may say: form only. What it means for given checkpoints is checked by `plan`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from mediator_cli.recipe.layers import Graded, Layers
from mediator_cli.recipe.router import RouterSpec
from mediator_cli.recipe.sizes import parse_size
from mediator_cli.recipe.strict import Finite, Fraction, Strict

Unit = Literal["layer", "block", "tensor"]
Measure = Literal["sign", "any_sign", "cosine"]
Rule = Literal["none", "all", "threshold", "top_k", "mean_std", "byte_budget", "listed"]
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
    model: Annotated[
        str, Field(min_length=1, description="A checkpoint or a PEFT LoRA adapter: a folder, or org/name[@revision].")
    ]
    weight: Annotated[
        Graded,
        Field(description="Merge coefficient of this expert: a number, or a list of anchors over the layers."),
    ] = 1.0
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


def _is_size(value: int | str | None) -> int | str | None:
    if value is not None:
        parse_size(value)
    return value


RULE_FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "all": ("candidates",),
    "threshold": ("threshold", "candidates"),
    "top_k": ("k", "candidates"),
    "mean_std": ("std", "candidates"),
    "byte_budget": ("bytes", "candidates"),
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
            "mean_std: score > mean + std deviations. "
            "byte_budget: from the highest score down, each unit whose sparse experts still fit. "
            "listed: the units named."
        ),
    ] = "mean_std"
    threshold: Annotated[
        float | None, Field(ge=0, le=1, allow_inf_nan=False, description="Score above which a unit is routed.")
    ] = None
    k: Annotated[int | None, Field(ge=0, description="Number of units that are routed.")] = None
    std: Annotated[Finite | None, Field(description="Deviations above the mean; default 0.")] = None
    bytes: Annotated[
        int | str | None,
        AfterValidator(_is_size),
        Field(description="Most that the sparse experts of all units may take together, such as 500MB."),
    ] = None
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
        for name in ("threshold", "k", "bytes", "units"):
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

    @property
    def names_method(self) -> bool:
        """Whether the method was written; in an override, parameters alone change those of the method that applies."""
        return "method" in self.model_fields_set


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
    density: Annotated[Fraction, Field(description="Share of the entries that are kept.")] = 0.05
    over: Annotated[
        Literal["tensor", "model"],
        Field(
            description="tensor: keep this share of each tensor. model: keep the largest entries of each expert over "
            "all its routed tensors, so that some tensors keep more and some none; tensors whose density or select "
            "an override sets are ranked alone."
        ),
    ] = "tensor"
    select: Annotated[Literal["magnitude", "random"], Field(description="Which entries are kept.")] = "magnitude"
    rescale: Rescale = None
    values: Annotated[ValueCodec, Field(description="How kept values are stored.")] = "sign"

    @model_validator(mode="after")
    def _ranks_what_is_ranked(self) -> ExtractSpec:
        if self.over == "model" and self.select == "random":
            raise ValueError("`select: random` ranks nothing, so it takes no `over: model`")
        return self


class OverrideExtract(Strict):
    """The extract fields that an override may set; density and select also end `over: model` for its tensors."""

    density: Fraction | None = None
    select: Literal["magnitude", "random"] | None = None
    rescale: Rescale = None
    values: ValueCodec | None = None


class OverrideSpec(Strict):
    """Other settings for the tensors that both `match` and `layers` choose; later overrides win."""

    match: Annotated[
        str, Field(min_length=1, description="Glob on tensor names, such as `*.self_attn.*`; default all.")
    ] = "*"
    layers: Annotated[
        Layers | None, Field(description="Numbers of decoder layers: 3, 0-10 (both ends), or a list; default all.")
    ] = None
    average: Annotated[
        AverageSpec | None,
        Field(description="A method with its parameters, or parameters alone: the method that applies then stays."),
    ] = None
    extract: OverrideExtract | None = None
    weights: Annotated[
        dict[str, Graded] | None, Field(min_length=1, description="Merge coefficients of some experts, by name.")
    ] = None

    @model_validator(mode="after")
    def _sets_something(self) -> OverrideSpec:
        if not {"match", "layers"} & self.model_fields_set:
            raise ValueError("an override needs match or layers")
        if self.average is None and self.extract is None and self.weights is None:
            raise ValueError("an override needs average, extract or weights")
        if self.average is not None and not self.average.names_method:
            if self.average.preset is not None:
                raise ValueError("a preset replaces all parameters of its method; name the method too")
            if not self.average.params:
                raise ValueError("average sets nothing; give a method or parameters")
        return self


class OutputSpec(Strict):
    """Where and how the bundle is written."""

    path: Annotated[
        str | None, Field(description="Folder of the bundle; default: a folder named after the recipe.")
    ] = None
    dtype: Annotated[OutputDtype, Field(description="base: each tensor keeps the base's dtype.")] = "base"
    shard_size: Annotated[
        int | str, AfterValidator(_is_size), Field(description="Largest size of one safetensors file.")
    ] = "5GB"


class Recipe(Strict):
    """What the user asked: base, experts, and the decisions of each stage."""

    version: Annotated[Literal[1], Field(description="Version of the recipe format.")]
    kind: Annotated[Literal["mediator"], Field(description="Kind of merge; a static merge is rule none.")] = "mediator"
    base: Annotated[
        str,
        Field(
            min_length=1,
            description="Model that all experts were tuned from: a folder, or org/name[@revision] on the Hub.",
        ),
    ]
    experts: Annotated[
        tuple[ExpertSpec, ...], Field(strict=False, min_length=1, description="The fine-tunes to merge, in order.")
    ]
    keep_base: Annotated[
        tuple[str, ...] | None,
        Field(
            strict=False,
            description="Globs on names of tensors that are the base's as they are: never merged, and experts may lack "
            "them or have others. Default: none, but all outside the language part of a model that also sees or hears.",
        ),
    ] = None
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
            pattern=r"^(base|union|expert:.+)$",
            description="base or expert:NAME: whose tokens, tokenizer, chat template, generation config and token ids "
            "win. union: the base's, and behind its tokens those that experts add.",
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

    @property
    def tokenizer_of(self) -> str:
        """The source whose tokenizer, chat template and generation config win: `base` or an expert's name."""
        return "base" if self.tokenizer == "union" else self.tokenizer.removeprefix("expert:")
