"""Results in a bundle's model card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.bundle.card import CARD, with_block
from mediator_cli.bundle.manifest import bundle_file, read_manifest
from mediator_cli.bundle.replace import replace_files
from mediator_cli.checkpoint.header import unreadable

if TYPE_CHECKING:
    from pathlib import Path


def write_results(folder: Path, results: str) -> None:
    """Put results in Markdown into a marked block of a bundle's README.md, in the place of older ones.

    The manifest gets the card's new digest; a crash leaves a bundle that `mediator verify` accepts. Raises BundleError
    when the folder is no bundle, OutputError when the disk refuses.
    """
    manifest = read_manifest(folder)
    file = bundle_file(folder, CARD)
    try:
        card = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    except OSError as error:
        raise unreadable(file, error) from None
    text = with_block(card, "results", f"## Results\n\n{results}")
    replace_files(folder, manifest, {CARD: text.encode()})
