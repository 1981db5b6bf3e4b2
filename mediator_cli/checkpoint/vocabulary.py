"""The tokens of a model folder: which text has which id, read from the tokenizer's files without transformers.

Ids are those that transformers gives, not those that the files state: tokens beside the tokenizer's model are counted
on from the model's last token, in the order of the files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import read_json, unreadable
from mediator_cli.checkpoint.pieces import read_pieces
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
EXTRA_TOKENS = ("extra_special_tokens", "additional_special_tokens")
"""Where tokenizers list special tokens without a role: since transformers 5, and before."""
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PIECES = ("tokenizer.model", "spiece.model")
_MODELS = (TOKENIZER_JSON, "vocab.json", "vocab.txt", *_PIECES, "sentencepiece.bpe.model")
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges*", "spiece*", "sentencepiece*", "*.spm", "*.tiktoken", SPECIAL_TOKENS, ADDED_TOKENS,
    "chat_template*", "*.jinja",
)  # fmt: skip
"""Patterns of the files that belong to a tokenizer and its chat templates."""
_SAVE = "save the tokenizer as tokenizer.json: load it with AutoTokenizer and call save_pretrained"


@dataclass(frozen=True)
class AddedToken:
    """A token beside the tokenizer's model: its id, and how it is found in a text."""

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        """All but text and id, as tokenizer files write them."""
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TokenizerModel:
    """What cuts a text into tokens: its kind, its tokens, and a digest of merges or scores; None = not known."""

    kind: str | None
    tokens: Mapping[str, int] = field(repr=False)
    rules: str | None

    def is_same(self, other: TokenizerModel) -> bool:
        """Whether two models cut texts alike, as far as the files tell."""
        pairs = ((self.kind, other.kind), (self.rules, other.rules))
        return self.tokens == other.tokens and all(None in pair or pair[0] == pair[1] for pair in pairs)


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a tokenizer by text; `roles` are eos_token and the like, `extra` the other special ones.

    `restated` are added tokens whose file states another id than the one that transformers gives them.
    """

    file: Path
    model: TokenizerModel
    added: Mapping[str, AddedToken] = field(repr=False)
    roles: Mapping[str, str]
    extra: tuple[str, ...] = ()
    restated: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> Mapping[str, int]:
        """The id of each token."""
        return {**self.model.tokens, **{token.content: token.id for token in self.added.values()}}

    @cached_property
    def texts(self) -> Mapping[int, str]:
        """The token of each id."""
        return {number: text for text, number in self.tokens.items()}

    @cached_property
    def end(self) -> int:
        """One more than the highest id."""
        return max(self.tokens.values(), default=-1) + 1

    def role_id(self, role: str) -> int | None:
        """The id of a token by its role, such as `eos`; None where the tokenizer has no such token."""
        return self.tokens.get(self.roles.get(f"{role}_token", ""))


def is_tokenizer_file(file: Path) -> bool:
    """Whether a file belongs to the tokenizer or its chat templates, and not to a processor or another part."""
    return any(fnmatchcase(file.name, pattern) for pattern in TOKENIZER_FILES)


def has_vocabulary(folder: Path) -> bool:
    """Whether the folder brings a vocabulary of its own."""
    return any((folder / name).is_file() for name in _MODELS)


def vocabulary_digest(folder: Path) -> str:
    """Digest all that a folder says of its tokens; folders of equal digest have the same vocabulary."""
    config = _optional_json(folder / TOKENIZER_CONFIG)
    named = [[_text(config.get(role)) for role in _ROLES], _extra(config), config.get("added_tokens_decoder")]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    for name in (*_MODELS, "merges.txt", ADDED_TOKENS, SPECIAL_TOKENS):
        if (folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Read the vocabulary of a model folder; None where it brings none.

    Raises CheckpointError when the tokenizer's files are damaged, or of a form whose ids they do not tell.
    """
    file = next((folder / name for name in _MODELS if (folder / name).is_file()), None)
    if file is None:
        return None
    config = _optional_json(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in config:
        config = {**config, **_optional_json(folder / SPECIAL_TOKENS)}
    data = read_json(file) if file.suffix == ".json" else {}
    try:
        model = _model(file, data)
        roles = {role: text for role in _ROLES if (text := _text(config.get(role)))}
        extra = _extra(config)
        listed = [*_listed(data), *_configured(folder, config), *_named_tokens(roles.values(), extra)]
        added, restated = _numbered(model.tokens, listed)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"is no vocabulary that can be read ({type(error).__name__}: {error})"
        raise CheckpointError(Problem(str(file), message, _SAVE)) from None
    return Vocabulary(file, model, added, roles, extra, restated)


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _model(file: Path, data: Mapping[str, Any]) -> TokenizerModel:
    if file.name == TOKENIZER_JSON:
        return _from_tokenizer_json(file, data)
    if file.name == "vocab.json":
        merges = file.with_name("merges.txt")
        rules = _digest(_merge_lines(merges)) if merges.is_file() else None
        return TokenizerModel("BPE", {text: _id(number) for text, number in data.items()}, rules)
    if file.name == "vocab.txt":
        return TokenizerModel("WordPiece", {line: number for number, line in enumerate(_lines(file))}, None)
    if file.name in _PIECES:
        return TokenizerModel(None, read_pieces(file), None)
    raise CheckpointError(Problem(str(file), "tells no token ids: tokenizer classes shift them", _SAVE))


def _from_tokenizer_json(file: Path, data: Mapping[str, Any]) -> TokenizerModel:
    model = data.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise CheckpointError(Problem(str(file), "holds no vocabulary", _SAVE))
    vocab, merges = model["vocab"], model.get("merges")
    if isinstance(vocab, list):
        scores = (f"{text} {float(score)}" for text, score in vocab)
        return TokenizerModel("Unigram", {text: number for number, (text, _) in enumerate(vocab)}, _digest(scores))
    # Merges are pairs in new files and text in old ones.
    pairs = None if merges is None else _digest(m if isinstance(m, str) else " ".join(m) for m in merges)
    kind = model.get("type", "BPE" if merges is not None else None)
    return TokenizerModel(kind, {text: _id(number) for text, number in vocab.items()}, pairs)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise unreadable(file, error) from None


def _merge_lines(file: Path) -> Iterator[str]:
    return (line for line in _lines(file) if line and not line.startswith("#version"))


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _id(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is no token id")
    return number


def _listed(data: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Give the added tokens of a tokenizer.json."""
    for entry in data.get("added_tokens") or ():
        yield _added(entry, entry["id"])


def _configured(folder: Path, config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Give the added tokens that stand outside tokenizer.json."""
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        known = _optional_json(folder / ADDED_TOKENS)
        special = {_text(config.get(role)) for role in _ROLES} | set(_extra(config))
        decoder = {number: {"content": text, "special": text in special} for text, number in known.items()}
    for number, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        yield _added(entry, int(number))


def _named_tokens(*groups: Iterable[str]) -> Iterator[AddedToken]:
    """Give the tokens that settings name; those that no file defines are added when the tokenizer is loaded."""
    for text in (text for group in groups for text in group):
        yield AddedToken(text, -1)


def _added(entry: Mapping[str, Any], number: object) -> AddedToken:
    special = bool(entry.get("special", False))
    return AddedToken(
        content=str(entry["content"]),
        id=_id(number),
        special=special,
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        single_word=bool(entry.get("single_word", False)),
        normalized=bool(entry.get("normalized", not special)),
    )


def _numbered(model: Mapping[str, int], listed: Iterable[AddedToken]) -> tuple[dict[str, AddedToken], dict[str, int]]:
    """Give the tokens their ids as the tokenizers library does; note the stated ids that are other ones."""
    added: dict[str, AddedToken] = {}
    restated: dict[str, int] = {}
    n_new = 0
    for token in listed:
        if token.content in added or not token.content:
            continue
        is_new = token.content not in model
        if not is_new and token.id < 0:
            continue
        number = len(model) + n_new if is_new else model[token.content]
        n_new += is_new
        added[token.content] = AddedToken(token.content, number, **token.flags)
        if token.id not in (number, -1):
            restated[token.content] = token.id
    return added, restated


def _extra(config: Mapping[str, Any]) -> tuple[str, ...]:
    """List the special tokens without a role that a tokenizer_config.json names."""
    found = next((value for name in EXTRA_TOKENS if (value := config.get(name))), ())
    texts = found.values() if isinstance(found, dict) else found
    return tuple(text for text in map(_text, texts) if text)


def _text(value: object) -> str:
    """Read a token that is written as text or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
