"""The model card of a bundle whose experts become one more or one less."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mediator_cli.bundle.card import router_card, with_block
from mediator_cli.bundle.lineage import has_lineage, label, parents_of, with_lineage

if TYPE_CHECKING:
    from mediator_cli.bundle.manifest import ChangeRecord, Manifest, SourceRecord

_HEAD = "| source | from | licence |"


def _merged_from(manifest: Manifest) -> str:
    return f"Merged with mediator from {len(manifest.experts)} experts of one base."


def _added_to_the_base(manifest: Manifest) -> str:
    names = ", ".join(source.name for source in manifest.experts)
    return f"{len(manifest.experts)} low-rank experts are added for each prompt: {names}."


_COUNTS = (_merged_from, _added_to_the_base)
"""What the cards of a merge and of a comparison say of how many experts there are."""


def renewed_card(card: str, old: Manifest, new: Manifest) -> str:
    """Write the parts of a card anew that tell of experts and router, and a list of what was changed since it was made.

    What a person wrote into the card stays; a table of sources that is not the merge's own is left alone.
    """
    text = card
    for count in _COUNTS:
        text = text.replace(count(old), count(new), 1)
    text = _with_sources(text, (new.base, *new.experts))
    text = with_block(text, "history", "\n".join(_history(new)))
    if new.router is not None and new.router.features == "none":
        return text
    if new.router is not None:
        return with_block(text, "router", router_card(new.router))
    return re.sub(r"\n*<!-- begin router -->.*?<!-- end router -->\n?", "\n", text, flags=re.DOTALL)


def _with_sources(card: str, sources: tuple[SourceRecord, ...]) -> str:
    if has_lineage(card):
        return with_lineage(card, parents_of(sources))
    lines = card.split("\n")
    if _HEAD not in lines:
        return card
    start = lines.index(_HEAD) + 2
    stop = next((at for at in range(start, len(lines)) if not lines[at].startswith("|")), len(lines))
    rows = [f"| {s.name} | {label(s.path)} | {s.license or 'not declared'} |" for s in sources]
    return "\n".join([*lines[:start], *rows, *lines[stop:]])


def _history(manifest: Manifest) -> list[str]:
    lines = ["## Changed since it was made", ""]
    lines += [f"- {_told(record)}" for record in manifest.history]
    return [*lines, "", "The recipe above is the one that the bundle was made by; the dense expert is as it was then."]


def _told(record: ChangeRecord) -> str:
    verb = "added" if record.change == "added" else "taken out"
    origin = f", from {label(record.source.path)}" if record.change == "added" else ""
    return f"expert {record.source.name} {verb}{origin}; router: {record.router}"
