"""What each source says of its tokens: vocabulary, rows, and whether they can be matched with the base's."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.vocabulary import has_vocabulary, read_vocabulary, vocabulary_digest
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.plan.tokens.rows import TokenSource

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.vocabulary import Vocabulary
    from mediator_cli.plan.model import ExpertSource
    from mediator_cli.recipe.load import LoadedRecipe

_BRING = "put the tokenizer.json that it was trained with beside its weights"


@dataclass(frozen=True)
class OpenedSource:
    """A source as it is found: its rows by tensor, its vocabulary or what is wrong with it, and where to tell of it.

    `digest` is that of all tokenizer files, empty where there are none.
    """

    name: str
    place: str
    folder: Path
    rows: Mapping[str, int]
    vocabulary: Vocabulary | None = None
    digest: str = ""
    fault: Problem | None = None

    @property
    def n_rows(self) -> int:
        """The rows of its first tensor with a row per token."""
        return next(iter(self.rows.values()), 0)

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return label_of(self.name)


def label_of(name: str) -> str:
    """Call a source `the base` or `expert NAME`."""
    return "the base" if name == "base" else f"expert {name}"


def open_sources(
    loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource], widths: Mapping[str, int]
) -> list[OpenedSource]:
    """Read the vocabularies of base and experts; `widths` are elements of a row, by tensor of the base."""
    own = {tensor: base.tensors[tensor].size // width for tensor, width in widths.items()}
    places = {spec.name: loaded.place("experts", n, "model") for n, spec in enumerate(loaded.recipe.experts)}
    opened = [_open("base", loaded.place("base"), base.path, own)]
    for expert in experts:
        sizes = {tensor: _n_elements(expert, base, tensor) for tensor in widths}
        rows = {tensor: size // widths[tensor] for tensor, size in sizes.items() if size and not size % widths[tensor]}
        opened.append(_open(expert.name, places[expert.name], expert.source.path, rows))
    return opened


def _n_elements(expert: ExpertSource, base: Checkpoint, tensor: str) -> int | None:
    if tensor in expert.layout:
        return sum(span.size for span in expert.layout[tensor])
    if isinstance(expert.source, Adapter):
        return prod(expert.source.shapes.get(tensor, base.tensors[tensor].shape))
    info = expert.source.tensors.get(tensor)
    return None if info is None else info.size


def _open(name: str, place: str, folder: Path, rows: Mapping[str, int]) -> OpenedSource:
    if not has_vocabulary(folder):
        return OpenedSource(name, place, folder, rows)
    digest = vocabulary_digest(folder)
    try:
        return OpenedSource(name, place, folder, rows, read_vocabulary(folder), digest)
    except CheckpointError as error:
        return OpenedSource(name, place, folder, rows, None, digest, error.problems[0])


def uneven_rows(sources: Sequence[OpenedSource], kept: Collection[str]) -> Iterator[Problem]:
    """Find sources whose own tensors do not agree in the number of tokens; tensors in `kept` are not theirs."""
    for source in sources:
        merged = {tensor: n for tensor, n in source.rows.items() if tensor not in kept or source.name == "base"}
        if len(set(merged.values())) > 1:
            counts = ", ".join(f"{n} in {tensor}" for tensor, n in merged.items())
            yield Problem(
                f"{source.place}: {source.folder}",
                f"has unequal rows of tokens: {counts}",
                "is the checkpoint complete?",
            )


def is_by_position(sources: Sequence[OpenedSource]) -> bool:
    """Whether all sources have the base's tokens at the base's rows, as far as their tokenizer files tell."""
    return len({s.n_rows for s in sources if s.rows}) <= 1 and len({s.digest for s in sources if s.digest}) <= 1


def unread_notices(sources: Sequence[OpenedSource]) -> Iterator[str]:
    """Tell of tokenizers that cannot be read, or that the base lacks, where rows have to be matched."""
    if not sources[0].digest and any(source.vocabulary for source in sources):
        yield "the base brings no tokenizer: its rows are taken to be those of the experts' tokens"
    for source in sources:
        if source.fault is not None:
            fault = f"{source.fault.place} {source.fault.message}"
            yield f"the tokenizer of {source.label} cannot be compared, its rows are matched by position: {fault}"


def match_sources(sources: Sequence[OpenedSource]) -> tuple[list[TokenSource], list[Problem]]:
    """Give each source its vocabulary, that of the base where it brings none; problems where rows cannot be matched.

    Both are empty where nothing is known of any token and all sources have as many rows.
    """
    base = sources[0]
    vocabulary = base.vocabulary or _common(sources[1:])
    others = [source for source in sources[1:] if not _may_be_as_the_base(source, base)]
    if vocabulary is None:
        known = [source for source in sources[1:] if source.vocabulary is not None]
        return [], [_without_tokenizer(base, "those of the experts differ from each other")] if known else [
            _without_tokenizer(source, _other_rows(source, base)) for source in others
        ]
    problems = [_without_tokenizer(source, _other_rows(source, base)) for source in others]
    matched = [
        TokenSource(s.name, s.vocabulary or vocabulary, s.n_rows, frozenset(t for t in s.rows if s.rows[t] == s.n_rows))
        for s in sources
    ]
    return ([] if problems else matched), problems


def _common(experts: Sequence[OpenedSource]) -> Vocabulary | None:
    """Find the vocabulary that all experts with a vocabulary have."""
    known = [expert.vocabulary for expert in experts if expert.vocabulary is not None]
    return known[0] if known and all(other.tokens == known[0].tokens for other in known) else None


def _may_be_as_the_base(source: OpenedSource, base: OpenedSource) -> bool:
    return source.vocabulary is not None or not source.rows or source.n_rows == base.n_rows


def _other_rows(source: OpenedSource, base: OpenedSource) -> str:
    return f"it has {source.n_rows} rows of tokens, the base has {base.n_rows}"


def _without_tokenizer(source: OpenedSource, reason: str) -> Problem:
    if source.fault is not None:
        message = f"{source.fault.message}, and its rows must be matched by token: {reason}"
        return Problem(f"{source.place}: {source.fault.place}", message, source.fault.hint)
    return Problem(f"{source.place}: {source.folder}", f"brings no tokenizer to match rows by, and {reason}", _BRING)
