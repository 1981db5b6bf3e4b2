"""Rows that a recipe chooses for single tokens, and tokens that it adds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.vocabulary import AddedToken
from mediator_cli.errors import Problem, did_you_mean
from mediator_cli.plan.tokens.rows import ZEROS, Chosen
from mediator_cli.recipe.tokens import ZERO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.checkpoint.vocabulary import Vocabulary
    from mediator_cli.plan.tokens.rows import Rows, TokenSource
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.tokens import TokenSpec


def with_new_tokens(loaded: LoadedRecipe, vocabulary: Vocabulary) -> Vocabulary:
    """Add the tokens that the recipe names and a vocabulary lacks, behind all others."""
    added = dict(vocabulary.added)
    for text in loaded.recipe.tokens:
        if text not in vocabulary.tokens and text not in added:
            number = vocabulary.end + len(added) - len(vocabulary.added)
            added[text] = AddedToken(text, number, special=False, normalized=True)
    return replace(vocabulary, added=added)


def padded(loaded: LoadedRecipe, n_rows: int) -> int:
    """Round a number of rows up as the recipe's `pad_tokens_to` says."""
    multiple = loaded.recipe.pad_tokens_to or 1
    return -(-n_rows // multiple) * multiple


def choose_rows(loaded: LoadedRecipe, sources: Sequence[TokenSource]) -> tuple[dict[str, Chosen], list[Problem]]:
    """Find the rows that the recipe names for its tokens; give them, and what is wrong."""
    chosen: dict[str, Chosen] = {}
    problems: list[Problem] = []
    for text, spec in loaded.recipe.tokens.items():
        if spec.source is None:
            continue
        problems += _check(loaded, text, spec, sources)
        chosen[text] = Chosen(_rows(text, spec, sources), spec.force)
    return chosen, problems


def _rows(text: str, spec: TokenSpec, sources: Sequence[TokenSource]) -> Rows:
    if spec.source == ZERO:
        return ZEROS
    source = next((source for source in sources if source.name == spec.source), None)
    if source is None:
        return ()
    return ((source.name, spec.id),) if spec.id is not None else source.rows(spec.token or text)


def _check(loaded: LoadedRecipe, text: str, spec: TokenSpec, sources: Sequence[TokenSource]) -> Iterator[Problem]:
    names = [source.name for source in sources]
    if spec.source not in (*names, ZERO):
        hint = did_you_mean(str(spec.source), [*names, ZERO])
        yield Problem(loaded.place("tokens", text, "source"), f"no source '{spec.source}'", hint)
        return
    source = next((source for source in sources if source.name == spec.source), None)
    if source is None:
        return
    if spec.id is not None and spec.id >= source.n_rows:
        message = f"{source.name} has no row {spec.id}: it has {source.n_rows}"
        yield Problem(loaded.place("tokens", text, "id"), message, "choose a row that exists")
    elif spec.id is None and source.row(spec.token or text) is None:
        message = f"{source.name} has no row of {spec.token or text}"
        yield Problem(loaded.place("tokens", text), message, "name another source, or one of its tokens")
