"""Whether a format can say what a recipe asks for; where not, what can."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.layout import layers_of, unit_of
from mediator_cli.checkpoint.moe_layout import FORMATS, PROJECTIONS
from mediator_cli.errors import CheckpointError, Problem, did_you_mean
from mediator_cli.plan.moe.formats import OUTSIDE, TAKEN, complete, default_format, formats_for
from mediator_cli.plan.moe_plan import BASE, ExpertPrompts
from mediator_cli.plan.prompts import read_prompts
from mediator_cli.recipe.moe import AVERAGE, NO_PROMPTS, OF_BASE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.plan.model import ExpertSource
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.schema import Recipe

_BUNDLE = "`kind: mediator` makes a bundle of any architecture"
_ATTENTION_SETTINGS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "rms_norm_eps", "attention_multiplier",
    "partial_rotary_factor",
)  # fmt: skip
"""Settings by which the shared layers work, which one model can have in one way only."""


def block_tensor(layer: int, projection: str) -> str:
    """Name a matrix of a dense feed-forward block, as all models that become an MoE call it."""
    return f"model.layers.{layer}.mlp.{projection}.weight"


def expert_names(recipe: Recipe) -> tuple[str, ...]:
    """Name the experts of the MoE, in the order of the gates' rows: those of the recipe, then the base if asked."""
    names = tuple(expert.name for expert in recipe.experts)
    return (*names, BASE) if recipe.moe_spec.base_expert else names


def format_name(recipe: Recipe, base: Checkpoint) -> str | None:
    """Choose the format that is written; None where none takes the base."""
    if recipe.moe_spec.format != "auto":
        return recipe.moe_spec.format
    kind = str(base.config.get("model_type"))
    return default_format(kind, some_layers=len(certain_layers(recipe, base) or ()) < len(layers_of(base.tensors)))


def certain_layers(recipe: Recipe, base: Checkpoint) -> tuple[int, ...] | None:
    """List the layers that get experts where the recipe alone says so; None where conflict decides."""
    numbers = range(len(layers_of(base.tensors)))
    if recipe.assign.rule == "all":
        return tuple(numbers)
    if recipe.assign.rule == "listed":
        return tuple(number for number in numbers if _is_listed(recipe, number))
    return None


def _is_listed(recipe: Recipe, layer: int) -> bool:
    unit = block_unit(layer, recipe)
    return any(fnmatchcase(unit, pattern) for pattern in recipe.assign.units or ())


def block_unit(layer: int, recipe: Recipe) -> str:
    """Name the unit of assignment that the feed-forward block of a layer belongs to."""
    return unit_of(block_tensor(layer, "down_proj"), recipe.conflict.unit)


def check_moe(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Say what is wrong with an MoE that needs no checkpoint to see."""
    recipe, spec = loaded.recipe, loaded.recipe.moe_spec
    names = expert_names(recipe)
    if spec.experts_per_token > len(names):
        message = f"each token gets {spec.experts_per_token} experts, and there are {len(names)}"
        hint = f"give {len(names)} or less" + ("" if spec.base_expert else ", or add `base_expert: true`")
        yield Problem(loaded.place("moe", "experts_per_token"), message, hint)
    for name in spec.experts:
        if name not in names:
            hint = "add `base_expert: true`" if name == BASE else did_you_mean(name, names)
            yield Problem(loaded.place("moe", "experts", name), f"no expert '{name}'", hint)
    sources = [AVERAGE, BASE, *(expert.name for expert in recipe.experts)]
    if spec.shared_from not in sources:
        hint = did_you_mean(spec.shared_from, sources)
        yield Problem(loaded.place("moe", "shared_from"), f"no source '{spec.shared_from}'", hint)
    if spec.neurons is not None and spec.format != "granitemoeshared":
        message = "only granitemoeshared keeps a share of an expert's neurons"
        yield Problem(loaded.place("moe", "neurons"), message, "write `format: granitemoeshared`, or leave it out")
    noisy = [name for name, own in spec.experts.items() if own.noise_scale]
    if noisy and spec.format == "granitemoeshared":
        message = "granitemoeshared stores how experts differ from their mean, and noise differs everywhere"
        yield Problem(loaded.place("moe", "experts", noisy[0], "noise_scale"), message, "leave it out")
    yield from _check_prompts(loaded, names)


def _check_prompts(loaded: LoadedRecipe, names: Sequence[str]) -> Iterator[Problem]:
    spec = loaded.recipe.moe_spec
    if spec.gates.method in NO_PROMPTS:
        return
    texts = read_texts(loaded)
    # Gates of the MoE's own states do without prompts of the base, which stands for all that no expert is for.
    needed = [name for name in names if name != BASE or spec.gates.method in OF_BASE]
    without = [name for name in needed if not texts[name].positive]
    if without:
        message = f"gates of method {spec.gates.method} need prompts of every expert, none are given for "
        message += ", ".join(without)
        hint = f"add `prompts` to the experts, or write `gates: {{method: {NO_PROMPTS[0]}}}`"
        yield Problem(loaded.place("moe", "gates", "method"), message, hint)
    seen: dict[tuple[frozenset[str], ...], str] = {}
    for name in names:
        own = (frozenset(texts[name].positive), frozenset(texts[name].negative))
        if texts[name].positive and own in seen:
            message = f"experts {seen[own]} and {name} have the same prompts, so gates cannot tell them apart"
            yield Problem(loaded.place("experts"), message, "give each prompts of its own task")
        seen.setdefault(own, name)


def read_texts(loaded: LoadedRecipe) -> dict[str, ExpertPrompts]:
    """Read the prompts of all experts of the MoE: those in the recipe, else those of the file; none if faulty."""
    spec, found = loaded.recipe.moe_spec, dict[str, ExpertPrompts]()
    files = {expert.name: expert.prompts for expert in loaded.recipe.experts}
    for name in expert_names(loaded.recipe):
        own, file = spec.experts.get(name), files.get(name)
        positive = own.positive_prompts if own else ()
        if not positive and file is not None:
            try:
                positive = read_prompts(loaded.resolve(file))
            except CheckpointError:
                positive = ()  # `check_router` tells what is wrong with the file.
        found[name] = ExpertPrompts(positive, own.negative_prompts if own else ())
    return found


def check_format(loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource]) -> Iterator[Problem]:
    """Check that the format takes the base, has a place for all its tensors, and does what all experts do."""
    recipe, kind = loaded.recipe, str(base.config.get("model_type"))
    name = format_name(recipe, base)
    able = formats_for(kind)
    if name is None:
        every = sorted({model for taken in TAKEN.values() for model in taken.models})
        message = f"no format of stock software makes a Mixture of Experts of {kind}: they take {', '.join(every)}"
        yield Problem(loaded.place("base"), message, _BUNDLE)
        return
    place = loaded.place("moe", "format")
    if kind not in TAKEN[name].models:
        hint = f"for {kind} there is {' or '.join(able)}" if able else _BUNDLE
        yield Problem(place, f"{name} takes {', '.join(TAKEN[name].models)}, and the base is {kind}", hint)
        return
    yield from _check_tensors(place, name, base, able)
    yield from _check_config(place, name, base, able)
    yield from _check_layers(loaded, name, base, able)
    yield from _check_shared(loaded, base, experts)


def _check_tensors(place: str, name: str, base: Checkpoint, able: Sequence[str]) -> Iterator[Problem]:
    blocks = {f"mlp.{projection}.weight" for projection in PROJECTIONS}
    known = TAKEN[name].known | blocks
    strange = [tensor for tensor in base.tensors if not _is_known(tensor, known)]
    if strange:
        others = [other for other in able if all(_is_known(each, TAKEN[other].known | blocks) for each in strange)]
        hint = f"{' or '.join(others)} has one" if others else _BUNDLE
        yield Problem(place, f"{name} has no place for {strange[0]}", hint)
    for layer in range(len(layers_of(base.tensors))):
        if missing := [p for p in PROJECTIONS if block_tensor(layer, p) not in base.tensors]:
            message = f"the base has no {block_tensor(layer, missing[0])}, of which experts are made"
            yield Problem(place, message, _BUNDLE)
            return


def _is_known(tensor: str, known: Iterable[str]) -> bool:
    if not tensor.startswith("model.layers."):
        return tensor in OUTSIDE
    return tensor.split(".", 3)[-1] in known


def _check_config(place: str, name: str, base: Checkpoint, able: Sequence[str]) -> Iterator[Problem]:
    config = complete(base.config)
    if config.get("hidden_act") not in ("silu", "swish"):
        message = f"servers know experts with silu alone, and the base has {config.get('hidden_act')}"
        yield Problem(place, message, _BUNDLE)
    head, heads = config.get("head_dim"), config.get("num_attention_heads", 1)
    if name in ("granitemoeshared", "qwen2_moe") and head and head * heads != config.get("hidden_size"):
        message = f"servers read {name} with heads of hidden size / heads, and the base's have {head}"
        has_other = "mixtral" in able
        yield Problem(place, message, "write `format: mixtral`, with experts in all layers" if has_other else _BUNDLE)
    is_mistral = base.config.get("model_type") == "mistral"
    slides = config.get("sliding_window") if is_mistral else config.get("use_sliding_window")
    if slides and not TAKEN[name].windows:
        hint = "write `format: mixtral`" if is_mistral else _BUNDLE
        yield Problem(place, f"{name} does not slide its attention as the base does ({slides})", hint)


def _check_layers(loaded: LoadedRecipe, name: str, base: Checkpoint, able: Sequence[str]) -> Iterator[Problem]:
    layers, n_layers = certain_layers(loaded.recipe, base), len(layers_of(base.tensors))
    if layers == ():
        yield Problem(loaded.place("assign", "units"), "no layer gets experts", "name a layer, such as model.layers.0")
    if len(layers or ()) < n_layers and not FORMATS[name].takes_dense_layers:
        others = [other for other in able if FORMATS[other].takes_dense_layers]
        instead = f"write `format: {others[0]}`, or " if others else ""
        message = f"in {name} every layer has experts, and rule {loaded.recipe.assign.rule} chooses some"
        yield Problem(loaded.place("assign", "rule"), message, f"{instead}write `assign: {{rule: all}}`")


def _check_shared(loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource]) -> Iterator[Problem]:
    """Refuse to average attention that works in different ways."""
    if loaded.recipe.moe_spec.shared_from != AVERAGE:
        return
    own = attention_settings(base.config)
    for at, expert in enumerate(experts):
        if isinstance(expert.source, Adapter):
            continue
        theirs = attention_settings(expert.source.config)
        for setting in sorted({*own, *theirs}):
            if own.get(setting) != theirs.get(setting):
                message = f"{setting} is {theirs.get(setting)}, the base has {own.get(setting)}"
                hint = "attention is shared, and works in one way: copy it with `moe: {shared_from: base}`, "
                hint += "or make a bundle with `kind: mediator`"
                yield Problem(loaded.place("experts", at, "model"), message, hint)


def attention_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings of attention and norms, those of rope one by one, however the config writes them."""
    full = complete(config)
    found = {name: full[name] for name in _ATTENTION_SETTINGS if full.get(name) is not None}
    for outer in ("rope_scaling", "rope_parameters"):
        inside = full.get(outer)
        found |= {f"rope {name}": value for name, value in inside.items()} if isinstance(inside, dict) else {}
    found.setdefault("rope rope_type", found.pop("rope type", "default"))
    found.setdefault("rope rope_theta", full.get("rope_theta"))
    return found
