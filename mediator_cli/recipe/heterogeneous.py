"""What a recipe of kind `heterogeneous_moe` may say: experts of different architectures and sizes, and no base."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mediator_cli.errors import Problem, RecipeError
from mediator_cli.recipe.load import HETEROGENEOUS, apply_changes, form_problems
from mediator_cli.recipe.names import ExpertName, check_expert_names
from mediator_cli.recipe.sizes import parse_size
from mediator_cli.recipe.strict import Strict
from mediator_cli.recipe.text import compose_all, place_of, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.recipe.text import FieldPath

MOST_EXPERTS = 64


def _is_size(value: int | str) -> int | str:
    parse_size(value)
    return value


class HeterogeneousExpert(Strict):
    """One model: a full checkpoint of a causal language model of any architecture."""

    name: ExpertName
    model: Annotated[str, Field(min_length=1, description="A checkpoint: a folder, or org/name[@revision].")]
    prompts: Annotated[
        str | None,
        Field(description="JSON lines with a `prompt` each, of this expert's task; the router starts there."),
    ] = None


class ProjectorSpec(Strict):
    """The maps between the shared width and that of each expert: `depth` linear layers."""

    init: Annotated[
        Literal["identity", "random"],
        Field(
            description="identity: states pass by unchanged in the expert's own coordinates, and what the layers add "
            "starts at zero. random: layers alone, with random weights, as the paper has it."
        ),
    ] = "identity"
    depth: Annotated[int, Field(ge=1, le=8, description="Number of linear layers.")] = 1
    width: Annotated[
        int | None, Field(ge=1, description="Width of inner layers; default: the wider of the two ends.")
    ] = None
    activation: Annotated[
        Literal["gelu", "relu", "silu", "tanh"], Field(description="Function between the layers.")
    ] = "gelu"

    @model_validator(mode="after")
    def _width_is_inside(self) -> ProjectorSpec:
        if self.width is not None and self.depth == 1:
            raise ValueError("one layer has no inner width: leave `width` out, or give `depth: 2`")
        return self


class RouterStart(Strict):
    """The router's weights before any training."""

    init: Annotated[
        Literal["auto", "random", "prototype", "logistic"],
        Field(
            description="random: small random weights. prototype: the nearest mean of the experts' prompts. logistic: "
            "a regression on them. auto: logistic where all experts have prompts, else random."
        ),
    ] = "auto"
    max_prompts: Annotated[int, Field(ge=1, description="How many prompts of each expert are read at most.")] = 1000


class HeterogeneousOutput(Strict):
    """Where and how the model is written."""

    path: Annotated[str | None, Field(description="Folder of the model; default: one named after the recipe.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Field(description="auto: that of the experts where they agree, else float32."),
    ] = "auto"
    shard_size: Annotated[
        int | str, AfterValidator(_is_size), Field(description="Largest size of one safetensors file.")
    ] = "5GB"


class HeterogeneousRecipe(Strict):
    """Experts of any architecture between one embedding and one head (MergeME, arXiv 2502.00997, section 3.3)."""

    version: Annotated[Literal[1], Field(description="Version of the recipe format.")]
    kind: Annotated[Literal["heterogeneous_moe"], Field(description="Kind of merge.")]
    experts: Annotated[
        tuple[HeterogeneousExpert, ...],
        Field(strict=False, min_length=1, max_length=MOST_EXPERTS, description="The models, in the router's order."),
    ]
    tokenizer: Annotated[
        str | None,
        Field(
            pattern=r"^expert:.+$",
            description="expert:NAME: whose tokenizer, chat template and generation config the model has. Default: the "
            "first expert's.",
        ),
    ] = None
    added_tokens: Annotated[
        Literal["own", "union"],
        Field(description="own: the tokenizer as it is. union: with the added tokens of the other experts behind it."),
    ] = "own"
    top_k: Annotated[int, Field(ge=1, description="How many experts answer each sequence.")] = 1
    width: Annotated[
        Literal["max", "sum"],
        Field(
            description="Width of the shared embedding. sum: each expert has coordinates of its own. max: that of the "
            "widest expert; rows of all are averaged in the same coordinates, as the paper has it."
        ),
    ] = "sum"
    projectors: ProjectorSpec = ProjectorSpec()
    router: RouterStart = RouterStart()
    output: HeterogeneousOutput = HeterogeneousOutput()
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of everything random.")] = 0

    @field_validator("experts")
    @classmethod
    def _names_are_unique(cls, experts: tuple[HeterogeneousExpert, ...]) -> tuple[HeterogeneousExpert, ...]:
        check_expert_names([expert.name for expert in experts])
        return experts

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_names_an_expert(cls, tokenizer: str | None, info: ValidationInfo) -> str | None:
        experts: tuple[HeterogeneousExpert, ...] | None = info.data.get("experts")
        name = (tokenizer or "").removeprefix("expert:")
        if tokenizer and experts is not None and name not in [expert.name for expert in experts]:
            raise ValueError(f"tokenizer names no expert: '{name}'")
        return tokenizer

    @property
    def tokenizer_of(self) -> str:
        """The name of the expert whose tokenizer is the model's."""
        return self.tokenizer.removeprefix("expert:") if self.tokenizer else self.experts[0].name


@dataclass(frozen=True)
class LoadedHeterogeneous:
    """A recipe of this kind, the text that it came from, and the line of every field in it."""

    recipe: HeterogeneousRecipe
    path: Path
    text: str
    lines: Mapping[FieldPath, int] = field(repr=False)
    changes: tuple[str, ...] = ()

    def place(self, *field: str | int) -> str:
        """Say where a field stands: `recipe.yaml:12 top_k`."""
        return place_of(self.path, self.lines, field)

    def resolve(self, source: str) -> Path:
        """Return the path that the recipe means: relative ones start at the recipe's folder."""
        return (self.path.parent / source).absolute()


def is_heterogeneous_recipe(path: Path, changes: Sequence[str] = ()) -> bool:
    """Whether a file is a recipe of this kind; what is wrong with it otherwise is not told here."""
    kinds = [change.partition("=")[2].strip() for change in changes if change.startswith("kind=")]
    try:
        documents = compose_all(path, read_text(path))
    except RecipeError:
        return False
    return len(documents) == 1 and (kinds[-1] if kinds else documents[0].data.get("kind")) == HETEROGENEOUS


def load_heterogeneous(path: Path, changes: Sequence[str] = ()) -> LoadedHeterogeneous:
    """Read and check a recipe; `changes` are `field.path=value` texts that win over the file.

    Raises RecipeError with all problems of form, ordered by line.
    """
    document = compose_all(path, read_text(path))[0]
    lines = apply_changes(document.data, dict(document.lines), changes)
    try:
        recipe = HeterogeneousRecipe.model_validate(document.data)
    except ValidationError as error:
        raise RecipeError(_told(path, lines, error)) from None
    return LoadedHeterogeneous(recipe, path, document.text, MappingProxyType(lines), tuple(changes))


def _told(path: Path, lines: dict[FieldPath, int], error: ValidationError) -> tuple[Problem, ...]:
    faults = error.errors(include_url=False)
    base = [item for item in faults if tuple(item["loc"]) == ("base",)]
    # An item that does not validate is left out, and then its list seems too short: say only what is wrong inside.
    told = [item for item in faults if item not in base and (item["type"] != "too_short" or not item["input"])]
    found = form_problems(path, lines, told, HeterogeneousRecipe, "heterogeneous")
    message = "experts of different architectures have no base in common"
    hint = "list it among the experts if it is to be one"
    return (*(Problem(place_of(path, lines, ("base",)), message, hint) for _ in base), *found)


def heterogeneous_schema() -> dict[str, Any]:
    """Give the JSON schema of a recipe of this kind, for editors."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "recipe of kind heterogeneous_moe"}
    return {**head, **HeterogeneousRecipe.model_json_schema()}
