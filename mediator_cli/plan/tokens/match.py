"""The output's tokens, and the rows that each source has for them, matched by text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.vocabulary import TOKENIZER_JSON
from mediator_cli.errors import Problem
from mediator_cli.plan.tokens.choose import choose_rows, padded, with_new_tokens
from mediator_cli.plan.tokens.notices import name_tokens, token_notices
from mediator_cli.plan.tokens.rows import TokenOutput, find_base_rows, make_layouts
from mediator_cli.plan.tokens.sources import is_by_position, match_sources, open_sources, uneven_rows, unread_notices
from mediator_cli.plan.tokens.tensors import vocabulary_size, vocabulary_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.spans import Layout
    from mediator_cli.checkpoint.vocabulary import Vocabulary
    from mediator_cli.plan.model import ExpertSource
    from mediator_cli.plan.tokens.rows import Chosen, TokenSource
    from mediator_cli.recipe.load import LoadedRecipe


@dataclass(frozen=True)
class VocabularyPlan:
    """The output's tokens: `rows` by tensor where their number changes, `layouts` by source where they move.

    `base` and `output` are None where no tokenizer could be read, `n_rows` where the base's config tells none. `union`
    is the output's vocabulary where tokens have to be added to the base's tokenizer.
    """

    n_rows: int | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    base: Vocabulary | None = None
    output: Vocabulary | None = None
    union: Vocabulary | None = None
    notices: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def plan_vocabulary(
    loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource], kept: Collection[str] = ()
) -> VocabularyPlan:
    """Match the rows of tokens of all sources by the texts of their tokens, as the recipe's `tokenizer` says.

    Tensors in `kept` are the base's, whatever the experts have. Problems are given, not raised.
    """
    tensors = vocabulary_tensors(base.tensors, base.config)
    n_rows = vocabulary_size(base.config) if tensors else None
    widths = {tensor: base.tensors[tensor].size // n_rows for tensor in tensors} if n_rows else {}
    opened = open_sources(loaded, base, experts, widths)
    by_name = {source.name: source.vocabulary for source in opened}
    found = VocabularyPlan(n_rows, base=by_name["base"], output=by_name.get(loaded.recipe.tokenizer_of))
    if problems := tuple(uneven_rows(opened, kept)):
        return replace(found, problems=problems)
    if is_by_position(opened) and not loaded.recipe.tokens and loaded.recipe.pad_tokens_to is None:
        return found
    sources, faults = match_sources(opened)
    notices = tuple(unread_notices(opened))
    if not sources:
        return replace(found, notices=notices, problems=(*faults, *_check_known(loaded)))
    planned = _match(loaded, base, sources, widths)
    return replace(planned, notices=(*notices, *planned.notices))


def _match(
    loaded: LoadedRecipe, base: Checkpoint, sources: Sequence[TokenSource], widths: Mapping[str, int]
) -> VocabularyPlan:
    winner = next((source for source in sources if source.name == loaded.recipe.tokenizer_of), sources[0])
    output = TokenOutput(winner.vocabulary, winner.n_rows, winner)
    chosen, problems = choose_rows(loaded, sources)
    if loaded.recipe.tokenizer == "union":
        vocabulary = _union(sources)
        output = TokenOutput(
            vocabulary,
            max(winner.n_rows, vocabulary.end if len(vocabulary.added) > len(winner.vocabulary.added) else 0),
            winner,
        )
        problems += _check_union(loaded, base, sources, vocabulary)
    problems += _check_new(loaded, output.vocabulary)
    output = _with_chosen(loaded, output, chosen)
    if not widths and any(source.vocabulary.tokens != output.vocabulary.tokens for source in sources):
        message = "the tokens of the sources differ, and config.json tells no vocab_size to find their rows by"
        problems.append(Problem(loaded.place("base"), message, "add vocab_size to the base's config.json"))
    base_rows = find_base_rows(output, sources[0], sources[1:])
    if lost := [output.vocabulary.texts[number] for number, rows in enumerate(base_rows) if not rows]:
        message = f"no source has rows of {name_tokens(lost)}, which the output's tokenizer has"
        problems.append(Problem(loaded.place("tokenizer"), message, "resize the embeddings of one, or take them out"))
    found = VocabularyPlan(output.n_rows, base=sources[0].vocabulary, output=output.vocabulary)
    if problems:
        return replace(found, problems=tuple(problems))
    return replace(
        found,
        union=output.vocabulary if len(output.vocabulary.added) > len(winner.vocabulary.added) else None,
        rows=dict.fromkeys(widths, output.n_rows) if output.n_rows != sources[0].n_rows else {},
        layouts=make_layouts(output, sources[0], sources[1:], widths),
        notices=tuple(token_notices(output, sources)),
    )


def _check_known(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Refuse to choose rows of tokens of which nothing is known."""
    for name in ("tokens", "pad_tokens_to"):
        if getattr(loaded.recipe, name):
            yield Problem(loaded.place(name), "no source brings a tokenizer that can be read", "leave it out")


def _check_new(loaded: LoadedRecipe, vocabulary: Vocabulary) -> Iterator[Problem]:
    """Refuse new tokens that have no place in the output's tokenizer."""
    new = [text for text in loaded.recipe.tokens if text not in vocabulary.tokens]
    if new and vocabulary.file.name != TOKENIZER_JSON:
        message = f"tokens are added to tokenizer.json, and {vocabulary.file.parent} has none"
        yield Problem(loaded.place("tokens", new[0]), message, "save it as tokenizer.json with save_pretrained")
    elif new and len(vocabulary.tokens) != vocabulary.end:
        message = f"the tokenizer's ids have gaps ({len(vocabulary.tokens)} tokens up to id {vocabulary.end - 1})"
        yield Problem(loaded.place("tokens", new[0]), f"{message}, so none can be added", "leave it out")


def _with_chosen(loaded: LoadedRecipe, output: TokenOutput, chosen: Mapping[str, Chosen]) -> TokenOutput:
    """Add what the recipe says of single tokens: new ones, their rows, and how many rows there are."""
    vocabulary = with_new_tokens(loaded, output.vocabulary)
    has_new = len(vocabulary.added) > len(output.vocabulary.added)
    n_rows = max(output.n_rows, vocabulary.end) if has_new else output.n_rows
    return replace(output, vocabulary=vocabulary, n_rows=padded(loaded, n_rows), chosen=chosen)


def _union(sources: Sequence[TokenSource]) -> Vocabulary:
    """Put the added tokens that experts have rows for behind the base's, in recipe order."""
    base = sources[0].vocabulary
    added, extra = dict(base.added), list(base.extra)
    for source in sources[1:]:
        own = source.vocabulary
        for text, token in sorted(own.added.items(), key=lambda item: item[1].id):
            if text not in base.tokens and text not in added and source.row(text) is not None:
                number = base.end + len(added) - len(base.added)
                added[text] = replace(token, id=number)
        extra += [text for text in own.extra if text in added and text not in extra]
    return replace(base, added=added, extra=tuple(extra))


def _check_union(
    loaded: LoadedRecipe, base: Checkpoint, sources: Sequence[TokenSource], union: Vocabulary
) -> Iterator[Problem]:
    place, own = loaded.place("tokenizer"), sources[0].vocabulary
    for source in sources[1:]:
        if not source.vocabulary.model.is_same(own.model):
            message = f"expert {source.name} cuts texts into tokens otherwise than the base (another tokenizer model)"
            hint = "its tokens would be dead rows; use `tokenizer: base` or `expert:NAME`, which match tokens by text"
            yield Problem(place, f"{message}, so there is no union", hint)
    if len(union.added) == len(own.added):
        return
    if not (base.path / TOKENIZER_JSON).is_file():
        hint = "load the base's tokenizer with AutoTokenizer and call save_pretrained"
        yield Problem(place, f"tokens are added to tokenizer.json, and {base.path} has none", hint)
    if len(own.tokens) != own.end:
        message = f"the base's token ids have gaps ({len(own.tokens)} tokens up to id {own.end - 1})"
        yield Problem(place, f"{message}, so none can be added", "use `tokenizer: expert:NAME`")
