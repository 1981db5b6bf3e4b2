"""What went wrong at the Hub, in words: what it means and what to do next. Never shows a token or a signed address."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mediator_cli.errors import CheckpointError, Problem, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOGIN = "`hf auth login`, or set HF_TOKEN"
_RETRY = "try again; with --offline only what is in the cache is used"


def http_error() -> type[Exception]:
    """Give the base of all errors of httpx, on whichever of its versions huggingface_hub is built."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # re-exported without saying so

    error: type[Exception] = HTTPError
    return error


@contextmanager
def hub_errors(source: str, what: str = "") -> Iterator[None]:
    """Turn failures of huggingface_hub inside the block into a CheckpointError about `source` and its file `what`."""
    try:
        yield
    except (http_error(), OSError, ValueError) as error:
        raise explain(error, source, what) from None


def explain(error: Exception, source: str, what: str = "") -> CheckpointError:
    """Say what an exception of huggingface_hub means for a source."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__, source, what)
    message, hint = _words(error, source)
    if not what and _is_missing(error):
        message = f"no such folder, and {message}"
    return CheckpointError(Problem(f"{source}: {what}" if what else source, message, hint))


def _words(error: Exception, source: str) -> tuple[str, str]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return _answer(error, source)
    if isinstance(error, HFValidationError):
        return "no valid name of a Hub repository", "write org/name or org/name@revision"
    if _is_transport(error):
        return f"the Hub cannot be reached: {_reason(error)}", f"check the network and HF_ENDPOINT, {_RETRY}"
    if isinstance(error, OSError):
        reason = (error.strerror or type(error).__name__).lower()
        return f"cannot fill the cache: {reason}", "check its disk and rights; HF_HUB_CACHE moves it"
    # The text of such an error may quote a header, and headers carry the token.
    return f"the Hub's answer makes no sense: {type(error).__name__}", f"check HF_ENDPOINT, {_RETRY}"


def _is_missing(error: Exception) -> bool:
    """Whether the source may as well be a folder whose path is wrong."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return not isinstance(error, GatedRepoError)
    return isinstance(error, HFValidationError) or (_is_transport(error) and status_of(error) is None)


def _is_transport(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, (http_error(), ConnectionError, TimeoutError, OfflineModeIsEnabled))


def _reason(error: Exception) -> str:
    """Give the text of the errors that are known to quote no header, the name of all others."""
    name = type(error).__name__
    return f"{name} ({first_line(error)})" if name in ("ConnectError", "ConnectTimeout", "ReadTimeout") else name


def _answer(error: Exception, source: str) -> tuple[str, str]:
    """Say what an answer with an error status means, and what to do."""
    from huggingface_hub import constants, errors

    repo, _, revision = source.partition("@")
    page = f"{constants.ENDPOINT}/{repo}"
    # A gated repository is also one that is not found, so it comes first.
    kinds: dict[type[Exception], tuple[str, str]] = {
        errors.GatedRepoError: (
            "is gated: its owner asks you to accept terms",
            f"accept them at {page}, then {_LOGIN}",
        ),
        errors.RevisionNotFoundError: (f"has no revision '{revision or 'main'}'", f"branches and tags are at {page}"),
        errors.RemoteEntryNotFoundError: ("the repository has no such file", f"see {page}"),
        errors.DisabledRepoError: ("was disabled by the Hub", f"see {page}"),
        errors.RepositoryNotFoundError: (
            "no such repository on the Hub",
            f"relative paths in a recipe start at the recipe's folder; {_private_hint()}",
        ),
    }
    told = next((told for kind, told in kinds.items() if isinstance(error, kind)), None)
    return told or _status(error, page, constants.ENDPOINT)


def _status(error: Exception, page: str, endpoint: str) -> tuple[str, str]:
    status = status_of(error)
    if status == 401:
        return "the Hub does not accept your token", f"make a new one at {endpoint}/settings/tokens, then {_LOGIN}"
    if status == 403:
        return "the Hub forbids it", f"your token may not read this repository; see {page}"
    if status == 429:
        hint = f"wait {_wait(error)} and try again; with a token you may ask more often: {_LOGIN}"
        return "the Hub says: too many requests", hint
    return f"the Hub answers with error {status}", _RETRY


def _private_hint() -> str:
    from huggingface_hub import get_token

    if get_token() is None:
        return f"without a token a private repository looks the same: {_LOGIN}"
    return "a private repository that your token may not read looks the same"


def _wait(error: Exception) -> str:
    seconds = retry_after(error)
    return f"{seconds:.0f} s" if seconds else "some minutes"


def status_of(error: Exception | None) -> int | None:
    """Give the HTTP status of an error that has one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def retry_after(error: Exception | None) -> float:
    """Give the seconds that the server asks to wait, in either header that the Hub uses; 0 where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    reset = re.search(r"\bt=(\d+)", headers.get("RateLimit", "")) if status_of(error) == 429 else None
    text = str(headers.get("Retry-After", reset[1] if reset else ""))
    return float(text) if text.isdecimal() else 0.0
