"""Collections on the Hugging Face Hub: which models one names. What it said last is noted, and found again offline."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.cache import read_note, write_note
from mediator_cli.checkpoint.hub.errors import hub_errors, status_of
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from mediator_cli.checkpoint.hub.find import Access


def collection_lister(access: Access) -> Callable[[str], tuple[str, ...]]:
    """Give a function that lists a collection's models by its slug, as `load_recipe` takes it."""
    return lambda slug: list_collection(slug, access)


def list_collection(slug: str, access: Access) -> tuple[str, ...]:
    """Name the models of a collection, org/name, in its own order; data sets, spaces and papers are passed over.

    Raises CheckpointError where the Hub knows no such collection or cannot be reached; offline, where it was not listed
    on this machine before.
    """
    from huggingface_hub import constants

    key = hashlib.sha256(f"{constants.ENDPOINT}/{slug}".encode()).hexdigest()[:32]
    if access.offline or constants.HF_HUB_OFFLINE:
        return _noted(slug, key)
    with hub_errors(slug, "list of its models"):
        models = _ask(slug)
    write_note("collections", key, json.dumps(models))
    return models


def _ask(slug: str) -> tuple[str, ...]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().get_collection(slug)
    except HfHubHTTPError as error:
        if status_of(error) not in (401, 404):
            raise
        hint = "copy org/title-0123456789ab from its page's address; a private one needs `hf auth login`, or HF_TOKEN"
        raise CheckpointError(Problem(slug, "no such collection on the Hub", hint)) from None
    except (LookupError, TypeError, AttributeError):
        message = "the answer is not one of the Hub's API"
        raise CheckpointError(Problem(slug, message, "check the network and HF_ENDPOINT")) from None
    return tuple(item.item_id for item in found.items if item.item_type == "model")


def _noted(slug: str, key: str) -> tuple[str, ...]:
    note = read_note("collections", key)
    if note is None:
        message = "the collection was not listed on this machine before; offline nothing can be asked"
        raise CheckpointError(Problem(slug, message, "run once without --offline and HF_HUB_OFFLINE"))
    return tuple(json.loads(note))
