"""Notes kept between runs in the user's own folder, which only spare time: one that is lost or damaged is made anew."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Give $MEDIATOR_CACHE, or else `mediator` in $XDG_CACHE_HOME, or else in ~/.cache.

    Raises RuntimeError where neither is set and the user has no home.
    """
    if own := os.environ.get("MEDIATOR_CACHE"):
        return Path(own).absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "")
    # The specification of XDG says that a relative path is to be ignored.
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "mediator"


def read_note(kind: str, key: str) -> str | None:
    """Read a note; None where there is none that can be read."""
    try:
        return _place(kind, key).read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError):
        return None


def write_note(kind: str, key: str, text: str) -> None:
    """Keep a note, whole or not at all; where that cannot be, nothing is lost."""
    with contextlib.suppress(OSError, RuntimeError):
        place = _place(kind, key)
        place.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own for each writer: threads, and machines that share a home.
        descriptor, staged = tempfile.mkstemp(prefix=f".{key}.", dir=place.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(staged).replace(place)
        finally:
            Path(staged).unlink(missing_ok=True)


def _place(kind: str, key: str) -> Path:
    return cache_folder() / kind / f"{key}.json"
