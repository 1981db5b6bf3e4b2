"""Names of experts, made from where they lie: legal, short, unique."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from mediator_cli.recipe.names import LONGEST, RESERVED_NAMES, unique_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import PurePath

_SAYS_LITTLE = re.compile(r"(checkpoint-\d+|final|latest|best|model|merged|adapter|lora|output)", re.IGNORECASE)


def expert_names(base: PurePath, sources: Sequence[PurePath]) -> tuple[str, ...]:
    """Name each source after its folder, without the words that it shares with the base.

    A folder that says little, or that others are called like, gets its parent's name in front.

    >>> from pathlib import PurePath as P
    >>> expert_names(P("Qwen/Qwen2.5-7B"), [P("me/Qwen2.5-7B-math"), P("runs/code/checkpoint-500")])
    ('math', 'code-checkpoint-500')
    """
    depths = [2 if _SAYS_LITTLE.fullmatch(source.name) else 1 for source in sources]
    for _ in range(max(len(source.parts) for source in sources)):
        names = [_name(base, source, depth) for source, depth in zip(sources, depths, strict=True)]
        lowered = [name.lower() for name in names]
        depths = [
            depth + (lowered.count(name) > 1 or name in RESERVED_NAMES)
            for depth, name in zip(depths, lowered, strict=True)
        ]
    return tuple(unique_names(names))


def _name(base: PurePath, source: PurePath, depth: int) -> str:
    parents = [part for part in source.parts[:-1] if part.strip("/\\")]
    shown = parents[max(0, len(parents) - depth + 1) :] if depth > 1 else []
    return _legal("-".join([*shown, _without_shared_words(base.name, source.name)]))


def _without_shared_words(base: str, name: str) -> str:
    theirs, words = re.split("[-_ ]+", base), re.split("[-_ ]+", name)
    front = _n_shared(theirs, words)
    back = _n_shared(theirs[front:][::-1], words[front:][::-1])
    kept = "-".join(words[front : len(words) - back])
    return name if front + back == 0 or not kept or kept.isdigit() else kept


def _n_shared(ours: Sequence[str], theirs: Sequence[str]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a.lower() != b.lower()), min(len(ours), len(theirs)))


def _legal(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub("[^A-Za-z0-9_]+", "-", plain).strip("-_")[:LONGEST].rstrip("-_") or "expert"
