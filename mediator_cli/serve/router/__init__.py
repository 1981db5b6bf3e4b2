"""Our router in front of other servers: as ASGI middleware in their process, or as a proxy before it.

`vllm serve --middleware mediator_cli.serve.router.RouterMiddleware` finds its class here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mediator_cli.serve.router.decide import Decision, OpenRouter, open_router
    from mediator_cli.serve.router.middleware import RouterMiddleware

_PLACES = {"Decision": "decide", "OpenRouter": "decide", "open_router": "decide", "RouterMiddleware": "middleware"}
__all__ = ["Decision", "OpenRouter", "RouterMiddleware", "open_router"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
