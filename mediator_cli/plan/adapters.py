"""A recipe that merges adapters into an adapter: which modules, from which factors, by which method. Headers only."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.adapter.config import read_config
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.adapter.pairs import find_pairs
from mediator_cli.checkpoint.adapter.parts import read_parts
from mediator_cli.checkpoint.layout import natural_key, unit_of
from mediator_cli.errors import CheckpointError, Problem, RecipeError, some_names
from mediator_cli.plan.keep import Kept
from mediator_cli.plan.model import ModulePlan, Plan, TensorPlan, TokenSettings
from mediator_cli.plan.overrides import check_overrides, resolve_settings
from mediator_cli.plan.sources import open_base, open_experts
from mediator_cli.recipe.schema import AssignSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.checkpoint.adapter.pairs import Pair
    from mediator_cli.checkpoint.adapter.parts import Parts
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.plan.gradients import GradedMethod
    from mediator_cli.plan.model import ExpertSource
    from mediator_cli.plan.overrides import TensorSettings
    from mediator_cli.recipe.load import LoadedRecipe

Landing = tuple[tuple[str, int], ...]
"""Where a pair of factors lies in the base: tensors, and the row in each at which it begins."""
_SAYS = {"version", "kind", "base", "experts", "average", "overrides", "anchors", "assign", "output", "seed"}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ROLES = {
    "magnitude": "is a DoRA adapter",
    "bias": "has biases beside its factors",
    "tokens": "has trained rows of single tokens",
}


def merges_adapters(methods: Sequence[GradedMethod]) -> bool:
    """Whether a recipe with these methods merges adapters into an adapter."""
    return any(resolved.method.space == "adapter" for resolved in methods)


def plan_adapters(
    loaded: LoadedRecipe, methods: Sequence[GradedMethod], problems: Sequence[Problem], access: Access
) -> Plan:
    """Resolve a recipe that merges adapters; of the base only config and headers are read.

    Raises RecipeError or CheckpointError with these and all further problems.
    """
    found = [*problems, *_check_recipe(loaded, methods)]
    try:
        base = open_base(loaded, access)
        experts, faults = open_experts(loaded, base, Kept(), access)
    except CheckpointError as error:
        raise CheckpointError(loaded.ordered([*found, *error.problems])) from None
    full = [expert.name for expert in experts if not isinstance(expert.source, Adapter)]
    found += [_full_checkpoints(loaded, methods, full)] if full else faults
    found += check_overrides(loaded, base.tensors)
    settings, errors = resolve_settings(loaded, base)
    found += [error for error in errors if error not in found]
    modules: tuple[ModulePlan, ...] = ()
    opened: list[_Opened] = []
    if not found:
        opened = [_open_pairs(loaded, index, base, expert) for index, expert in enumerate(experts)]
        modules, misfits = _find_modules(loaded, opened, settings)
        found += misfits
    if found:
        raise RecipeError(loaded.ordered(found))
    plan = _assemble(loaded, base, tuple(experts), modules, settings)
    return replace(plan, notices=(*plan.notices, *(notice for each in opened for notice in each.notices)))


def _check_recipe(loaded: LoadedRecipe, methods: Sequence[GradedMethod]) -> Iterator[Problem]:
    recipe = loaded.recipe
    names = [resolved.method.name for resolved in methods]
    others = [resolved.method.name for resolved in methods if resolved.method.space != "adapter"]
    if others:
        own = next(name for name in names if name not in others)
        message = f"{own} makes an adapter, {others[0]} a full model: one recipe makes one of the two"
        yield Problem(loaded.place("average", "method"), message, "see `mediator methods` for what each works on")
    given = set(recipe.model_fields_set) - _SAYS
    given -= {"tokenizer"} if recipe.tokenizer == "base" else set()
    for name in sorted(given):
        yield Problem(loaded.place(name), f"{name} has no say where adapters are merged into one", "leave it out")
    if "assign" in recipe.model_fields_set and recipe.assign.rule != "none":
        hint = "write `assign: {rule: none}`, or leave it out"
        yield Problem(loaded.place("assign", "rule"), "nothing is routed where adapters are merged into one", hint)
    for index, override in enumerate(recipe.overrides):
        if override.extract is not None:
            message = "nothing is extracted where adapters are merged into one"
            yield Problem(loaded.place("overrides", index, "extract"), message, "leave it out")


def _full_checkpoints(loaded: LoadedRecipe, methods: Sequence[GradedMethod], names: Sequence[str]) -> Problem:
    specs = {spec.name: (index, spec.model) for index, spec in enumerate(loaded.recipe.experts)}
    index, model = specs[names[0]]
    method = next(resolved.method.name for resolved in methods if resolved.method.space == "adapter")
    many = "are full checkpoints" if len(names) > 1 else "is a full checkpoint"
    message = f"{some_names(names)} {many}, and {method} merges adapters"
    hint = f"extract an adapter first: mediator extract-lora {loaded.recipe.base} {model} -o {names[0]}-lora"
    return Problem(loaded.place("experts", index, "model"), message, hint)


@dataclass(frozen=True)
class _Opened:
    """The pairs of one adapter by where they lie in the base, what is wrong with it, and what to say of it."""

    pairs: Mapping[Landing, Pair]
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()


def _find_modules(
    loaded: LoadedRecipe, opened: Sequence[_Opened], settings: Mapping[str, TensorSettings]
) -> tuple[tuple[ModulePlan, ...], list[Problem]]:
    """Find what each adapter has for each module; modules that lie at one place are one, whatever they are called."""
    problems = [problem for each in opened for problem in each.problems]
    rows: dict[Landing, list[Pair | None]] = {}
    for index, each in enumerate(opened):
        for landing, pair in each.pairs.items():
            rows.setdefault(landing, [None] * len(opened))[index] = pair
    for landing, pairs in rows.items():
        shapes = {_outline(pair): pair for pair in pairs if pair is not None}
        if len(shapes) > 1:
            one, other = list(shapes.values())[:2]
            message = f"the adapters do not fit together: {one} and {other}"
            problems.append(Problem(landing[0][0], message, "are they adapters of one base?"))
    dtype = _dtype(loaded, [pair for pairs in rows.values() for pair in pairs if pair is not None])
    made = [_module(landing, tuple(pairs), settings, dtype) for landing, pairs in rows.items()]
    return tuple(sorted(made, key=lambda module: natural_key(module.name))), problems


def _open_pairs(loaded: LoadedRecipe, index: int, base: Checkpoint, expert: ExpertSource) -> _Opened:
    source = expert.source
    if not isinstance(source, Adapter):
        return _Opened({})
    config = read_config(source.path / "adapter_config.json")
    parts = read_parts(source.path, source.repo)
    pairs, _ = find_pairs(parts, config, base.tensors)
    place = loaded.place("experts", index, "model")
    hint = f"make a plain adapter of it first: mediator extract-lora {loaded.recipe.base}"
    hint += f" {loaded.recipe.experts[index].model} -o {expert.name}-lora"
    copies = _copies(parts, pairs, base)
    extras = _extras(parts, copies)
    said = [Problem(place, f"{expert.name} {what}, which no merge of adapters keeps", hint) for what in extras]
    if stacked := [pair.tensor for pair in pairs if pair.n_experts > 1]:
        message = f"{expert.name} changes stacked experts (target_parameters), such as {stacked[0]}"
        said.append(Problem(place, message, "merge it into a full model, by a method that works on deltas"))
    found = _landings(source)
    notices = [f"{expert.name} holds {name} of its base beside its factors, which is left out" for name in copies]
    return _Opened({found[pair.a.name]: pair for pair in pairs}, tuple(said), tuple(notices))


def _copies(parts: Parts, pairs: Sequence[Pair], base: Checkpoint) -> list[str]:
    """List the base's own weights, of modules with factors, that PEFT saves beside those of embeddings."""
    wrapped = {pair.tensor for pair in pairs}
    shapes = {name: info.shape for name, info in base.tensors.items()}
    return [name for name, info in parts.wholes.items() if name in wrapped and shapes.get(name) == info.shape]


def _extras(parts: Parts, copies: Sequence[str]) -> Iterator[str]:
    roles = Counter(role for known in parts.wraps.values() for role in known)
    yield from (said for role, said in _ROLES.items() if roles[role])
    if others := [name for name in parts.wholes if name not in copies]:
        yield f"holds whole tensors (modules_to_save or biases), such as {others[0]}"


def _landings(adapter: Adapter) -> dict[str, Landing]:
    """Find where in the base each pair lies, by the name of its A in the file."""
    found: dict[str, list[tuple[str, int]]] = {}
    for name, change in adapter.changes.items():
        for product in change.products:
            for window in (product.left, product.right):
                found.setdefault(window.info.name, []).append((name, product.at))
    return {name: tuple(sorted(places)) for name, places in found.items()}


def _outline(pair: Pair) -> tuple[object, ...]:
    return pair.a.shape[1:], pair.b.shape[:1], pair.b.shape[2:], pair.is_embedding


def _dtype(loaded: LoadedRecipe, pairs: Sequence[Pair]) -> str:
    """Choose one dtype for all factors: the recipe's, else the one that the adapters have in common, else float32."""
    known = {info.dtype for pair in pairs for info in (pair.a, pair.b)}
    own = known.pop() if len(known) == 1 else "F32"
    return _DTYPES.get(loaded.recipe.output.dtype, own if own in ("BF16", "F16") else "F32")


def _module(
    landing: Landing, pairs: tuple[Pair | None, ...], settings: Mapping[str, TensorSettings], dtype: str
) -> ModulePlan:
    first = next(pair for pair in pairs if pair is not None)
    own = settings[landing[0][0]]
    name = first.tensor.removesuffix(".weight")
    return ModulePlan(name, landing[0][0], pairs, dtype, own.average, own.weights)


def _assemble(
    loaded: LoadedRecipe,
    base: Checkpoint,
    experts: tuple[ExpertSource, ...],
    modules: tuple[ModulePlan, ...],
    settings: Mapping[str, TensorSettings],
) -> Plan:
    changed = sorted({module.tensor for module in modules}, key=natural_key)
    recipe = loaded.recipe.model_copy(update={"assign": AssignSpec(rule="none")})
    return Plan(
        loaded=replace(loaded, recipe=recipe),
        base=base,
        experts=experts,
        tensors=tuple(_tensor(base, name, settings[name]) for name in changed),
        candidates=(),
        listed=(),
        tokenizer_folder=base.path,
        settings=TokenSettings({}, None),
        differences=(),
        notices=tuple(_notices(loaded, base, experts, modules)),
        modules=modules,
    )


def _tensor(base: Checkpoint, name: str, own: TensorSettings) -> TensorPlan:
    info, unit = base.tensors[name], unit_of(name, "layer")
    return TensorPlan(name, unit, info.shape, info.size, info.dtype, own.average, own.extract, own.weights)


def _notices(
    loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource], modules: Sequence[ModulePlan]
) -> Iterator[str]:
    yield from base_notices(loaded, base, experts)
    for index, expert in enumerate(experts):
        lacking = [module.name for module in modules if module.pairs[index] is None]
        if lacking:
            yield f"{expert.name} leaves {len(lacking)} of {len(modules)} modules as they are: {some_names(lacking)}"


def base_notices(loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource]) -> Iterator[str]:
    """Say which adapters name another base than the recipe's."""
    for expert in experts:
        source = expert.source
        if isinstance(source, Adapter) and not _same_base(source.base_name, loaded.recipe.base, base.path):
            yield f"adapter {expert.name} names base '{source.base_name}', the recipe's base is '{loaded.recipe.base}'"


def _same_base(named: str, written: str, folder: Path) -> bool:
    """Whether the base that an adapter names is the recipe's: an id, a copy of it, or a folder called the same."""
    plain = written.rstrip("/").split("@")[0]
    return named in ("", written, plain, str(folder)) or _last_part(named) in (_last_part(plain), folder.name.lower())


def _last_part(model: str) -> str:
    """Give the name of a model without its owner or folder; that of a snapshot in the Hub's cache is not its commit."""
    cached = re.search(r"models--[^/]+--([^/]+)/snapshots/", model)
    return (cached[1] if cached else model.rstrip("/").split("/")[-1]).lower()
