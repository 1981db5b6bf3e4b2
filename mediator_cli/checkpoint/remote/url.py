"""Which words are URLs, and which URLs are taken; none that holds a secret, for a bundle keeps its recipe."""

from __future__ import annotations

import re

from mediator_cli.errors import CheckpointError, Problem

_URL = re.compile(r"(?:[\w+.-]+::)*(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)


def is_url(text: str) -> bool:
    """Whether a source or output is written as a URL.

    >>> is_url("s3://bucket/model"), is_url("./s3/model"), is_url("org/name")
    (True, False, False)
    """
    return _URL.match(text) is not None


def check_url(text: str) -> str:
    """Return a URL of a folder in its plain form, without a slash at its end.

    Raises CheckpointError for one that holds a secret, chains file systems, or names no folder.

    >>> check_url("S3://bucket/a//")
    's3://bucket/a'
    """
    match = _URL.match(text)
    protocol, rest = (match["protocol"], match["rest"]) if match else ("", "")
    if "?" in rest or "#" in rest or "@" in rest.split("/")[0]:
        hint = "name the folder alone; a key or token belongs in the environment or the configuration of its service"
        raise CheckpointError(Problem(redacted(text), "holds more than a place", hint))
    plain = rest.rstrip("/")
    if "::" in text or not plain or any(ord(letter) < ord(" ") for letter in plain) or ".." in plain.split("/"):
        raise CheckpointError(Problem(redacted(text), "is no URL of a folder", "write protocol://place/folder"))
    return f"{protocol.lower()}://{plain}"


def redacted(text: str) -> str:
    """Give a URL without what may be secret: user and password, query, fragment.

    >>> redacted("s3://key:secret@bucket/a?signature=1"), redacted("s3://bucket/a#f"), redacted("./a?b")
    ('s3://***@bucket/a?***', 's3://bucket/a#***', './a?b')
    """
    match = _URL.match(text)
    if match is None:
        return text
    head, mark, _ = _cut(match["rest"])
    place, slash, path = head.partition("/")
    owner, at, host = place.rpartition("@")
    hidden = f"***@{host}" if at and owner else place
    return f"{match['protocol']}://{hidden}{slash}{path}{mark}{'***' if mark else ''}"


def _cut(rest: str) -> tuple[str, str, str]:
    """Part a URL at its query or fragment."""
    found = re.search(r"[?#]", rest)
    return (rest, "", "") if found is None else (rest[: found.start()], found[0], rest[found.end() :])
