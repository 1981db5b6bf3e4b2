"""(Recipe, headers) to plan: every problem at once, each with the line of the recipe that it comes from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.checkpoint.heterogeneous import (
    EMBED,
    HEAD,
    HEAD_BIAS,
    ROUTER,
    ROUTER_BIAS,
    body_tensor,
    layer_sizes,
    projector_tensors,
)
from mediator_cli.checkpoint.hub.find import ONLINE, Access
from mediator_cli.checkpoint.source import find_location, is_adapter, open_checkpoint
from mediator_cli.checkpoint.vocabulary import TOKENIZER_JSON, read_vocabulary
from mediator_cli.checkpoint.write import NewTensor
from mediator_cli.errors import BundleError, CheckpointError, MediatorError, Problem, RecipeError, some_names
from mediator_cli.pipeline.heterogeneous.model import HeterogeneousPlan, PlannedExpert
from mediator_cli.pipeline.heterogeneous.tokens import rows_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.vocabulary import Vocabulary
    from mediator_cli.moe.heterogeneous.bodies import Body
    from mediator_cli.recipe.heterogeneous import HeterogeneousExpert, LoadedHeterogeneous

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_POSSIBLE = (
    "experts are causal language models of transformers that take inputs_embeds and past_key_values, with a plain "
    "linear head: Llama, Mistral, Qwen, GPT-2, GPT-NeoX, Phi, Gemma, OLMo, Granite and the like"
)
_MERGE_FIRST = "merge it into its base first: PEFT's merge_and_unload, or a recipe with one expert and rule none"
_BRING = "put the tokenizer.json that it was trained with beside its weights"


def plan_heterogeneous(loaded: LoadedHeterogeneous, access: Access = ONLINE) -> HeterogeneousPlan:
    """Resolve a recipe against its checkpoints; reads headers, configs and tokenizers only.

    Raises RecipeError with every problem found, ordered by line.
    """
    problems = list(_check_recipe(loaded))
    opened: list[PlannedExpert] = []
    for number, spec in enumerate(loaded.recipe.experts):
        try:
            opened.append(_open(loaded, spec, access))
        except MediatorError as error:
            place = loaded.place("experts", number, "model")
            problems += [replace(item, place=f"{place}: {item.place}".rstrip(": ")) for item in error.problems]
    if problems:
        raise RecipeError(sorted(problems, key=lambda problem: _line(loaded, problem)))
    output, adds = _output_vocabulary(loaded, opened)
    experts = _placed(loaded, opened, output)
    _check_rows(loaded, experts, output)
    return _assemble(loaded, experts, output, adds)


def _line(loaded: LoadedHeterogeneous, problem: Problem) -> int:
    number = problem.place.removeprefix(f"{loaded.path}:").split(" ")[0]
    return int(number) if number.isdigit() else 0


def _check_recipe(loaded: LoadedHeterogeneous) -> Iterator[Problem]:
    recipe = loaded.recipe
    if recipe.top_k > len(recipe.experts):
        message = f"{recipe.top_k} experts are to answer, the recipe has {len(recipe.experts)}"
        yield Problem(loaded.place("top_k"), message, f"give {len(recipe.experts)} or less")
    without = [n for n, expert in enumerate(recipe.experts) if expert.prompts is None]
    if recipe.router.init in ("prototype", "logistic"):
        hint = "add `prompts`, or start the router with `router: {init: random}` and train it"
        for number in without:
            message = f"router.init {recipe.router.init} needs prompts of every expert"
            yield Problem(loaded.place("experts", number), f"{message}, {recipe.experts[number].name} has none", hint)
        if len(recipe.experts) < 2:
            message = f"{recipe.router.init} tells experts apart, and there is one"
            yield Problem(loaded.place("router", "init"), message, "write `random`")
    for number, expert in enumerate(recipe.experts):
        if expert.prompts is not None and not loaded.resolve(expert.prompts).is_file():
            place = loaded.place("experts", number, "prompts")
            yield Problem(place, f"{loaded.resolve(expert.prompts)} is not there", "check the path")


def _open(loaded: LoadedHeterogeneous, spec: HeterogeneousExpert, access: Access) -> PlannedExpert:
    """Open one expert; raise MediatorError with what is wrong with it."""
    location = find_location(spec.model, loaded.resolve(spec.model), access)
    if is_adapter(location.folder):
        raise CheckpointError(Problem(location.shown, "is an adapter, and whole models are needed here", _MERGE_FIRST))
    source = open_checkpoint(location.folder, location.repo)
    vocabulary = read_vocabulary(location.folder)
    if vocabulary is None:
        raise CheckpointError(Problem(location.shown, "brings no tokenizer to match rows of tokens by", _BRING))
    prompts = loaded.resolve(spec.prompts) if spec.prompts else None
    body = _body(location.shown, source)
    return PlannedExpert(spec.name, source, body, vocabulary, np.empty(0, np.int64), prompts=prompts)


def _body(shown: str, source: Checkpoint) -> Body:
    from mediator_cli.moe.heterogeneous.bodies import find_body  # noqa: PLC0415 - asks transformers, takes seconds

    kind = source.config.get("model_type", "a model without model_type")
    try:
        return find_body(source.config, source.tensors)
    except BundleError as error:
        found = [Problem(shown, f"{kind} can be no expert: it {item.message}", _POSSIBLE) for item in error.problems]
        raise CheckpointError(found) from None


def _output_vocabulary(loaded: LoadedHeterogeneous, experts: Sequence[PlannedExpert]) -> tuple[Vocabulary, bool]:
    """Give the output's vocabulary, and whether it has tokens that the chosen tokenizer lacks."""
    owner = next(expert for expert in experts if expert.name == loaded.recipe.tokenizer_of)
    own = owner.vocabulary
    if loaded.recipe.added_tokens == "own":
        return own, False
    added = dict(own.added)
    for expert in experts:
        for text, token in sorted(expert.vocabulary.added.items(), key=lambda item: item[1].id):
            if text not in own.tokens and text not in added and token.id < _n_rows(expert):
                added[text] = replace(token, id=own.end + len(added) - len(own.added))
    is_longer = len(added) > len(own.added)
    if is_longer and own.file.name != TOKENIZER_JSON:
        message = f"tokens are added to tokenizer.json, and {own.file.parent} has none"
        hint = "load its tokenizer with AutoTokenizer and call save_pretrained, or write `added_tokens: own`"
        raise RecipeError(Problem(loaded.place("added_tokens"), message, hint))
    if is_longer and len(own.tokens) != own.end:
        message = f"the token ids of {owner.name} have gaps, so none can be added"
        raise RecipeError(Problem(loaded.place("added_tokens"), message, "write `added_tokens: own`"))
    return replace(own, added=added), is_longer


def _n_rows(expert: PlannedExpert) -> int:
    return min(expert.info(name).shape[0] for name in (expert.body.embedding, expert.body.head))


def _placed(
    loaded: LoadedHeterogeneous, experts: Sequence[PlannedExpert], output: Vocabulary
) -> tuple[PlannedExpert, ...]:
    """Give each expert its rows and its place in the shared width."""
    found: list[PlannedExpert] = []
    start = 0
    for expert in experts:
        rows = rows_for(output, expert.vocabulary, _n_rows(expert))
        found.append(replace(expert, rows=rows, start=start))
        start += expert.body.width if loaded.recipe.width == "sum" else 0
    return tuple(found)


def _check_rows(loaded: LoadedHeterogeneous, experts: Sequence[PlannedExpert], output: Vocabulary) -> None:
    lost = np.flatnonzero(np.all([expert.rows < 0 for expert in experts], axis=0))
    names = [output.texts[number] for number in lost.tolist() if number in output.texts]
    if names:
        message = f"no expert has rows of {some_names(names)}, which the output's tokenizer has"
        hint = "resize the embeddings of one, or choose another tokenizer"
        raise RecipeError(Problem(loaded.place("tokenizer"), message, hint))


def _assemble(
    loaded: LoadedHeterogeneous, experts: tuple[PlannedExpert, ...], output: Vocabulary, adds: bool
) -> HeterogeneousPlan:
    recipe = loaded.recipe
    width = (sum if recipe.width == "sum" else max)(expert.body.width for expert in experts)
    is_tied = all(expert.body.is_tied for expert in experts)
    dtype = _dtype(recipe.output.dtype, experts)
    copied = {
        body_tensor(number, name): (expert, stored)
        for number, expert in enumerate(experts)
        for name, stored in expert.body.tensors.items()
    }
    made = _made(loaded, experts, output.end, width, is_tied=is_tied)
    bodies = {name: _copied(name, expert, stored, dtype) for name, (expert, stored) in copied.items()}
    has_prompts = all(expert.prompts is not None for expert in experts) and len(experts) > 1
    init = recipe.router.init if recipe.router.init != "auto" else "logistic" if has_prompts else "random"
    return HeterogeneousPlan(
        loaded=loaded,
        experts=experts,
        vocabulary=output,
        adds_tokens=adds,
        width=width,
        tensors=(*(NewTensor(name, dtype, shape) for name, shape in made.items()), *bodies.values()),
        copied=copied,
        is_tied=is_tied,
        dtype=dtype,
        router_init=init,
        notices=tuple(_notices(loaded, experts, init)),
    )


def _dtype(wanted: str, experts: Sequence[PlannedExpert]) -> str:
    if wanted != "auto":
        return _DTYPES[wanted]
    found = {expert.info(name).dtype for expert in experts for name in expert.body.tensors.values()}
    found &= set(FLOAT_DTYPES)
    return found.pop() if len(found) == 1 and found <= set(_DTYPES.values()) else "F32"


def _copied(name: str, expert: PlannedExpert, stored: str, dtype: str) -> NewTensor:
    info = expert.info(stored)
    return NewTensor(name, dtype if info.dtype in FLOAT_DTYPES else info.dtype, info.shape)


def _made(
    loaded: LoadedHeterogeneous, experts: Sequence[PlannedExpert], n_tokens: int, width: int, *, is_tied: bool
) -> dict[str, tuple[int, ...]]:
    """Give the shapes of all tensors that are no expert's, in the order in which they are written."""
    spec = loaded.recipe.projectors
    shapes: dict[str, tuple[int, ...]] = {EMBED: (n_tokens, width)}
    if not is_tied:
        shapes[HEAD] = (n_tokens, width)
    if any(expert.body.head_bias for expert in experts):
        shapes[HEAD_BIAS] = (n_tokens,)
    shapes |= {ROUTER: (len(experts), width), ROUTER_BIAS: (len(experts),)}
    for number, expert in enumerate(experts):
        for which, ends in (("proj_in", (width, expert.body.width)), ("proj_out", (expert.body.width, width))):
            for layer, (first, second) in enumerate(layer_sizes(ends, spec.depth, spec.width)):
                weight, bias = projector_tensors(number, which, layer)
                shapes |= {weight: (second, first), bias: (second,)}
    return shapes


def _notices(loaded: LoadedHeterogeneous, experts: Sequence[PlannedExpert], init: str) -> Iterator[str]:
    total = len(experts[0].rows)
    for expert in experts:
        known = int((expert.rows >= 0).sum())
        if known < total and expert.name != loaded.recipe.tokenizer_of:
            yield f"expert {expert.name} knows {known} of the {total} tokens of {loaded.recipe.tokenizer_of}"
    if init == "random" and len(experts) > 1:
        without = [expert.name for expert in experts if expert.prompts is None]
        why = f", since {some_names(without)} have no prompts" if loaded.recipe.router.init == "auto" else ""
        alone = ", with top_k 2 or more: with top_k 1 no gradient reaches it" if loaded.recipe.top_k == 1 else ""
        yield f"the router starts at random{why}: train it before it is used{alone}"
    if loaded.recipe.projectors.init == "random":
        yield "projectors start at random: the model says nothing sensible before it is trained"


def facts_of(plan: HeterogeneousPlan) -> list[Mapping[str, Any]]:
    """Give what config.json says of each expert."""
    return [
        {"name": e.name, "start": e.start, "width": e.body.width, "config": dict(e.source.config)} for e in plan.experts
    ]
