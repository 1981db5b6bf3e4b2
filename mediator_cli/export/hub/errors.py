"""What went wrong while pushing, in words. The token is in none of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.hub.errors import explain, http_error, status_of
from mediator_cli.errors import MediatorError, OutputError, Problem, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST = 200
_BROKEN = 500
_AGAIN = "run the same command again: what the Hub has already is not sent twice"


@contextmanager
def push_errors(repo_id: str) -> Iterator[None]:
    """Turn failures of huggingface_hub inside the block into an OutputError about a repository."""
    try:
        yield
    except MediatorError:
        raise
    except (http_error(), OSError, ValueError, RuntimeError) as error:
        raise _explained(error, repo_id) from None


def check_token(repo_id: str) -> None:
    """Raise OutputError where there is no token; pushing always needs one."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OutputError(Problem(repo_id, "HF_HUB_OFFLINE is set, and pushing needs the Hub", "unset it"))
    if get_token() is None:
        hint = (
            f"make one with write access at {constants.ENDPOINT}/settings/tokens, then `hf auth login`, or set HF_TOKEN"
        )
        raise OutputError(Problem(repo_id, "you have no token of the Hub, and pushing needs one", hint))


def _explained(error: Exception, repo_id: str) -> OutputError:
    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, Exception) and not isinstance(cause, RuntimeError):
        return _explained(cause, repo_id)
    if isinstance(error, ValueError) and "README.md" in str(error):
        hint = "mend the part between the first two --- of README.md"
        return OutputError(Problem(repo_id, f"the Hub does not take the card's metadata{_said(error, 1)}", hint))
    if (told := _status(error, repo_id)) is not None:
        return OutputError(Problem(repo_id, *told))
    if isinstance(error, RuntimeError):
        return OutputError(Problem(repo_id, f"the upload failed: {_clean(first_line(error))}", _AGAIN))
    problem = explain(error, repo_id, "upload").problems[0]
    return OutputError(Problem(repo_id, problem.message, _AGAIN if status_of(error) is None else problem.hint))


def _status(error: Exception, repo_id: str) -> tuple[str, str] | None:
    from huggingface_hub import constants

    status, owner, said = status_of(error), repo_id.partition("/")[0], _said(error)
    if status is None:
        return None
    if status == 403 and any(word in said.lower() for word in ("storage", "quota", "limit")):
        status = 413
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    changed = (f"the repository changed while this was pushed{said}", _AGAIN)
    full = (f"the Hub has no room left for you{said}", "free some there, push with --public, or buy more")
    known = {
        400: (f"the Hub does not take it{said}", "check the names of repository and branch"),
        401: ("the Hub does not accept your token", f"make a new one with write access at {tokens}, `hf auth login`"),
        402: full,
        403: (
            f"the Hub forbids you to write there{said}",
            f"your token needs write access ({tokens}), and you the right to write for {owner}",
        ),
        404: (
            "no such repository, or your token may not see it",
            f"check the name and the right to write for {owner}",
        ),
        409: changed,
        412: changed,
        413: full,
    }
    return known.get(status) or ((f"the Hub answers with error {status}", _AGAIN) if status >= _BROKEN else None)


def _said(error: Exception, line: int = 0) -> str:
    """Give the line of the server's own words, where it has any."""
    words = str(getattr(error, "server_message", None) or "")
    lines = (words or (str(error) if line else "")).strip().split("\n")
    text = _clean(lines[min(line, len(lines) - 1)].strip(" -"))
    return f": {text}" if text else ""


def _clean(text: str) -> str:
    """Cut a text of others, and take the token out of it, should it quote one."""
    from huggingface_hub import get_token

    token = get_token()
    return (text.replace(token, "***") if token else text)[:_LONGEST]
