"""A folder to a repository on the Hub, private unless told otherwise.

Weights go to the Hub's store first, and one commit then names all files: until that moment the repository is what it
was, and a push that was stopped leaves no half bundle behind. What the store has already is not sent again.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.bundle.card import CARD
from mediator_cli.bundle.manifest import MANIFEST, Manifest, file_names
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.hub.find import is_hub_id
from mediator_cli.engine.publish import MANIFESTS
from mediator_cli.errors import OutputError, Problem, some_names
from mediator_cli.export.hub.errors import check_token, push_errors
from mediator_cli.pipeline.progress import Progress, counter, silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

    from mediator_cli.export.hub.shipment import Item, Shipment

_MAIN = "main"
_OF_ANYBODY = (CARD, ".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "LICENSE.txt")
"""Files that a repository has before anything is put into it."""


@dataclass(frozen=True)
class PushJob:
    """Where to and how: `overwrite` pushes among files of others, `bars` shows huggingface_hub's own progress."""

    revision: str = _MAIN
    message: str = ""
    public: bool = False
    overwrite: bool = False
    bars: bool = False


@dataclass(frozen=True)
class Pushed:
    """What became of a push; `sent` and `kept` name files, `commit` is what the branch means now."""

    repo_id: str
    revision: str
    commit: str
    url: str
    is_private: bool
    sent: tuple[str, ...]
    sent_bytes: int
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    notices: tuple[str, ...]


def check_repo_id(repo_id: str) -> str:
    """Return a repository's name if it is org/name; raise OutputError otherwise."""
    if not is_hub_id(repo_id) or "@" in repo_id:
        hint = "write org/name; a branch is named with --revision"
        raise OutputError(Problem(repo_id, "is no name of a Hub repository", hint))
    return repo_id


def push(shipment: Shipment, job: PushJob | None = None, progress: Progress = silent) -> Pushed:
    """Send a shipment; nothing appears in the repository before all is there.

    Raises OutputError where the Hub refuses, cannot be reached, or holds something else under that name.
    """
    job, repo_id = job or PushJob(), check_repo_id(shipment.repo_id)
    check_token(repo_id)
    try:
        with push_errors(repo_id), _calm(job.bars):
            there = _open_repo(repo_id, job)
            return _send(shipment, job, there, progress)
    except KeyboardInterrupt as error:
        error.add_note("goes on: what the Hub has got is kept there, and no file of the repository has changed")
        raise


def _open_repo(repo_id: str, job: PushJob) -> ModelInfo:
    """Create repository and branch where they are missing, and give what the branch holds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        first = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=not job.public, exist_ok=True)
        first = api.model_info(repo_id)
    _check_visibility(first, repo_id, job)
    if job.revision == _MAIN:
        return api.model_info(repo_id, files_metadata=True)
    try:
        return api.model_info(repo_id, revision=job.revision, files_metadata=True)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=job.revision, exist_ok=True)
        return api.model_info(repo_id, revision=job.revision, files_metadata=True)


def _check_visibility(info: ModelInfo, repo_id: str, job: PushJob) -> None:
    if info.private is False and not job.public:
        message = "is a public repository: everybody could read what you push"
        raise OutputError(Problem(repo_id, message, "give --public if they may, or choose another name"))


def _send(shipment: Shipment, job: PushJob, there: ModelInfo, progress: Progress) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repo_id, siblings = shipment.repo_id, {s.rfilename: s for s in there.siblings or ()}
    _check_ours(there, siblings, repo_id, job)
    kept = _same(shipment, siblings, progress)
    items = [item for item in shipment.items if item.name not in kept]
    stale = sorted(_stale(repo_id, there.sha, siblings) - {item.name for item in shipment.items})
    adds = [
        CommitOperationAdd(item.name, shipment.found.folder / item.name if item.data is None else item.data)
        for item in items
    ]
    removed = [CommitOperationDelete(name) for name in stale]
    commit = there.sha or ""
    if adds or removed:
        _upload(repo_id, adds, items, job, progress)
        message = job.message or f"{shipment.found.kind} pushed with mediator"
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*removed, *adds]
        made = HfApi().create_commit(
            repo_id, operations, commit_message=message, revision=job.revision, parent_commit=there.sha
        )
        commit = made.oid
    _check_arrived(shipment, commit)
    return Pushed(
        repo_id, job.revision, commit, _url(repo_id, job), bool(there.private), tuple(item.name for item in items),
        sum(item.n_bytes for item in items), tuple(kept), tuple(stale), _notices(there, job),
    )  # fmt: skip


def _upload(
    repo_id: str, adds: Sequence[CommitOperationAdd], items: Sequence[Item], job: PushJob, progress: Progress
) -> None:
    """Bring the contents into the Hub's store; no commit speaks of them yet."""
    from huggingface_hub import HfApi

    advance = counter(progress, "upload", sum(item.n_bytes for item in items))
    HfApi().preupload_lfs_files(repo_id, adds, revision=job.revision, free_memory=False)
    # Files that a .gitignore there names would be left out of the commit without a word.
    if ignored := [add.path_in_repo for add in adds if getattr(add, "_should_ignore", False)]:
        message = f"its .gitignore leaves out {some_names(ignored)}"
        raise OutputError(Problem(repo_id, message, "remove the .gitignore there, then push again"))
    advance(sum(item.n_bytes for item in items))


def _check_ours(there: ModelInfo, siblings: Mapping[str, RepoSibling], repo_id: str, job: PushJob) -> None:
    others = [name for name in siblings if name not in _OF_ANYBODY]
    ours = any(name in siblings for name in MANIFESTS) or "mediator" in (there.tags or ())
    if others and not ours and not job.overwrite:
        message = f"holds {len(others)} files that mediator did not push, such as {others[0]}"
        hint = "choose another name; --overwrite replaces those of the same names and leaves the others"
        raise OutputError(Problem(repo_id, message, hint))


def _same(shipment: Shipment, siblings: Mapping[str, RepoSibling], progress: Progress) -> list[str]:
    """Name the files that stand in the repository already, byte for byte."""
    alike = [i for i in shipment.items if i.name in siblings and siblings[i.name].size in (None, i.n_bytes)]
    advance = counter(progress, "compare", sum(item.n_bytes for item in alike)) if alike else lambda n: None
    found = []
    for item in alike:
        if _is_same(shipment, item, siblings[item.name]):
            found.append(item.name)
        advance(item.n_bytes)
    return found


def _is_same(shipment: Shipment, item: Item, there: RepoSibling) -> bool:
    file = shipment.found.folder / item.name
    if there.lfs is not None:
        mine = digest_file(file) if item.data is None else hashlib.sha256(item.data).hexdigest()
        return there.lfs.sha256 == mine
    data = file.read_bytes() if item.data is None else item.data
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _stale(repo_id: str, commit: str | None, siblings: Mapping[str, RepoSibling]) -> set[str]:
    """Name the files of the bundle that stands there; no file of anybody else is ever removed."""
    from huggingface_hub import hf_hub_download

    if MANIFEST not in siblings:
        return set()
    file = hf_hub_download(repo_id, MANIFEST, revision=commit)
    try:
        with open(file, encoding="utf-8") as stream:  # noqa: PTH123 - a path of another library
            named = {MANIFEST, *file_names(Manifest.model_validate_json(stream.read()))}
    except ValueError:
        return set()
    return named & set(siblings)


def _check_arrived(shipment: Shipment, commit: str) -> None:
    """Make sure that the commit has every file in its size."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(shipment.repo_id, revision=commit, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    lost = [item.name for item in shipment.items if sizes.get(item.name, -1) not in (None, item.n_bytes)]
    if lost:
        message = f"after the push these files are not there as they were sent: {some_names(lost)}"
        raise OutputError(Problem(shipment.repo_id, message, "push again; pull refuses what is there now"))


def _notices(there: ModelInfo, job: PushJob) -> tuple[str, ...]:
    if job.public and there.private:
        return (f"{there.id} was private and stays so; its settings on the Hub change that",)
    return ()


def _url(repo_id: str, job: PushJob) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}" + ("" if job.revision == _MAIN else f"/tree/{job.revision}")


@contextmanager
def _calm(shown: bool) -> Iterator[None]:
    """Let huggingface_hub show its bars, or not; never its log, which tells signed addresses when it tries again."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported by its documentation
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    log, hides = logging.getLogger("huggingface_hub"), not shown and not are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.CRITICAL)
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if hides:
            enable_progress_bars()
