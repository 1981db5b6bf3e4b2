"""The chat page: one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response


async def page_response(request: Request) -> Response:
    """Answer `GET /`."""
    text, policy = _page()
    return Response(
        text, media_type="text/html; charset=utf-8",
        headers={
            "content-security-policy": policy, "cache-control": "no-cache", "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        },
    )  # fmt: skip


@cache
def _page() -> tuple[str, str]:
    """Read the page, and allow its own script and style by their digests and nothing else."""
    text = files("mediator_cli.serve").joinpath("page", "chat.html").read_text(encoding="utf-8")
    script, style = (" ".join(_digests(text, tag)) for tag in ("script", "style"))
    return text, (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digests(text: str, tag: str) -> list[str]:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in found]
