"""What is sent: the files of a folder as they are, and those texts anew that others shall not read as they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from mediator_cli.bundle.adapter import ADAPTER_MANIFEST
from mediator_cli.bundle.card import CARD
from mediator_cli.bundle.manifest import MANIFEST, Manifest, to_json
from mediator_cli.bundle.replace import record_of
from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.engine.publish import MANIFESTS
from mediator_cli.errors import BundleError, Problem
from mediator_cli.export.hub.card import card_warnings, pushed_card
from mediator_cli.export.hub.folder import look_into, read_text
from mediator_cli.export.hub.paths import hidden, hide_in_config, hide_in_json, is_own
from mediator_cli.pipeline.progress import Progress, counter, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from mediator_cli.export.hub.folder import Found

_CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json")
_REPORTS = (*MANIFESTS, "conflicts.json", "training.json", "export.json")
_HINT = "merge again, or fetch the bundle again; `mediator verify` lists all that is wrong"


@dataclass(frozen=True)
class Item:
    """A file to send: the bytes in `data`, or where there are none the file in the folder."""

    name: str
    n_bytes: int
    data: bytes | None = None


@dataclass(frozen=True)
class Shipment:
    """All that is to stand in the repository; `hidden` names the files in which paths were shortened."""

    found: Found
    repo_id: str
    items: tuple[Item, ...]
    card: str
    hidden: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes in all."""
        return sum(item.n_bytes for item in self.items)


def make_shipment(folder: Path, repo_id: str, keep_paths: bool = False, progress: Progress = silent) -> Shipment:
    """Check a folder and lay out what is to be sent; nothing in the folder changes.

    Raises BundleError where it is damaged, or nothing that mediator writes.
    """
    found = look_into(folder)
    _check_whole(found, progress)
    texts = {} if keep_paths else _without_paths(found)
    shortened = tuple(sorted(texts))
    old = texts[CARD].decode() if CARD in texts else read_text(folder, CARD)
    recipe = found.manifest.recipe.text if found.manifest else ""
    card = pushed_card(old, found, repo_id, recipe if keep_paths else hidden(recipe, _own_paths(found)))
    texts[CARD] = card.encode()
    items = _items(found, _with_digests(found, texts))
    return Shipment(found, repo_id, items, card, shortened, tuple(card_warnings(card, found)))


def _check_whole(found: Found, progress: Progress) -> None:
    """Refuse a damaged bundle before anybody else can fetch it."""
    total = sum((found.folder / name).stat().st_size for name in found.names if (found.folder / name).is_file())
    if found.manifest is not None:
        if problems := verify_bundle(found.folder, counter(progress, "verify", total)).problems:
            raise BundleError([Problem(p.place, p.message, _HINT) for p in problems])
    elif ADAPTER_MANIFEST in found.names:
        records = json.loads(read_text(found.folder, ADAPTER_MANIFEST)).get("files") or ()
        for record in records:
            file = found.folder / str(record["name"])
            if not file.is_file() or (digest_file(file) != record["sha256"] and record["name"] != CARD):
                raise BundleError(Problem(str(file), "is not as its manifest says", "make the adapter again"))


def _own_paths(found: Found) -> list[str]:
    """List the places of this machine that the manifest tells of: sources and prompts."""
    paths = [parent.path for parent in found.parents]
    if found.manifest is not None:
        sources = (found.manifest.base, *found.manifest.experts, *(c.source for c in found.manifest.history))
        paths += [source.path for source in sources]
        paths += [source.prompts.name for source in sources if source.prompts]
    return [path for path in dict.fromkeys(paths) if is_own(path)]


def _without_paths(found: Found) -> dict[str, bytes]:
    """Write the texts anew in which paths of this machine stand, by name."""
    known, texts = _own_paths(found), {}
    for name in found.names:
        short = PurePosixPath(name).name
        if short not in (*_REPORTS, *_CONFIGS, CARD) or not (found.folder / name).is_file():
            continue
        old = read_text(found.folder, name)
        if short == CARD:
            new = hidden(old, known)
        else:
            hide = hide_in_config if short in _CONFIGS else hide_in_json
            data = _parsed(found.folder / name, old)
            changed = hide(old, known)
            new = old if changed == data else json.dumps(changed, indent=1, ensure_ascii=False) + "\n"
        if new != old:
            texts[name] = new.encode()
    return texts


def _parsed(file: Path, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        raise BundleError(Problem(str(file), "is no JSON", _HINT)) from None


def _with_digests(found: Found, texts: dict[str, bytes]) -> dict[str, bytes]:
    """Give the manifest the digests of the texts that were written anew, and its own checksum."""
    if found.manifest is not None:
        text = texts.get(MANIFEST)
        manifest = Manifest.model_validate_json(text) if text else found.manifest
        listed = {r.name: r for r in manifest.files} | {n: record_of(n, d) for n, d in texts.items() if n != MANIFEST}
        files = tuple(listed[name] for name in sorted(listed, key=PurePosixPath))
        return {**texts, MANIFEST: to_json(manifest.model_copy(update={"files": files})).encode()}
    if ADAPTER_MANIFEST in found.names:
        data = json.loads(texts.get(ADAPTER_MANIFEST) or read_text(found.folder, ADAPTER_MANIFEST))
        changed = {name: record_of(name, data) for name, data in texts.items() if name != ADAPTER_MANIFEST}
        data["files"] = [
            changed[row["name"]].model_dump() if row["name"] in changed else row for row in data.get("files") or ()
        ]
        return {**texts, ADAPTER_MANIFEST: (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()}
    return texts


def _items(found: Found, texts: Mapping[str, bytes]) -> tuple[Item, ...]:
    """List what is sent, manifests last."""
    names: Iterable[str] = dict.fromkeys([*found.names, *texts])
    ordered = sorted(names, key=lambda name: (name in MANIFESTS, name))
    return tuple(
        Item(name, len(texts[name]), texts[name]) if name in texts else Item(name, (found.folder / name).stat().st_size)
        for name in ordered
    )
