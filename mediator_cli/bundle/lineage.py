"""What a model was made of, as its card tells it: a table of its parents, and metadata that the Hub reads."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from mediator_cli.bundle.card import CARD, with_block
from mediator_cli.bundle.licences import common_licence, licence_facts
from mediator_cli.checkpoint.remote.url import is_url, redacted
from mediator_cli.errors import BundleError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mediator_cli.bundle.manifest import SourceRecord
    from mediator_cli.bundle.record import SourceFile

_BLOCK = "lineage"
_TABLE = re.compile(r"^\| source \| from \| licence \|\n\|---\|---\|---\|\n(\|.*\n)*", re.MULTILINE)
"""The table that a merge writes into the card; the block goes into its place."""
_HEAD = re.compile(r"---\n(.*?\n?)---\n", re.DOTALL)
_SNAPSHOT = re.compile(r"(^|/)models--(?P<name>[\w.-]+--[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")
_DIGITS = 16


@dataclass(frozen=True)
class Parent:
    """A model that another was made of; `revision` is a commit of the Hub, None where `path` is no Hub id."""

    name: str
    path: str
    revision: str | None = None
    license: str | None = None
    digest: str = ""

    @property
    def hub_id(self) -> str | None:
        """Its repository on the Hub, where it came from there."""
        return self.path.partition("@")[0] if self.revision is not None else None


def parents_of(sources: Iterable[SourceRecord]) -> tuple[Parent, ...]:
    """Read the parents from the sources of a manifest."""
    return tuple(Parent(s.name, *_origin(s), s.license, _digest(s.files)) for s in sources)


def _origin(source: SourceRecord) -> tuple[str, str | None]:
    """Give path and commit of a source; a snapshot in the Hub's cache is the repository that it is of."""
    cached = _SNAPSHOT.search(source.path) if source.revision is None else None
    return (cached["name"].replace("--", "/", 1), cached["commit"]) if cached else (source.path, source.revision)


def _digest(files: Sequence[SourceFile]) -> str:
    """Give the digest of the one weight file, or SHA-256 over lines `digest  name` of several."""
    if len(files) == 1:
        return files[0].digest
    lines = "".join(f"{file.digest}  {file.name}\n" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256(lines.encode()).hexdigest() if lines else ""


def label(path: str) -> str:
    """Name a source on a card.

    >>> label("org/name"), label("../experts/maths"), label("/home/me/models/maths/"), label("s3://key:x@bucket/a")
    ('org/name', '../experts/maths', 'maths', 's3://***@bucket/a')
    """
    if is_url(path):
        return redacted(path)
    # A card travels; an absolute path of the machine that made it does not belong on it.
    is_own = os.path.isabs(path) or path.startswith("~")  # noqa: PTH117
    return os.path.basename(path.rstrip("/")) if is_own else path  # noqa: PTH119


def card_facts(parents: Sequence[Parent]) -> dict[str, Any]:
    """Give the metadata that follows from the parents: base_model of those on the Hub, and the licence."""
    bases = list(dict.fromkeys(parent.hub_id for parent in parents if parent.hub_id))
    facts: dict[str, Any] = {"base_model": bases} if bases else {}
    return {**facts, "base_model_relation": "merge", **licence_facts(licences_of(parents))}


def licences_of(parents: Iterable[Parent]) -> dict[str, str | None]:
    """Give the licence that each parent declares."""
    return {parent.name: parent.license for parent in parents}


def read_facts(card: str) -> dict[str, Any]:
    """Read the metadata at the head of a card; raise BundleError where it is no YAML mapping."""
    head = _HEAD.match(card)
    try:
        facts = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        facts = None
    if facts is not None and not isinstance(facts, dict):
        facts = None
    if facts is None and head and head[1].strip():
        raise BundleError(Problem(CARD, "the metadata between its first two --- is no YAML mapping", "mend it"))
    return facts or {}


def with_facts(card: str, facts: Mapping[str, Any]) -> str:
    r"""Add metadata to a card: what it says already stays, lists `tags` and `base_model` get what they lack.

    >>> with_facts("---\nlicense: mit\ntags: [a]\n---\n# t\n", {"license": "other", "tags": ["a", "b"]})
    '---\nlicense: mit\ntags:\n- a\n- b\n---\n# t\n'
    """
    old = read_facts(card)
    new = {**old, **{name: value for name, value in facts.items() if name not in old}}
    if "license" in old:
        new = {name: new[name] for name in new if name in old or not name.startswith("license")}
    for name in ("tags", "base_model"):
        if name in old and name in facts:
            new[name] = list(dict.fromkeys([*_listed(old[name]), *_listed(facts[name])]))
    if new == old:
        return card
    body = card[head.end() :] if (head := _HEAD.match(card)) else f"\n{card}" if card else ""
    return f"---\n{yaml.safe_dump(new, sort_keys=False, allow_unicode=True)}---\n{body}"


def _listed(value: Any) -> list[Any]:  # noqa: ANN401 - any YAML
    return value if isinstance(value, list) else [value]


def lineage_card(parents: Sequence[Parent]) -> str:
    """Tell of each parent where it came from, in which state, and under which licence."""
    cells = [
        (p.name, _linked(p), (p.revision or "")[:12], p.digest[:_DIGITS], p.license or "not declared") for p in parents
    ]
    rows = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([
        "| source | from | revision | digest | licence |",
        "|---|---|---|---|---|",
        *rows,
        "",
        _licences_told(parents),
    ])  # fmt: skip


def _linked(parent: Parent) -> str:
    repo = parent.hub_id
    return f"[{repo}](https://huggingface.co/{repo})" if repo else label(parent.path)


def _licences_told(parents: Sequence[Parent]) -> str:
    licences = licences_of(parents)
    if shared := common_licence(licences):
        return f"All parents are under {shared}."
    missing = [name for name, licence in licences.items() if not licence]
    told = "The terms of every licence in the table hold for this model." if len(missing) < len(licences) else ""
    unknown = f"No licence is declared by {', '.join(missing)}." if missing else ""
    return " ".join(text for text in (told, unknown) if text)


def with_lineage(card: str, parents: Sequence[Parent]) -> str:
    """Put the table of parents into a card: in the place of an older one, else at its end."""
    block = with_block("", _BLOCK, lineage_card(parents)).lstrip()
    if f"<!-- begin {_BLOCK} -->" not in card and _TABLE.search(card):
        return _TABLE.sub(lambda _: block, card, count=1)
    return with_block(card, _BLOCK, lineage_card(parents))


def has_lineage(card: str) -> bool:
    """Whether a card holds the table that `with_lineage` writes."""
    return f"<!-- begin {_BLOCK} -->" in card
