"""Models on the Hugging Face Hub: found, pinned to a commit, and looked at without a download of weights.

Small files go to the ordinary cache of huggingface_hub, and so do weights when a merge wants them, so a repository
is a folder like any other: `snapshots/<commit>` of the cache. Only headers of weights are read from afar.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.header import parse_header, read_header
from mediator_cli.checkpoint.hub.errors import hub_errors
from mediator_cli.checkpoint.hub.files import copy_range, fetch_small
from mediator_cli.checkpoint.hub.repo import HubRepo
from mediator_cli.checkpoint.remote.folder import remote_file
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from mediator_cli.checkpoint.header import Header

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>(?!.*\.\.)[^\s@:\\/][^\s@:\\]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_THREADS = 8
_TIMEOUT = 30
_FIRST_BYTES = 1 << 16
"""Read at once from the start of each weight file; most headers end before."""


@dataclass(frozen=True)
class Access:
    """How sources may be reached: `offline` uses the Hub's cache alone, as HF_HUB_OFFLINE does."""

    offline: bool = False


ONLINE = Access()


def is_hub_id(source: str) -> bool:
    """Whether a source is written as a Hub id: org/name or org/name@revision.

    >>> is_hub_id("org/name@refs/pr/3"), is_hub_id("./org/name"), is_hub_id("a/b/c")
    (True, False, False)
    """
    return HUB_ID.fullmatch(source) is not None


def find_repo(source: str, access: Access, is_side_file: Callable[[str], bool]) -> HubRepo:
    """Ask the Hub for commit and files of a repository, and fetch the small files that `is_side_file` wants.

    Raises CheckpointError that says what to do when it is missing, private, gated, out of reach or not in the cache.
    """
    from huggingface_hub import HfApi, constants

    match = HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(Problem(source, "is no Hub id", "write org/name or org/name@revision"))
    repo_id, revision = match["repo"], match["revision"] or constants.DEFAULT_REVISION
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    if access.offline or constants.HF_HUB_OFFLINE:
        return _cached(source, repo_id, revision, storage)
    with hub_errors(source), _no_nonsense(source):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise CheckpointError(Problem(source, "the Hub names no commit", "check HF_ENDPOINT"))
    files = {item.rfilename: item.size for item in info.siblings or () if _is_safe(item.rfilename)}
    sizes = {name: size for name, size in files.items() if size is not None}
    repo = HubRepo(source, repo_id, revision, info.sha, storage / "snapshots" / info.sha, sizes)
    digests = {item.rfilename: item.lfs.sha256 for item in info.siblings or () if item.lfs}
    _fetch_small_files(repo, [name for name in sizes if is_side_file(name) or _is_unlinked(repo, name, digests)])
    _remember(repo)
    return repo


@contextmanager
def _no_nonsense(source: str) -> Iterator[None]:
    """Refuse an answer that is JSON, but not what the Hub's API says, as a gateway may send."""
    try:
        yield
    except (LookupError, TypeError, AttributeError):
        message = "the answer is not one of the Hub's API"
        raise CheckpointError(Problem(source, message, "check the network and HF_ENDPOINT")) from None


def _is_safe(name: str) -> bool:
    """Whether a file of a repository stays in its folder."""
    return not name.startswith("/") and not set(name) & set("\\:\0") and ".." not in name.split("/")


def _is_unlinked(repo: HubRepo, name: str, digests: Mapping[str, str]) -> bool:
    """Whether weights are in the cache for an earlier commit: only their name is missing."""
    return name.endswith(".safetensors") and name in digests and (repo.storage / "blobs" / digests[name]).is_file()


def _cached(source: str, repo_id: str, revision: str, storage: Path) -> HubRepo:
    """Find a repository in the cache alone."""
    note = storage / "refs" / revision
    try:
        commit = note.read_text(encoding="utf-8").strip() if note.is_file() else revision
    except OSError:
        commit = revision
    folder = storage / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not folder.is_dir():
        message = f"no such folder, and revision '{revision}' is not in the Hub's cache; offline nothing can be fetched"
        raise CheckpointError(Problem(source, message, "run once without --offline and HF_HUB_OFFLINE"))
    files = [file for file in folder.rglob("*") if file.is_file()]
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return HubRepo(source, repo_id, revision, commit, folder, sizes, offline=True)


def _fetch_small_files(repo: HubRepo, names: Iterable[str]) -> None:
    def fetch(name: str) -> None:
        with hub_errors(repo.source, name):
            fetch_small(repo, name)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(fetch, [name for name in names if not (repo.folder / name).is_file()]))


def _remember(repo: HubRepo) -> None:
    """Note in the cache what the revision means now, as huggingface_hub does, so that it is found offline."""
    if repo.revision == repo.commit:
        return
    note = repo.storage / "refs" / repo.revision
    try:
        if not note.is_file() or note.read_text(encoding="utf-8") != repo.commit:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(repo.commit, encoding="utf-8")
    except OSError:
        return  # a cache that cannot be written to still serves what it holds


def missing_file(repo: HubRepo, name: str) -> CheckpointError:
    """Say that a repository, or offline the cache, has no such file."""
    if repo.offline:
        hint = f"run once without --offline, or `hf download {repo.repo_id} {name} --revision {repo.commit}`"
        return CheckpointError(Problem(repo.source, f"{name} is not in the Hub's cache", hint))
    hint = "is it the repository of a model?"
    return CheckpointError(Problem(repo.source, f"the repository holds no {name}", hint))


def has_file(folder: Path, name: str, repo: HubRepo | None) -> bool:
    """Whether a folder has a file, on disk, still on the Hub, or at the URL that the folder stands for."""
    if (folder / name).is_file() or (repo is not None and name in repo.sizes):
        return True
    return remote_file(folder / name) is not None


@dataclass(frozen=True)
class UnseenWeights(Problem):
    """Files of a repository that can't be looked at before they are fetched; once they are there, nothing is wrong."""

    repo: HubRepo | None = None
    names: tuple[str, ...] = ()


def find_unseen(repo: HubRepo) -> UnseenWeights | None:
    """Say that a repository's weights can't be checked before they are fetched; None where they are there."""
    if any(name.endswith(".safetensors") for name in repo.sizes):
        return None
    found = [name for name in repo.sizes if fnmatchcase(name, "pytorch_model*.bin") or name == "adapter_model.bin"]
    names = tuple(name for name in found if not (repo.folder / name).is_file())
    if not names:
        return None
    message = f"holds no safetensors; the tensors of {names[0]} cannot be checked before it is downloaded"
    hint = f"`hf download {repo.repo_id} --revision {repo.commit} --include '*_model*.bin'`"
    hint = f"`mediator merge` downloads it first; to check it now, {hint}"
    return UnseenWeights(repo.source, message, hint, repo, names)


def read_far_header(file: Path, repo: HubRepo | None) -> Header:
    """Read the header of a weight file: from disk where the file is there, from the Hub by range where not."""
    if repo is None or file.is_file():
        return read_header(file)
    name = repo.name_of(file)
    if repo.offline or name not in repo.sizes:
        raise missing_file(repo, name)
    size = repo.sizes[name]
    first = _read(repo, name, 0, min(size, _FIRST_BYTES))

    def read(start: int, n: int) -> bytes:
        rest = _read(repo, name, len(first), start + n) if start + n > len(first) else b""
        return (first + rest)[start : start + n]

    return parse_header(file, size, read)


def read_far_headers(files: Iterable[Path], repo: HubRepo | None) -> Iterable[Header]:
    """Read the headers of several weight files, a few at a time when they are far."""
    files = list(files)
    if repo is None and all(map(Path.is_file, files)):
        return map(read_header, files)
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda file: read_far_header(file, repo), files))


def _read(repo: HubRepo, name: str, start: int, stop: int) -> bytes:
    data = bytearray()
    copy_range(repo, name, start, stop, data.extend)
    return bytes(data)
