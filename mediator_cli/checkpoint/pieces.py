"""The pieces of a SentencePiece model, read from its protobuf without the sentencepiece library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.checkpoint.header import unreadable
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PIECES = 1
_TEXT = 1
_FIXED_BYTES = {1: 8, 5: 4}


def read_pieces(file: Path) -> dict[str, int]:
    """Read the texts of all pieces with their numbers; raise CheckpointError for anything but a SentencePiece model."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from None
    try:
        texts = [_text(piece) for field, piece in _fields(data) if field == _PIECES]
    except (ValueError, IndexError, KeyError):
        texts = []
    if not texts:
        hint = "save the tokenizer as tokenizer.json: load it with AutoTokenizer and call save_pretrained"
        raise CheckpointError(Problem(str(file), "is no SentencePiece model that can be read", hint))
    return {text: number for number, text in enumerate(texts)}


def _text(piece: bytes) -> str:
    return next(value for field, value in _fields(piece) if field == _TEXT).decode("utf-8")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Go through a message; give number and bytes of its fields, with no bytes for numbers."""
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _number(data, at)
            yield key >> 3, b""
            continue
        size, at = _number(data, at) if kind == 2 else (_FIXED_BYTES[kind], at)
        if at + size > len(data):
            raise ValueError("the message ends before its last field")
        yield key >> 3, data[at : at + size]
        at += size


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte, lowest first; give it with the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
