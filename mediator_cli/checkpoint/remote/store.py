"""A place of fsspec: lists, ranges, files put and removed, each tried again when the service stumbles.

fsspec and what it needs for a protocol are imported here alone, when a URL is opened.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from mediator_cli.checkpoint.remote.errors import ShortReadError, explain, is_final
from mediator_cli.checkpoint.remote.url import check_url
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each new try; the packages below fsspec try some times themselves."""
_STRONG = ("ETag", "etag", "md5Hash", "crc32c", "generation", "blob_id", "sha256")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Facts:
    """What an object is known by: its size in bytes, and tags or times of change that its service tells."""

    size: int
    marks: Mapping[str, str]

    def is_same(self, other: Facts) -> bool:
        """Whether nothing shows a change: sizes, and the best mark that both have; lists tell others than objects."""
        shared = [name for name in (*_STRONG, *_TIMES) if name in self.marks and name in other.marks]
        return self.size == other.size and all(self.marks[name] == other.marks[name] for name in shared[:1])


@dataclass(frozen=True)
class Store:
    """A folder at a URL; all methods may be called from any thread and raise CheckpointError."""

    url: str
    root: str
    files: Any = field(repr=False)

    def listing(self, inner: str = "") -> tuple[dict[str, Facts], list[str]]:
        """List the files with what is known of them, and the folders, of the folder or of one in it, by name."""
        place = f"{self.root}/{inner}" if inner else self.root
        found = self._tried(self.url, lambda: self._list(place))
        entries = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in found}
        files = {name: _facts(entry) for name, entry in entries.items() if entry["type"] == "file"}
        return files, [name for name, entry in entries.items() if entry["type"] == "directory"]

    def _list(self, place: str) -> list[dict[str, Any]]:
        self.files.invalidate_cache()
        entries: list[dict[str, Any]] = self.files.ls(place, detail=True)
        own = place.strip("/")
        # Of a single object, a list names itself; some services list a folder's own empty object.
        found = [entry for entry in entries if entry["name"].strip("/") != own]
        if entries and not found and entries[0]["type"] == "file" and entries[0].get("size"):
            raise NotADirectoryError
        return found

    def facts(self, name: str) -> Facts:
        """Tell what is known of a file now."""

        def ask() -> Facts:
            self.files.invalidate_cache()
            return _facts(self.files.info(f"{self.root}/{name}"))

        return self._tried(f"{self.url}/{name}", ask)

    def read(self, name: str, start: int, stop: int, known: Facts) -> bytes:
        """Read bytes `start` to `stop` of a file that was `known` as it is; all of them, or an error."""
        place = f"{self.url}/{name}"

        def ask() -> bytes:
            data = self._cat(f"{self.root}/{name}", start, stop)
            if len(data) != stop - start:
                raise ShortReadError
            return data

        return self._tried(place, ask, lambda: self.check(name, known))

    def check(self, name: str, known: Facts) -> None:
        """Raise CheckpointError where a file is not as it was known any more."""
        if not (found := self.facts(name)).is_same(known):
            sizes = f": {found.size} bytes, {known.size} before" if found.size != known.size else ""
            message = f"was changed since its header was read{sizes}"
            raise CheckpointError(Problem(f"{self.url}/{name}", message, "run the command again"))

    def _cat(self, path: str, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        reads_ranges = self.files.async_impl or type(self.files).cat_file is not _abstract().cat_file
        # What fsspec does by default opens the file with a read-ahead of its own.
        options = {} if reads_ranges else {"cache_type": "none"}
        data: bytes = self.files.cat_file(path, start=start, end=stop, **options)
        return data

    def write(self, name: str, file: Path) -> None:
        """Put a file of the disk here, and check its size."""
        place = f"{self.url}/{name}"
        self._tried(place, lambda: self.files.put_file(str(file), f"{self.root}/{name}"))
        if (found := self.facts(name).size) != file.stat().st_size:
            raise CheckpointError(Problem(place, f"holds {found} bytes after its upload", "run the command again"))

    def write_text(self, name: str, text: str) -> None:
        """Write a small file."""
        self._tried(f"{self.url}/{name}", lambda: self.files.pipe_file(f"{self.root}/{name}", text.encode()))

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

        def ask() -> None:
            with suppress(FileNotFoundError):
                self.files.rm_file(f"{self.root}/{name}")

        self._tried(f"{self.url}/{name}", ask)

    def find(self) -> list[str]:
        """List all files of the folder and of those in it, by their paths from there; none where there is nothing."""

        def ask() -> list[str]:
            self.files.invalidate_cache()
            with suppress(FileNotFoundError):
                return [str(path).strip("/") for path in self.files.find(self.root)]
            return []

        head = f"{self.root.strip('/')}/"
        paths = self._tried(self.url, ask)
        return sorted(path.removeprefix(head) for path in paths if path.startswith(head))

    def _tried(self, place: str, action: Callable[[], T], check: Callable[[], None] = lambda: None) -> T:
        """Do it, again after errors that may pass; `check` may raise what is behind such an error."""
        waits = iter(WAITS)
        while True:
            try:
                return action()
            except Exception as error:  # noqa: BLE001 - packages below fsspec raise all kinds
                if is_final(error):
                    raise explain(error, place) from None
                check()
                if (wait := next(waits, None)) is None:
                    raise explain(error, place) from None
            time.sleep(wait)


def open_store(url: str) -> Store:
    """Open the folder at a URL; nothing is asked of it yet, and credentials are those of its service's own ways.

    Raises CheckpointError for a URL that is not taken, an unknown protocol, or a package that is missing.
    """
    plain = check_url(url)
    import fsspec

    protocol = plain.partition("://")[0]
    if protocol not in fsspec.available_protocols():
        hint = "s3://, gs://, hf:// and memory:// are, and all others that fsspec knows"
        raise CheckpointError(Problem(plain, f"protocol {protocol}:// is not known", hint))
    try:
        files, root = fsspec.core.url_to_fs(plain)
    except Exception as error:  # noqa: BLE001 - packages below fsspec raise all kinds
        raise explain(error, plain) from None
    return Store(plain, root.rstrip("/"), files)


def _abstract() -> Any:  # noqa: ANN401 - fsspec has no types
    from fsspec import AbstractFileSystem

    return AbstractFileSystem


def _facts(entry: Mapping[str, Any]) -> Facts:
    marks = {name: _mark(entry[name]) for name in (*_STRONG, *_TIMES) if entry.get(name) is not None}
    return Facts(int(entry.get("size") or 0), marks)


def _mark(value: object) -> str:
    # A list may tell in seconds what is asked for as a date.
    seconds = value.timestamp() if isinstance(value, datetime) else value
    return f"{seconds:.6f}" if isinstance(seconds, float) else str(seconds)
