"""What went wrong at a URL, in words. Never quotes what a service says: it may hold a key or a signed address."""

from __future__ import annotations

from mediator_cli.errors import CheckpointError, Problem, first_line

_NO_LOGIN = (
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
    "DefaultCredentialsError", "RefreshError", "LocalTokenNotFoundError",
)  # fmt: skip
_EXTRA = "pip install 'mediator-merge[remote]'"
_LOGIN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; FSSPEC_S3_ANON=true for a public bucket",
    "gs": "`gcloud auth application-default login`; FSSPEC_GS_TOKEN=anon for a public bucket",
    "hf": "`hf auth login`, or set HF_TOKEN",
}
_SAME = {"s3a": "s3", "gcs": "gs"}


class ShortReadError(Exception):
    """Fewer bytes came than were asked for."""


def explain(error: Exception, url: str) -> CheckpointError:
    """Say what an exception of fsspec, or of the package below it, means for a URL."""
    protocol = url.partition("://")[0]
    return CheckpointError(Problem(url, *_words(error, _SAME.get(protocol, protocol))))


def _words(error: Exception, protocol: str) -> tuple[str, str]:
    login = _LOGIN.get(protocol, "see fsspec's documentation of this protocol")
    if isinstance(error, ImportError):
        needed = f"{protocol}:// needs a package that is not installed: {first_line(error)}"
        return needed, _EXTRA if protocol in ("s3", "gs") else "install that package"
    if _is_named(error, *_NO_LOGIN):
        return "no credentials were found", login
    if isinstance(error, PermissionError):
        return "the service does not allow it", f"may your key reach this place? {login}"
    if isinstance(error, FileNotFoundError):
        return "no such bucket or folder", "check the URL; names of objects are told apart by upper and lower case"
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return f"the service refuses it: {type(error).__name__}", "choose another place"
    if isinstance(error, NotImplementedError):
        return f"{protocol}:// cannot do that: {type(error).__name__}", "copy the folder to a disk first"
    if isinstance(error, ShortReadError):
        return "fewer bytes come than were asked for", "check the network and the service, and try again"
    return f"cannot be reached: {type(error).__name__}", "check the network and the service, and try again"


def is_final(error: Exception) -> bool:
    """Whether another try would be in vain."""
    kinds = (ImportError, PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, (*kinds, NotImplementedError)) or _is_named(error, *_NO_LOGIN)


def _is_named(error: BaseException | None, *names: str) -> bool:
    """Whether an error, or one that caused it, is of a class with one of the names; those packages may be missing."""
    while error is not None:
        if any(kind.__name__ in names for kind in type(error).__mro__):
            return True
        error = error.__cause__
    return False
