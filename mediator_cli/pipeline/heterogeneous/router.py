"""The router that a model starts with, fitted on what it will read: mean embeddings of prompts in the chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.heterogeneous import ROUTER
from mediator_cli.checkpoint.read import open_files, read_slab, widen
from mediator_cli.errors import BundleError, Problem, RecipeError
from mediator_cli.pipeline.heterogeneous.start import RouterStart, fitted_router, random_router
from mediator_cli.plan.prompts import read_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.pipeline.heterogeneous.model import HeterogeneousPlan
    from mediator_cli.runtime.fit import Chosen

_DOUBTFUL = 0.9


def choose_texts(plan: HeterogeneousPlan) -> Chosen | None:
    """Read the prompts of all experts, and share them out; None where the router starts at random.

    Raises RecipeError where no router can be fitted on them.
    """
    if plan.router_init == "random":
        return None
    from mediator_cli.runtime.fit import FitSettings, choose_prompts  # noqa: PLC0415 - imports torch

    prompts = {expert.name: read_prompts(expert.prompts) for expert in plan.experts if expert.prompts is not None}
    try:
        return choose_prompts(prompts, FitSettings(max_prompts=plan.loaded.recipe.router.max_prompts))
    except BundleError as error:
        place = plan.loaded.place("experts")
        raise RecipeError([Problem(f"{place}: {p.place}", p.message, p.hint) for p in error.problems]) from None


def start_router(
    plan: HeterogeneousPlan, chosen: Chosen | None, folder: Path, embedding: TensorInfo
) -> tuple[RouterStart, tuple[str, ...]]:
    """Make the router for embeddings that are written already; give what is worth knowing of it."""
    shape = (len(plan.experts), plan.width)
    if chosen is None:
        return random_router(plan.loaded.recipe.seed, ROUTER, shape), ()
    fitted, labels = _features(folder, embedding, chosen.fitted)
    router = fitted_router(plan.router_init, fitted, labels, shape[0])
    features, expected = _features(folder, embedding, chosen.held_out)
    right = float((router.logits(features).argmax(axis=1) == expected).mean())
    said = f"the router starts right on {right:.1%} of {len(expected)} held-out prompts"
    return router, (
        *chosen.notices,
        said if right >= _DOUBTFUL else f"{said}: are the tasks told apart by their words?",
    )


def _features(
    folder: Path, embedding: TensorInfo, texts: Mapping[str, Sequence[str]]
) -> tuple[Floats, NDArray[np.int64]]:
    """Give the mean embedding [rows, width] of each prompt, and the number of its expert [rows]."""
    from mediator_cli.runtime.prompts import chat_ids, load_tokenizer  # noqa: PLC0415 - imports transformers

    tokenizer = load_tokenizer(folder)
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for group in texts.values() for text in group]
    tokens = sorted({token for prompt in prompts for token in prompt})
    table = dict(zip(tokens, _read_rows(embedding, tokens), strict=True))
    means = [np.mean([table[token] for token in prompt], axis=0, dtype=np.float64) for prompt in prompts]
    labels = np.repeat(np.arange(len(texts)), [len(group) for group in texts.values()])
    return np.stack(means).astype(np.float32), labels


def _read_rows(embedding: TensorInfo, tokens: Sequence[int]) -> Floats:
    """Read rows of the written embedding [tokens, width]."""
    width = embedding.shape[1]
    found = np.empty((len(tokens), width), np.float32)
    with open_files([embedding.file]) as handles:
        for at, token in enumerate(tokens):
            widen(read_slab(handles, embedding, token * width, (token + 1) * width), embedding.dtype, found[at])
    return found
