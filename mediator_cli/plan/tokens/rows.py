"""Rows of tokens, matched by text: what each source has for the output's tokens, as layouts.

A token that an expert lacks is read from the base, so that its delta is zero; a token that the base lacks is the mean
over the experts that have it, for the base and for the experts that lack it. Rows of no token stay the base's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.spans import Part, Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mediator_cli.checkpoint.spans import Layout
    from mediator_cli.checkpoint.vocabulary import Vocabulary

    Rows = tuple[tuple[str, int], ...]
    """A row of the output: the rows of sources that it is the mean of; empty where no source has one."""
    _Run = tuple[int, Rows]

_NOWHERE = "zero"
ZEROS: Rows = ((_NOWHERE, 0),)
"""A row of zeros."""


@dataclass(frozen=True)
class Chosen:
    """The row that the recipe names for a token: for sources that lack it, or with `force` for all."""

    rows: Rows
    force: bool


@dataclass(frozen=True)
class TokenSource:
    """The tokens of a source, the number of rows that it has for them, and the tensors in which it has them."""

    name: str
    vocabulary: Vocabulary = field(repr=False)
    n_rows: int
    tensors: frozenset[str]

    def row(self, text: str) -> int | None:
        """The row of a token; None where the source lacks it or its tensors end before."""
        number = self.vocabulary.tokens.get(text)
        return number if number is not None and number < self.n_rows else None

    def rows(self, text: str) -> Rows:
        """The row of a token with the source's name; empty where it has none."""
        number = self.row(text)
        return () if number is None else ((self.name, number),)


@dataclass(frozen=True)
class TokenOutput:
    """The tokens of the output and its number of rows; `padding` has the rows of no token that the base lacks.

    `chosen` are the rows that the recipe names, by token.
    """

    vocabulary: Vocabulary = field(repr=False)
    n_rows: int
    padding: TokenSource
    chosen: Mapping[str, Chosen] = field(default_factory=dict)

    def row(self, text: str, own: Rows, other: Rows) -> Rows:
        """Give a source's row of a token: its own, or where it has none the chosen one, or `other`."""
        chosen = self.chosen.get(text)
        if chosen is None:
            return own or other
        return chosen.rows if chosen.force else own or chosen.rows


def find_base_rows(output: TokenOutput, base: TokenSource, experts: Sequence[TokenSource]) -> list[Rows]:
    """Find what the base reads for each row of the output."""
    texts = output.vocabulary.texts
    return [_base_row(number, texts.get(number), output, base, experts) for number in range(output.n_rows)]


def _base_row(
    number: int, text: str | None, output: TokenOutput, base: TokenSource, experts: Sequence[TokenSource]
) -> Rows:
    if text is not None:
        return output.row(text, base.rows(text), tuple(row for expert in experts for row in expert.rows(text)))
    owner = base if number < base.n_rows else output.padding
    return ((owner.name, number),) if number < owner.n_rows else ZEROS


def make_layouts(
    output: TokenOutput, base: TokenSource, experts: Sequence[TokenSource], widths: Mapping[str, int]
) -> dict[str, Layout]:
    """Make the layouts of all sources that differ from the output; `widths` are elements of a row, by tensor."""
    layouts: dict[str, dict[str, tuple[Span, ...]]] = {}
    for tensors in _alike(widths, experts):
        having = [expert for expert in experts if tensors <= expert.tensors]
        base_rows = find_base_rows(output, base, having)
        for source in (base, *having):
            if runs := _runs(output, source, base_rows):
                made = {tensor: _spans(runs, tensor, widths[tensor]) for tensor in sorted(tensors)}
                layouts.setdefault(source.name, {}).update(made)
    return dict(layouts)


def _alike(widths: Mapping[str, int], experts: Sequence[TokenSource]) -> list[frozenset[str]]:
    """Group tensors by the experts that have them."""
    groups: dict[tuple[str, ...], set[str]] = {}
    for tensor in widths:
        groups.setdefault(tuple(e.name for e in experts if tensor in e.tensors), set()).add(tensor)
    return [frozenset(group) for group in groups.values()]


def _runs(output: TokenOutput, source: TokenSource, base_rows: Sequence[Rows]) -> list[_Run]:
    """Gather the rows that one source gives into runs; none where it is read as it is."""
    if source.n_rows == output.n_rows and source.vocabulary.tokens == output.vocabulary.tokens and not output.chosen:
        return []
    texts = output.vocabulary.texts
    own: Iterable[Rows] = base_rows
    if source.name != "base":
        numbered = enumerate(base_rows)
        own = (output.row(texts[n], source.rows(texts[n]), row) if n in texts else row for n, row in numbered)
    runs = _gathered(own)
    return [] if runs == [(source.n_rows, ((source.name, 0),))] and source.n_rows == output.n_rows else runs


def _gathered(rows: Iterable[Rows]) -> list[_Run]:
    # In numbers, not in spans of one row each: those take seconds for a vocabulary in another order.
    runs: list[_Run] = []
    count = 0
    first: Rows = ()
    for row in rows:
        if (
            count
            and len(row) == len(first)
            and all(
                name == start[0] and number == start[1] + count
                for (name, number), start in zip(row, first, strict=True)
            )
        ):
            count += 1
            continue
        if count:
            runs.append((count, first))
        count, first = 1, row
    return [*runs, (count, first)] if count else runs


def _spans(runs: Iterable[_Run], tensor: str, width: int) -> tuple[Span, ...]:
    return tuple(
        Span(count * width, tuple(Part(n, tensor, number * width) for n, number in first if n != _NOWHERE))
        for count, first in runs
    )
