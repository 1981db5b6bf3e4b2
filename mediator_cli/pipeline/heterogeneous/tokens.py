"""Which row each expert has for each token of the output: matched by what the tokens stand for in a text.

Byte-level BPE writes a space as `Ġ` and other bytes as letters of its own, SentencePiece writes `▁` and `<0x0A>`: both
are read as bytes first, so that ` the` of one is ` the` of the other.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Literal

import numpy as np

from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.vocabulary import TOKENIZER_JSON

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.vocabulary import Vocabulary

Spelling = Literal["bytes", "pieces", "plain"]
_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_ROLES = ("bos", "eos", "pad", "unk")


def spelling_of(vocabulary: Vocabulary) -> Spelling:
    """Tell how a tokenizer writes its tokens: `bytes` as letters, `pieces` with `▁` for a space, or `plain`."""
    if vocabulary.file.suffix == ".model":
        return "pieces"
    if vocabulary.file.name != TOKENIZER_JSON:
        return "bytes" if vocabulary.file.with_name("merges.txt").is_file() else "plain"
    data = read_json(vocabulary.file)
    steps = json.dumps([data.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if '"ByteLevel"' in steps:
        return "bytes"
    return "pieces" if '"Metaspace"' in steps or "▁" in steps else "plain"


def meaning(text: str, spelling: Spelling) -> bytes:
    r"""Give the bytes of a text that a token stands for.

    >>> meaning("Ġthe", "bytes"), meaning("▁the", "pieces"), meaning("<0x0A>", "pieces"), meaning("the", "plain")
    (b' the', b' the', b'\n', b'the')
    """
    if spelling == "bytes" and all(letter in _BYTES for letter in text):
        return bytes(_BYTES[letter] for letter in text)
    if spelling == "pieces":
        found = _BYTE.match(text)
        return bytes([int(found[1], 16)]) if found else text.replace("▁", " ").encode("utf-8", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def _byte_letters() -> dict[str, int]:
    """Give the letters that byte-level tokenizers write for bytes: themselves if printable, others from U+0100 on.

    The mapping of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES: Mapping[str, int] = _byte_letters()


def rows_for(output: Vocabulary, own: Vocabulary, n_rows: int) -> NDArray[np.int64]:
    """Find the row of an expert, of `n_rows`, for each id of the output's vocabulary; -1 where it has none.

    Special tokens match by their own text, and where that fails by their role: end of text, start, padding, unknown.
    """
    known = _by_meaning(own)
    spelling = spelling_of(output)
    special = {token.content for token in output.added.values()}
    by_role = _by_role(output, own)
    found = np.full(output.end, -1, np.int64)
    for text, number in output.tokens.items():
        if own is output:
            row: int | None = number
        elif text in special:
            row = own.tokens.get(text, by_role.get(text))
        else:
            row = known.get(meaning(text, spelling))
        if row is not None and row < n_rows:
            found[number] = row
    return found


def _by_meaning(own: Vocabulary) -> dict[bytes, int]:
    """Give the ids of a vocabulary by what its tokens stand for; of several with one meaning the first."""
    spelling = spelling_of(own)
    found: dict[bytes, int] = {}
    for text, number in sorted(own.model.tokens.items(), key=lambda item: item[1]):
        if text not in own.added:
            found.setdefault(meaning(text, spelling), number)
    for text, token in own.added.items():
        if not token.special:
            found.setdefault(text.encode(), token.id)
    return found


def _by_role(output: Vocabulary, own: Vocabulary) -> dict[str, int]:
    found: dict[str, int] = {}
    for role in reversed(_ROLES):
        ours, theirs = output.role_id(role), own.role_id(role)
        if ours is not None and theirs is not None:
            found[output.texts[ours]] = theirs
    # A token with several roles takes the end of text, which has to be said.
    if (ours := output.role_id("eos")) is not None and (theirs := own.role_id("eos")) is not None:
        found[output.texts[ours]] = theirs
    return found
