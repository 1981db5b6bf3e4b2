"""A folder at a URL as it was found: small files are in a folder of the cache, weights are read from afar.

The folder in the cache stands for one state of the one at the URL, and holds a note of it. So a path in it says all:
where there is no such file on disk, the note tells the URL, the size and the marks of the object.
"""

from __future__ import annotations

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.cache import cache_folder
from mediator_cli.checkpoint.remote.store import Facts, Store, open_store
from mediator_cli.checkpoint.remote.url import check_url
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

UNFINISHED = ".mediator_unfinished"
"""Stands in a folder while a bundle is uploaded into it."""
_FAR = ".far"
_NOTE = "note.json"
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_THREADS = 8
_FIRST_BYTES = 1 << 16
"""Read at once from the start of each weight file; most headers end before."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL in one state: `folder` is where its small files lie in the cache, `files` what it holds."""

    url: str
    folder: Path
    files: Mapping[str, Facts] = field(repr=False, compare=False)


@dataclass(frozen=True)
class RemoteFile:
    """A weight file at a URL, as it was when its folder was found; it is not on disk."""

    home: RemoteFolder
    name: str

    @property
    def url(self) -> str:
        """Where it lies."""
        return f"{self.home.url}/{self.name}"

    @property
    def facts(self) -> Facts:
        """Its size and marks."""
        return self.home.files[self.name]

    @cached_property
    def store(self) -> Store:
        """The place to read it from."""
        return open_store(self.home.url)

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop`; raise CheckpointError where they do not come or the object was changed."""
        return self.store.read(self.name, start, stop, self.facts)

    def check(self) -> None:
        """Raise CheckpointError where the object was changed since its folder was found."""
        self.store.check(self.name, self.facts)

    def identity(self) -> list[int | str]:
        """Tell what shows that the object was changed: its size and its marks."""
        return [self.facts.size, *(f"{name}={mark}" for name, mark in sorted(self.facts.marks.items()))]

    def read_start(self, n_bytes: int) -> bytes:
        """Read the first bytes; they are kept in the cache, so that a header is fetched once."""
        kept = self.home.folder / _FAR / f"{self.name}.start"
        data = kept.read_bytes() if kept.is_file() else b""
        wanted = min(self.facts.size, max(n_bytes, _FIRST_BYTES))
        if len(data) < min(n_bytes, self.facts.size):
            data += self.read(len(data), wanted)
            _write(kept, data)
        return data[:n_bytes]


def find_remote(url: str, is_wanted: Callable[[str], bool], *, offline: bool = False) -> RemoteFolder:
    """List the folder at a URL, and fetch the small files that `is_wanted` wants, unless the cache has them.

    Raises CheckpointError that says what to do when it cannot be had.
    """
    plain = check_url(url)
    if offline:
        raise CheckpointError(Problem(plain, "is far away, and offline nothing is fetched", "run without --offline"))
    store = open_store(plain)
    files, folders = store.listing()
    _refuse_unfinished(plain, files)
    for inner in folders:
        if is_wanted(f"{inner}/config.json") or is_wanted(f"{inner}/a.jinja"):
            files |= {f"{inner}/{name}": facts for name, facts in store.listing(inner)[0].items()}
    known = {name: facts for name, facts in files.items() if _is_safe(name)}
    kept = {name: facts for name, facts in known.items() if is_wanted(name) or name.endswith(_WEIGHTS)}
    folder = cache_folder() / "remote" / _key(plain) / _key(_text(plain, kept))
    found = RemoteFolder(plain, folder, known)
    _fetch(store, found, [name for name in kept if is_wanted(name)])
    _write(folder / _FAR / _NOTE, _text(plain, known).encode())
    return found


def _refuse_unfinished(url: str, files: Mapping[str, Facts]) -> None:
    if UNFINISHED in files:
        hint = "wait for it, or merge again with --overwrite"
        raise CheckpointError(Problem(url, "the upload of a bundle into it was not finished", hint))


def _fetch(store: Store, found: RemoteFolder, names: list[str]) -> None:
    missing = [name for name in names if not (found.folder / name).is_file()]

    def fetch(name: str) -> None:
        facts = found.files[name]
        _write(found.folder / name, store.read(name, 0, facts.size, facts))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(fetch, missing))


def read_remote(folder: Path) -> RemoteFolder | None:
    """Read the note of a folder of the cache; None for any other folder.

    A note elsewhere is not believed: it would let a downloaded folder choose what is read.
    """
    note = folder / _FAR / _NOTE
    try:
        if not folder.is_relative_to(cache_folder() / "remote") or not note.is_file():
            return None
        data = json.loads(note.read_text(encoding="utf-8"))
        files = {name: Facts(size, marks) for name, (size, marks) in data["files"].items()}
        return RemoteFolder(data["url"], folder, files)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remote_file(file: Path) -> RemoteFile | None:
    """Find what a path that is not on disk stands for; None where it stands for nothing."""
    home = read_remote(file.parent)
    return RemoteFile(home, file.name) if home and file.name in home.files and not file.is_file() else None


def _is_safe(name: str) -> bool:
    """Whether a file of a listing stays in its folder, and is not one of our own notes."""
    parts = name.split("/")
    return not any(part in ("", ".", "..", _FAR) or set(part) & set("\\:\0") for part in parts)


def _text(url: str, files: Mapping[str, Facts]) -> str:
    facts = {name: [known.size, dict(known.marks)] for name, known in sorted(files.items())}
    return json.dumps({"url": url, "files": facts}, sort_keys=True)


def _key(text: str) -> str:
    return blake2b(text.encode(), digest_size=12).hexdigest()


def _write(file: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, staged = tempfile.mkstemp(prefix=".", dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        Path(staged).replace(file)
    except OSError as error:
        reason = (error.strerror or "unwritable").lower()
        hint = "check its disk and rights; MEDIATOR_CACHE moves the cache"
        raise CheckpointError(Problem(str(file), f"cannot fill the cache: {reason}", hint)) from None
