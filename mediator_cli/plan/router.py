"""Whether a recipe gets a router, and what stands in its way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.checkpoint.layout import layers_of
from mediator_cli.checkpoint.source import side_files
from mediator_cli.errors import CheckpointError, Problem, did_you_mean
from mediator_cli.plan.prompts import read_prompts
from mediator_cli.recipe.router import RouterSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.recipe.load import LoadedRecipe


def resolve_router(loaded: LoadedRecipe) -> tuple[RouterSpec | None, tuple[str, ...]]:
    """Decide whether a router is fitted, by which settings, and say why none is where one could be expected."""
    recipe = loaded.recipe
    if recipe.kind == "moe":
        return None, ()
    without = _without_prompts(loaded)
    if recipe.router is None and len(without) == len(recipe.experts):
        return None, ()
    reason = ""
    if recipe.assign.rule == "none":
        reason = "rule none routes no unit"
    elif len(recipe.experts) < 2:
        reason = "the recipe has one expert"
    elif without and not _asks_without_fit(recipe.router):
        reason = f"no prompts are given for {', '.join(without)}"
    if reason:
        return None, (f"no router is fitted: {reason}",)
    return recipe.router or RouterSpec(), ()


def check_router(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Check the prompts of all experts, and the router against the experts; reads no checkpoint."""
    yield from _check_prompts(loaded)
    spec, experts = loaded.recipe.router, [expert.name for expert in loaded.recipe.experts]
    if spec is None:
        return
    without = _without_prompts(loaded)
    if len(experts) < 2:
        message = "a router chooses between experts, the recipe has one"
        yield Problem(loaded.place("router"), message, "remove `router` or add an expert")
    if without and not _asks_without_fit(spec):
        message = f"needs prompts of every expert, none are given for {', '.join(without)}"
        yield Problem(loaded.place("router"), message, "add `prompts` to the experts, or remove `router`")
    if spec.policy.k is not None and spec.policy.k > len(experts):
        message = f"{spec.policy.k} experts are to be mixed, the recipe has {len(experts)}"
        yield Problem(loaded.place("router", "policy", "k"), message, f"give {len(experts)} or less")
    for name in spec.policy.weights or {}:
        if name not in experts:
            place = loaded.place("router", "policy", "weights", name)
            yield Problem(place, f"no expert '{name}'", did_you_mean(name, experts))


def check_router_base(loaded: LoadedRecipe, base: Checkpoint, tokenizer_folder: Path | None) -> Iterator[Problem]:
    """Check that the base has the layers and the tokenizer that the router needs."""
    spec, _ = resolve_router(loaded)
    if spec is None:
        return
    n_layers = len(layers_of(base.tensors))
    if spec.layer is not None and spec.layer > n_layers:
        place = loaded.place("router", "layer")
        yield Problem(place, f"{spec.layer} layers are to run, the base has {n_layers}", f"give {n_layers} or less")
    if not any(side_files(folder) for folder in (tokenizer_folder, base.path) if folder is not None):
        field = ("router",) if loaded.recipe.router else ("experts",)
        message = f"a router needs a tokenizer, {base.path} holds none"
        yield Problem(loaded.place(*field), message, "add tokenizer.json and tokenizer_config.json to the base")


def _asks_without_fit(spec: RouterSpec | None) -> bool:
    """Whether a router needs no prompts: the experts are asked, and nothing is fitted to what they say."""
    return spec is not None and spec.classifier == "none"


def _without_prompts(loaded: LoadedRecipe) -> list[str]:
    return [expert.name for expert in loaded.recipe.experts if expert.prompts is None]


def _check_prompts(loaded: LoadedRecipe) -> Iterator[Problem]:
    for index, expert in enumerate(loaded.recipe.experts):
        if expert.prompts is None:
            continue
        place, file = loaded.place("experts", index, "prompts"), loaded.resolve(expert.prompts)
        if not file.is_file():
            yield Problem(place, f"no such file: {file}", "check the path")
            continue
        try:
            read_prompts(file)
        except CheckpointError as error:
            for problem in error.problems:
                yield Problem(f"{place}: {problem.place}", problem.message, problem.hint)
