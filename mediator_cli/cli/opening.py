"""Open a bundle for the commands that answer: quiet libraries, and a word on what takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.runtime.combine import Combine
    from mediator_cli.runtime.model import RoutedModel


def quiet_transformers() -> None:
    """Keep transformers' own bars and advice off the terminal; its errors still raise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def opened(
    folder: Path, combine: Combine | None = None, cache_bytes: int | None = None
) -> tuple[RoutedModel, PreTrainedTokenizerBase]:
    """Open a bundle and its tokenizer, with a spinner on a terminal; raise BundleError when it is damaged.

    `cache_bytes` bounds the memory for experts and mixtures, None = as is usual.
    """
    from mediator_cli.cli.output import console

    with console(stderr=True).status("opening the bundle"):
        from mediator_cli.runtime.open import CACHE_BYTES, open_bundle
        from mediator_cli.runtime.prompts import load_tokenizer

        quiet_transformers()
        most = CACHE_BYTES if cache_bytes is None else cache_bytes
        return open_bundle(folder, combine=combine, cache_bytes=most), load_tokenizer(folder)
