"""What there is to say where the tokens of sources and output differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.errors import some_names
from mediator_cli.plan.tokens.sources import label_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mediator_cli.plan.tokens.rows import TokenOutput, TokenSource

_SHOWN = 5
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def name_tokens(texts: Iterable[str]) -> str:
    """Count tokens and name the first few.

    >>> name_tokens(["<a>", "<b>"])
    '2 tokens (<a>, <b>)'
    """
    known = list(texts)
    count = "1 token" if len(known) == 1 else f"{len(known)} tokens"
    return f"{count} ({some_names(known, _SHOWN)})"


def token_notices(output: TokenOutput, sources: Sequence[TokenSource]) -> Iterator[str]:
    """Tell of all that is matched, filled in, padded or left out; `sources` have the base first."""
    base, experts = sources[0], sources[1:]
    yield from _new_tokens(output, base, experts)
    if output.chosen:
        yield f"the recipe chooses the rows of {name_tokens(output.chosen)}"
    for source in sources:
        yield from _lost_and_lacking(output, source, base)
        yield from _moved(output, source)
        yield from _rows(output, source)
    yield from _taken_over(output, base)
    yield from _flags(output, sources)
    yield from _roles(output, sources)


def _new_tokens(output: TokenOutput, base: TokenSource, experts: Sequence[TokenSource]) -> Iterator[str]:
    """Tell of tokens that the base lacks, by the experts that have them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for text in _with_row(output):
        if base.row(text) is None and text not in output.chosen:
            groups.setdefault(tuple(e.name for e in experts if e.row(text) is not None), []).append(text)
    for names, texts in groups.items():
        origin = f"those of {names[0]}" if len(names) == 1 else f"the mean of {', '.join(names)}"
        yield f"the base has no rows of {name_tokens(texts)}: they are {origin}"


def _lost_and_lacking(output: TokenOutput, source: TokenSource, base: TokenSource) -> Iterator[str]:
    label = label_of(source.name)
    if rowless := [text for text in source.vocabulary.tokens if source.row(text) is None]:
        yield f"{label} has a tokenizer with {name_tokens(rowless)} beyond its {source.n_rows} rows"
    if lost := [
        text
        for text in source.vocabulary.tokens
        if text not in output.vocabulary.tokens and source.row(text) is not None
    ]:
        yield f"{name_tokens(lost)} of {label} are not in the output: their rows are not used"
    if source is base:
        return
    if lacking := [text for text in _with_row(output) if source.row(text) is None and text not in output.chosen]:
        yield f"{label} has no rows of {name_tokens(lacking)}: it counts as the base there"


def _with_row(output: TokenOutput) -> Iterator[str]:
    return (text for text, number in output.vocabulary.tokens.items() if number < output.n_rows)


def _moved(output: TokenOutput, source: TokenSource) -> Iterator[str]:
    label, tokens = label_of(source.name), output.vocabulary.tokens
    if moved := [text for text, number in source.vocabulary.tokens.items() if tokens.get(text, number) != number]:
        yield f"{label} has other ids for {name_tokens(moved)}: rows go by the token's text"
    if restated := source.vocabulary.restated:
        ids = source.vocabulary.tokens
        text, stated = next(iter(restated.items()))
        wrong = f"{text} is stated as {stated}, loads as {ids[text]}"
        yield f"{label} has a tokenizer file with wrong ids of {name_tokens(restated)}: {wrong}"


def _rows(output: TokenOutput, source: TokenSource) -> Iterator[str]:
    label = label_of(source.name)
    if source.n_rows != output.n_rows:
        yield f"{label} has {source.n_rows} rows of tokens, the output has {output.n_rows}"
    is_read = source.name in ("base", output.padding.name)
    unused = sum(number not in source.vocabulary.texts for number in range(source.n_rows))
    is_same = source.n_rows == output.n_rows and source.vocabulary.tokens == output.vocabulary.tokens
    if unused and not is_read and not is_same:
        yield f"{unused} rows of {label} stand for no token and are not used"


def _taken_over(output: TokenOutput, base: TokenSource) -> Iterator[str]:
    tokens = output.vocabulary.tokens
    free = [text for text, number in tokens.items() if number < base.n_rows and number not in base.vocabulary.texts]
    if free:
        yield f"{name_tokens(free)} take rows of the base that stood for no token"


def _flags(output: TokenOutput, sources: Sequence[TokenSource]) -> Iterator[str]:
    for text, token in output.vocabulary.added.items():
        for source in sources:
            other = source.vocabulary.added.get(text)
            differing = [name for name, value in token.flags.items() if other and other.flags[name] != value]
            if differing:
                values = ", ".join(f"{name} {str(token.flags[name]).lower()}" for name in differing)
                yield f"{label_of(source.name)} defines {text} otherwise; in the output it has {values}"


def _roles(output: TokenOutput, sources: Sequence[TokenSource]) -> Iterator[str]:
    for role in _ROLES:
        chosen = output.vocabulary.roles.get(role)
        found = {source.name: source.vocabulary.roles.get(role) for source in sources}
        others = [f"{text or 'none'} in {label_of(name)}" for name, text in found.items() if text != chosen]
        if others:
            yield f"{role} is {chosen or 'none'} in the output, {', '.join(others)}"
