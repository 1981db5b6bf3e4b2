"""What the router's ASGI class works with: a router, the kind of server behind it, limits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mediator_cli.serve.router.decide import OpenRouter
    from mediator_cli.serve.router.meter import Meter
    from mediator_cli.serve.router.targets import Target


def _one_thread() -> ThreadPoolExecutor:
    # One: a tokenizer is not made for several. Not the event loop's own: long prompts would hold up all streams.
    return ThreadPoolExecutor(1, thread_name_prefix="mediator-router")


@dataclass(frozen=True)
class Front:
    """A router, the kind of server behind it, and limits; `pin` keeps the first turn's expert where nobody says.

    `names` are models that the router answers to. Nobody but the router itself may ask for the paths `closed`.
    """

    router: OpenRouter
    target: Target
    names: tuple[str, ...] = ("auto",)
    max_body: int = 4 << 20
    pin: bool = False
    closed: frozenset[str] = frozenset()
    meter: Meter | None = None
    thread: ThreadPoolExecutor = field(default_factory=_one_thread)
