"""Bundles whose output is a URL: built in a folder of the cache, uploaded when finished, the manifest last.

Object stores have no rename. What makes a bundle there is its manifest: it goes first from a bundle that is replaced,
and comes last. Until then a mark stands in the folder, which readers refuse.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mediator_cli.bundle.digest import in_threads
from mediator_cli.bundle.manifest import MANIFEST, file_names, read_manifest
from mediator_cli.checkpoint.cache import cache_folder
from mediator_cli.checkpoint.remote.folder import UNFINISHED
from mediator_cli.checkpoint.remote.store import Store, open_store
from mediator_cli.checkpoint.remote.url import check_url, is_url
from mediator_cli.checkpoint.source import find_location
from mediator_cli.errors import BundleError, CheckpointError, OutputError, Problem
from mediator_cli.pipeline.progress import Progress, counter, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.engine.publish import Mode
    from mediator_cli.plan.model import Plan

_AT_A_TIME = 4


def output_url(plan: Plan, output: Path | str | None) -> str | None:
    """Give the URL where the bundle goes, by -o or the recipe's output.path; None where it goes to a folder.

    Raises OutputError for a URL that is not taken.
    """
    written = plan.loaded.recipe.output.path if output is None else str(output)
    if written is None or not is_url(written):
        return None
    try:
        return check_url(written)
    except CheckpointError as error:
        raise OutputError(error.problems) from None


def prepare_staging(url: str) -> Path:
    """Give the folder of the cache where a bundle for a URL is built; always the same, so that --resume finds it.

    A finished bundle whose upload failed goes; what an interrupted merge had finished stays beside it.
    """
    folder = cache_folder() / "uploads" / blake2b(url.encode(), digest_size=12).hexdigest() / url.rsplit("/", 1)[-1]
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def check_output_url(url: str, mode: Mode) -> None:
    """Raise OutputError if what is at a URL stands in the way of a new bundle, or it cannot be reached."""
    there = _names(url)
    if not there:
        return
    is_ours = MANIFEST in there or UNFINISHED in there
    if mode == "overwrite" and not is_ours:
        message = "holds files and is not a bundle, so it is not overwritten"
        raise OutputError(Problem(url, message, "choose another output or remove it by hand"))
    if mode == "new" or not is_ours or (mode == "resume" and MANIFEST in there):
        unfinished = UNFINISHED in there
        message = "holds an upload that was not finished" if unfinished else "exists"
        raise OutputError(Problem(url, message, "choose another output with -o, or give --overwrite"))


def upload_bundle(folder: Path, url: str, progress: Progress = silent) -> Path:
    """Upload a finished bundle and remove it from `folder`; of a bundle that it replaces nothing stays.

    Gives the folder of the cache that stands for the URL: manifest and small files lie in it. On an error `folder`
    stays. Raises OutputError.
    """
    try:
        _upload(folder, open_store(url), progress)
    except CheckpointError as error:
        hint = f"the finished bundle is kept in {folder}: merge again, or upload it yourself, {MANIFEST} last"
        told = [Problem(problem.place, problem.message, f"{problem.hint}; {hint}") for problem in error.problems]
        raise OutputError(told) from None
    shutil.rmtree(folder)
    return find_location(url, folder).folder


def _upload(folder: Path, store: Store, progress: Progress) -> None:
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    advance = counter(progress, "upload", sum((folder / name).stat().st_size for name in files))
    stale = _replaced(store) - set(files)
    # The mark names what is to go, so that an upload that was stopped leaves nothing behind for ever.
    store.write_text(UNFINISHED, json.dumps(sorted(stale | set(files))))
    store.remove(MANIFEST)

    def send(name: str) -> None:
        store.write(name, folder / name)
        advance((folder / name).stat().st_size)

    deque(in_threads(send, [name for name in files if name != MANIFEST], _AT_A_TIME), maxlen=0)
    deque(in_threads(store.remove, sorted(stale), _AT_A_TIME), maxlen=0)
    send(MANIFEST)
    store.remove(UNFINISHED)


def _replaced(store: Store) -> set[str]:
    """List the files of the bundle that stands there, or of an upload that was not finished; no others ever go."""
    there = store.find()
    named: set[str] = set()
    if UNFINISHED in there:
        with suppress(ValueError):
            named |= {str(name) for name in json.loads(_read(store, UNFINISHED))}
    if MANIFEST in there:
        with TemporaryDirectory() as scratch, suppress(BundleError):
            (Path(scratch) / MANIFEST).write_bytes(_read(store, MANIFEST))
            named |= {MANIFEST, *file_names(read_manifest(Path(scratch)))}
    return named & set(there)


def _read(store: Store, name: str) -> bytes:
    facts = store.facts(name)
    return store.read(name, 0, facts.size, facts)


def _names(url: str) -> Sequence[str]:
    try:
        return open_store(url).find()
    except CheckpointError as error:
        raise OutputError(error.problems) from None
