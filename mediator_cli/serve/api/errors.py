"""Errors as OpenAI's clients read them: a status, and a body that says what is wrong, where, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.errors import Problem

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    503: "service_unavailable_error",
}
_RETRY_SECONDS = "1"


class ApiError(HTTPException):
    """What a caller is told instead of an answer; `param` is the field to mend, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """Give the error as OpenAI's clients read it."""
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def respond(error: ApiError) -> JSONResponse:
    """Make the response that tells an error."""
    return JSONResponse(error.body(), error.status_code, error.headers)


def from_problem(problem: Problem, status: int, code: str | None = None) -> ApiError:
    """Tell a problem of ours; its place is the field."""
    headers = {"retry-after": _RETRY_SECONDS} if status in (429, 503) else None
    return ApiError(status, sentence(problem), param=problem.place or None, code=code, headers=headers)


def sentence(problem: Problem) -> str:
    """Write a problem in one line.

    >>> from mediator_cli.errors import Problem
    >>> sentence(Problem("model", "no expert 'x'", "known: a, b"))
    "no expert 'x'; known: a, b"
    """
    return f"{problem.message}; {problem.hint}" if problem.hint else problem.message


def unexpected(request_id: str) -> ApiError:
    """Tell that we failed, without what is none of the caller's business; the log has the rest under the same id."""
    return ApiError(500, f"the server failed; its log tells why under {request_id}", code="internal_error")


def shutting_down() -> ApiError:
    """Tell that there is no answer because the server ends."""
    headers = {"retry-after": _RETRY_SECONDS}
    return ApiError(503, "the server is shutting down; try again, or another server", code="draining", headers=headers)
