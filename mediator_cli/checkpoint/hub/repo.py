"""A repository on the Hub, as it was found: pinned to a commit, with the folder that its files have in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class HubRepo:
    """A repository at one commit: `folder` is where its files lie or will lie in the cache, `sizes` are in bytes.

    `source` is what the user wrote. Offline, only what is in the cache has a size.
    """

    source: str
    repo_id: str
    revision: str
    commit: str
    folder: Path
    sizes: Mapping[str, int] = field(repr=False, compare=False)
    offline: bool = False

    @property
    def storage(self) -> Path:
        """The folder of the repository in the cache."""
        return self.folder.parent.parent

    def name_of(self, file: Path) -> str:
        """Name a file of the folder as the repository does."""
        return file.relative_to(self.folder).as_posix()
