"""Paths of this machine in what is to be pushed: found in manifests, configs and cards, and shortened to names."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.lineage import label
from mediator_cli.checkpoint.remote.url import is_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_PATH = re.compile(
    r"(?<![\w/.~\\-])(?!//)(?:file://)?(?:[A-Za-z]:\\[^\s\"'`|<>{}\[\],]+|~?/(?:[\w.@+%=-]+/)+[\w.@+%=-]*)"
)
_NAMED = re.compile(r"(^|_)name_or_path$")
_USUAL = {"home", "Users", "root", "mnt", "media", "data", "tmp", "scratch", "work", "workspace", "private", "Volumes"}
"""First folders of paths that are told even where this machine has none such: the merge may have run elsewhere."""


def hidden(text: str, known: Iterable[str] = ()) -> str:
    """Shorten the paths of this machine in a text to the last part of each; `known` may hold spaces.

    >>> hidden("base: /home/me/models/base, see https://host/a/b and ../experts/x", [])
    'base: base, see https://host/a/b and ../experts/x'
    >>> hidden("/home/me/my models/x", ["/home/me/my models/x"])
    'x'
    """
    for path in sorted(known, key=len, reverse=True):
        text = re.sub(re.escape(path) + r"(?![\w/-])", lambda _, path=path: label(path), text)  # type: ignore[misc]
    return _PATH.sub(lambda match: _shortened(match[0]), text)


def is_own(path: str) -> bool:
    """Whether a source's path is one of this machine, or a URL that holds a secret: nothing to show to others."""
    return path != label(path)


def _shortened(path: str) -> str:
    plain = path.removeprefix("file://")
    if plain.startswith("/") and not _is_place(plain.split("/")[1]):
        return path
    return re.split(r"[/\\]", plain.rstrip("/\\"))[-1]


@cache
def _is_place(first: str) -> bool:
    return first in _USUAL or Path("/", first).is_dir()


def hide_in_json(text: str, known: Iterable[str]) -> Any:  # noqa: ANN401 - any JSON
    """Shorten paths in all strings of a JSON text."""
    known = list(known)
    return _mapped(json.loads(text), lambda string: hidden(string, known))


def hide_in_config(text: str, known: Iterable[str]) -> Any:  # noqa: ANN401 - any JSON
    """Shorten, in the JSON of a config, only what says where it was loaded from."""
    data, known = json.loads(text), list(known)
    if isinstance(data, dict):
        for name, value in data.items():
            if _NAMED.search(name) and isinstance(value, str) and not is_url(value):
                data[name] = hidden(value, [*known, *([value] if is_own(value) else [])])
    return data


def _mapped(data: Any, change: Callable[[str], str]) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(data, str):
        return change(data)
    if isinstance(data, list):
        return [_mapped(item, change) for item in data]
    if isinstance(data, dict):
        return {key: _mapped(value, change) for key, value in data.items()}
    return data
