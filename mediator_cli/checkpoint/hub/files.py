"""Bytes of files on the Hub: ranges, tried again after cuts, and whole weight files that go on where they stopped.

huggingface_hub throws an unfinished file away when its process ends, so weights are fetched here, into a partial file
that the next run takes up, and then handed to the ordinary cache.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from mediator_cli.checkpoint.hub.errors import http_error, hub_errors, retry_after, status_of
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from mediator_cli.checkpoint.hub.repo import HubRepo

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try; counted anew whenever bytes came."""
_LONGEST_WAIT = 60.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_PIECE = 1 << 30
"""Asked for at a time: CDNs refuse to serve very large files whole, and signed addresses grow old."""
_CHUNK = 1 << 20
_UNFINISHED = ".mediator.incomplete"
_TIMEOUT = 30
_DIGEST = re.compile(r"[0-9a-f]{64}")


def copy_range(repo: HubRepo, name: str, start: int, stop: int, write: Callable[[bytes], object]) -> None:
    """Give bytes `start` to `stop` of a file to `write`, in order; after a cut go on with the byte that is missing.

    Raises CheckpointError when no bytes come any more.
    """
    waits = iter(WAITS)
    with hub_errors(repo.source, name):
        while start < stop:
            before, failure = start, None
            try:
                for chunk in _chunks(repo, name, start, min(stop, start + _PIECE)):
                    write(chunk)
                    start += len(chunk)
            except http_error() as error:
                failure = error
            if start > before:
                waits = iter(WAITS)
            if failure is not None or start == before:
                _wait(repo, name, failure, next(waits, None))


def _wait(repo: HubRepo, name: str, failure: Exception | None, seconds: float | None) -> None:
    """Wait before the next try; raise where it would be in vain: no tries are left, or the error will not pass."""
    longest = max(seconds or 0.0, retry_after(failure))
    if seconds is not None and longest <= _LONGEST_WAIT and status_of(failure) in (None, *_PASSING):
        time.sleep(longest)
    elif failure is not None:
        raise failure
    else:
        raise CheckpointError(Problem(f"{repo.source}: {name}", "the Hub sends no bytes", "try again later"))


def _chunks(repo: HubRepo, name: str, start: int, stop: int) -> Iterator[bytes]:
    """Ask once for bytes `start` to `stop` and give those that come."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported by its documentation
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    url = hf_hub_url(repo.repo_id, name, revision=repo.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    # The token goes to the Hub alone: a redirect to another origin loses it.
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
        hf_raise_for_status(response)
        at = _first_byte(repo, name, response.headers.get("Content-Range"))
        # Pieces as they come: gathered into larger ones, those before a cut would be lost.
        for chunk in response.iter_bytes():
            wanted = chunk[max(0, start - at) : max(0, stop - at)]
            at += len(chunk)
            if wanted:
                yield wanted
            if at >= stop:
                return


def _first_byte(repo: HubRepo, name: str, content_range: str | None) -> int:
    """Tell where an answer starts: a server that knows no ranges sends all. Check the size that it tells."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range or "")
    if match and int(match[2]) != repo.sizes[name]:
        message = f"has {match[2]} bytes now, the Hub said {repo.sizes[name]}"
        raise CheckpointError(Problem(f"{repo.source}: {name}", message, "run the command again"))
    return int(match[1]) if match else 0


def fetch_weights(repo: HubRepo, name: str, advance: Callable[[int], None] = lambda n: None) -> None:
    """Bring a weight file into the cache, telling `advance` of bytes; an unfinished one goes on where it stopped.

    Raises CheckpointError when it cannot be had, or does not have the digest that the Hub says.
    """
    if (repo.folder / name).is_file():
        return
    etag = _etag(repo, name)
    blob = repo.storage / "blobs" / etag
    with hub_errors(repo.source, name):
        blob.parent.mkdir(parents=True, exist_ok=True)
        with _opened(_partial(blob)) as stream:
            if not blob.exists():
                _fill(repo, name, stream, etag, advance)
                _partial(blob).rename(blob)
            else:
                _partial(blob).unlink(missing_ok=True)
                advance(repo.sizes[name])
        # The blob is there, so this only links it into the snapshot, in the way that this system needs.
        fetch_small(repo, name)


def fetch_into(repo: HubRepo, name: str, file: Path, advance: Callable[[int], None] = lambda n: None) -> None:
    """Write a file of a repository to a place outside the cache; where a part of it stands already, go on behind it.

    What the cache holds is copied. Raises CheckpointError when it cannot be had, or has not the digest the Hub says.
    """
    cached = repo.folder / name
    if cached.is_file():
        with hub_errors(repo.source, name):
            shutil.copyfile(cached, file)
        advance(repo.sizes[name])
        return
    etag = _etag(repo, name)
    with hub_errors(repo.source, name), file.open("a+b") as stream:
        _fill(repo, name, stream, etag, advance)


def fetch_small(repo: HubRepo, name: str) -> None:
    """Bring a file into the cache as huggingface_hub does, without its bar."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(repo.repo_id, name, revision=repo.commit, tqdm_class=_NoBar)


class _NoBar:
    """Stands in for tqdm and shows nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, n: float | None = 1) -> None:
        """Show nothing."""


def partial_bytes(repo: HubRepo) -> int:
    """Count the bytes of a repository's unfinished weight files."""
    return sum(file.stat().st_size for file in (repo.storage / "blobs").glob(f"*{_UNFINISHED}"))


def _etag(repo: HubRepo, name: str) -> str:
    """Ask for the name of a file's blob in the cache: for weights, their SHA-256."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with hub_errors(repo.source, name):
        url = hf_hub_url(repo.repo_id, name, revision=repo.commit)
        facts = get_hf_file_metadata(url, timeout=_TIMEOUT, retry_on_errors=True)
    if facts.etag is None or not re.fullmatch(r"[\w-]+", facts.etag):
        raise CheckpointError(Problem(f"{repo.source}: {name}", "the Hub gives no digest of it", "check HF_ENDPOINT"))
    if facts.size not in (None, repo.sizes[name]):
        message = f"has {facts.size} bytes now, the Hub said {repo.sizes[name]}"
        raise CheckpointError(Problem(f"{repo.source}: {name}", message, "run the command again"))
    return facts.etag


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}{_UNFINISHED}")


@contextmanager
def _opened(partial: Path) -> Iterator[BinaryIO]:
    """Open a partial file for this process alone; another that fetches the same file waits here."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported by its documentation

    storage = partial.parent.parent
    lock = storage.parent / ".locks" / storage.name / f"{partial.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock), partial.open("a+b") as stream:
        yield stream


def _fill(repo: HubRepo, name: str, stream: BinaryIO, etag: str, advance: Callable[[int], None]) -> None:
    """Write what is missing of a file behind what is there, and check the whole."""
    digest = hashlib.sha256()
    stream.seek(0)
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        advance(len(chunk))
    start, stop = stream.tell(), repo.sizes[name]
    if start > stop:
        start, digest = 0, hashlib.sha256()
        stream.truncate(0)

    def write(chunk: bytes) -> None:
        stream.write(chunk)
        digest.update(chunk)
        advance(len(chunk))

    copy_range(repo, name, start, stop, write)
    if _DIGEST.fullmatch(etag) and digest.hexdigest() != etag:
        stream.truncate(0)
        message = "the bytes that came do not have the digest that the Hub says"
        raise CheckpointError(Problem(f"{repo.source}: {name}", message, "they were dropped; run the command again"))
    stream.flush()
