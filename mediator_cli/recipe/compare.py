"""What a recipe of kind `compare` may say: a library of experts, rows by task, and the strategies that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from mediator_cli.errors import Problem, RecipeError
from mediator_cli.recipe.collections import ExpertsFrom, expand_experts
from mediator_cli.recipe.load import COMPARE, apply_changes, as_written, form_problems, sorted_by_line
from mediator_cli.recipe.names import ExpertName, check_expert_names
from mediator_cli.recipe.strict import Strict
from mediator_cli.recipe.task_folders import TasksFrom, expand_tasks
from mediator_cli.recipe.text import compose_all, place_of, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.recipe.collections import Listing
    from mediator_cli.recipe.text import Document, FieldPath

Selector = Literal["mbc", "outputs", "greedy", "soup", "random"]
SelectionKind = Literal["ensemble", "merge", "route"]
Representative = Literal["medoid", "average", "retrained"]


class CompareExpert(Strict):
    """One expert: a LoRA adapter of the base, or a fine-tune of it that is taken as its nearest adapter."""

    name: ExpertName
    model: Annotated[str, Field(min_length=1, description="A folder, or org/name[@revision].")]
    rank: Annotated[
        int | None, Field(ge=1, description="Of a full checkpoint: the rank of the adapter that stands for it.")
    ] = None


class CompareExpertsFrom(ExpertsFrom):
    """All experts of a folder or of a collection."""

    rank: Annotated[
        int | None, Field(ge=1, description="Of full checkpoints: the rank of the adapters that stand for them.")
    ] = None


class CompareTask(Strict):
    """The rows of one task, JSON lines of prompt and answer, and the expert that was trained on it."""

    train: Annotated[str | None, Field(description="Rows for what trains experts anew, such as selections.")] = None
    valid: Annotated[str | None, Field(description="Rows that strategies are fitted on.")] = None
    test: Annotated[str, Field(min_length=1, description="Rows that all strategies answer.")]
    expert: Annotated[
        str | None,
        Field(description="The task's own expert; default: that of the task's name. Without one it is held out."),
    ] = None


class RowLimits(Strict):
    """At most so many rows of each file, the first ones."""

    train: Annotated[int, Field(ge=1, description="Of each task, to train on.")] = 200
    valid: Annotated[int, Field(ge=1, description="Of each task, to fit on.")] = 40
    test: Annotated[int, Field(ge=1, description="Of each task, to answer.")] = 100


class StrategySpec(Strict):
    """One strategy by name; its parameters stand beside the name, see `mediator compare --list`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1)]
    label: Annotated[
        str | None, Field(min_length=1, description="What it is called in the table; needed where one stands twice.")
    ] = None

    @property
    def shown(self) -> str:
        """What it is called in the table."""
        return self.label or self.name

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters, as they were written."""
        return dict(self.model_extra or {})


class SelectionSpec(Strict):
    """How few experts are enough: which are kept, by whom, and how those that are left answer."""

    selectors: Annotated[
        tuple[Selector, ...],
        Field(
            strict=False,
            min_length=1,
            description="Who chooses. mbc: clusters of deltas that are alike. outputs: clusters of experts that answer "
            "alike. greedy: one expert after the other, by validation loss. soup: the merge that grows while that "
            "helps. random: drawn with the seed.",
        ),
    ] = ("mbc", "outputs", "greedy", "soup", "random")
    kinds: Annotated[
        tuple[SelectionKind, ...], Field(strict=False, min_length=1, description="How those that are kept answer.")
    ] = ("ensemble", "merge", "route")
    k: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...] | None,
        Field(strict=False, min_length=1, description="Numbers of experts kept. Default: 1, 2, 4 and so on, and all."),
    ] = None
    representatives: Annotated[
        tuple[Representative, ...],
        Field(
            strict=False,
            min_length=1,
            description="Who stands for a cluster: the expert in its middle, the average of its experts, or one that "
            "is trained on the train rows of all its tasks.",
        ),
    ] = ("medoid",)


class CompareOutput(Strict):
    """Where results are kept, so that a comparison that was stopped goes on."""

    path: Annotated[str | None, Field(description="Folder of the results; default: one named after the recipe.")] = None


class CompareRecipe(Strict):
    """A library of experts of one base, answered with in many ways, on equal terms."""

    version: Annotated[Literal[1], Field(description="Version of the recipe format.")]
    kind: Annotated[Literal["compare"], Field(description="Kind of recipe.")]
    base: Annotated[str, Field(min_length=1, description="The base of all experts: a folder, or org/name[@revision].")]
    experts: Annotated[
        tuple[CompareExpert, ...],
        Field(strict=False, min_length=1, description="The library; `{from: ./adapters}` names a whole folder."),
    ]
    tasks: Annotated[
        dict[str, CompareTask],
        Field(
            min_length=1,
            description="Rows by task; `{from: ./data}` takes all TASK.test.jsonl of a folder, with TASK.valid.jsonl "
            "and TASK.train.jsonl.",
        ),
    ]
    rows: RowLimits = RowLimits()
    strategies: Annotated[
        tuple[StrategySpec, ...],
        Field(strict=False, description="What is compared: names, or {name: …, parameter: value}. Default: all."),
    ] = ()
    selection: Annotated[
        SelectionSpec | None, Field(description="Also ask how many experts are needed; default: not.")
    ] = None
    output: CompareOutput = CompareOutput()
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of everything random.")] = 0

    @field_validator("experts")
    @classmethod
    def _names_are_unique(cls, experts: tuple[CompareExpert, ...]) -> tuple[CompareExpert, ...]:
        check_expert_names([expert.name for expert in experts])
        return experts

    @field_validator("strategies", mode="before")
    @classmethod
    def _names_alone(cls, given: Any) -> Any:  # noqa: ANN401 - YAML data
        return [{"name": each} if isinstance(each, str) else each for each in given] if _is_list(given) else given

    @field_validator("strategies")
    @classmethod
    def _labels_differ(cls, given: tuple[StrategySpec, ...]) -> tuple[StrategySpec, ...]:
        shown = [each.shown for each in given]
        if twice := sorted({name for name in shown if shown.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands there twice: give each a `label` of its own")
        return given


def _is_list(given: Any) -> bool:  # noqa: ANN401 - YAML data
    return isinstance(given, list | tuple)


@dataclass(frozen=True)
class LoadedCompare:
    """A recipe of this kind, the text that it came from, and the line of every field in it.

    `written` says where fields stand that were made of others, as the experts of a folder are.
    """

    recipe: CompareRecipe
    path: Path
    text: str
    lines: Mapping[FieldPath, int] = field(repr=False)
    changes: tuple[str, ...] = ()
    written: Mapping[FieldPath, FieldPath] = field(default_factory=dict, repr=False)

    def place(self, *field: str | int) -> str:
        """Say where a field stands: `recipe.yaml:12 rows.test`."""
        return place_of(self.path, self.lines, as_written(field, self.written))

    def resolve(self, source: str) -> Path:
        """Return the path that the recipe means: relative ones start at the recipe's folder."""
        return (self.path.parent / source).absolute()

    def ordered(self, problems: Sequence[Problem]) -> list[Problem]:
        """Sort problems by their line in the recipe; those of the command line and of no line come first."""
        return sorted_by_line(self.path, problems)

    @property
    def folder(self) -> Path:
        """Where results are kept."""
        return self.resolve(self.recipe.output.path or f"{self.path.stem}-results")


def load_compare(path: Path, changes: Sequence[str] = (), list_collection: Listing | None = None) -> LoadedCompare:
    """Read and check a recipe; `changes` are `field.path=value` texts that win over the file.

    `list_collection` is asked for the models of collections on the Hub; without it, a recipe can name none.
    Raises RecipeError with all problems of form, ordered by line.
    """
    document = _only(path, compose_all(path, read_text(path)))
    data = document.data
    lines = apply_changes(data, dict(document.lines), changes)
    experts = expand_experts(data.get("experts"), path.parent, _placing(path, lines), list_collection)
    tasks = expand_tasks(data.get("tasks"), path.parent, _placing(path, lines))
    told = [*experts.problems, *tasks.problems]
    written = {**experts.written, **tasks.written}
    made = {"experts": experts.experts, "tasks": tasks.tasks}
    data |= {key: value for key, value in made.items() if key in data}
    try:
        recipe = CompareRecipe.model_validate(data)
    except ValidationError as error:
        told += _told(path, lines, error, written, has_faulty=bool(told))
        raise RecipeError(sorted_by_line(path, told)) from None
    if told:
        raise RecipeError(sorted_by_line(path, told))
    return LoadedCompare(recipe, path, document.text, MappingProxyType(lines), tuple(changes), written)


def _only(path: Path, documents: Sequence[Document]) -> Document:
    if len(documents) > 1:
        message = f"the file holds {len(documents)} recipes"
        raise RecipeError(Problem(documents[1].place(), message, "write one comparison a file"))
    if (kind := documents[0].data.get("kind")) != COMPARE:
        message = f"is a recipe of kind {kind!r}" if kind else "is no recipe of kind compare"
        hint = "write `kind: compare`, with base, experts and tasks" if kind is None else f"`mediator merge {path}`"
        raise RecipeError(Problem(documents[0].place("kind"), message, hint))
    return documents[0]


def _placing(path: Path, lines: Mapping[FieldPath, int]) -> Any:  # noqa: ANN401 - a function of fields
    return lambda *at: place_of(path, lines, at)


def _told(
    path: Path,
    lines: dict[FieldPath, int],
    error: ValidationError,
    written: Mapping[FieldPath, FieldPath],
    *,
    has_faulty: bool,
) -> tuple[Problem, ...]:
    # An item that does not validate is left out, and then its list seems too short: say only what is wrong inside.
    faults = error.errors(include_url=False)
    told = [item for item in faults if item["type"] != "too_short" or not (item["input"] or has_faulty)]
    return form_problems(path, lines, told, CompareRecipe, "compare", written)


def compare_schema() -> dict[str, Any]:
    """Give the JSON schema of a recipe of this kind, for editors."""
    schema = CompareRecipe.model_json_schema()
    defs, fields = schema["$defs"], schema["properties"]
    for each in (CompareExpertsFrom, TasksFrom):
        defs[each.__name__] = each.model_json_schema()
    many, rows = ({"$ref": f"#/$defs/{each.__name__}"} for each in (CompareExpertsFrom, TasksFrom))
    experts = {key: value for key, value in fields["experts"].items() if key != "type"}
    form = {"if": {"type": "object"}, "then": many, "else": {"type": "array"}}
    fields["experts"] = experts | {"items": {"anyOf": [experts["items"], many]}} | form
    tasks = fields["tasks"]
    choice = {"if": {"required": ["from"]}, "then": rows, "else": tasks}
    fields["tasks"] = {"description": tasks.pop("description"), "type": "object", **choice}
    fields["strategies"]["items"] = {"anyOf": [{"type": "string"}, fields["strategies"]["items"]]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "recipe of kind compare"}
    return {**head, **{key: value for key, value in schema.items() if key != "title"}}
