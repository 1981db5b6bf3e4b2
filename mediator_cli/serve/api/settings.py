"""What the server takes and from whom, and what it serves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mediator_cli.serve.engine.request import Draw

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.serve.engine.engine import Facts
    from mediator_cli.serve.engine.request import Event, Request


class Ticket(Protocol):
    """A request that an engine took."""

    def cancel(self) -> None:
        """Ask for the end of the answer."""


class Answers(Protocol):
    """What the server needs of an engine."""

    @property
    def facts(self) -> Facts:
        """What the engine does at present."""

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Ticket:
        """Take a request and deliver its events from another thread; raise BundleError for what it does not take."""

    def drain(self, seconds: float) -> bool:
        """Take no more requests and finish those that run."""


@dataclass(frozen=True)
class Settings:
    """Limits of one request, and who may ask.

    `max_tokens` is the longest answer, `max_body` bytes, `max_rows` prompts times `n`. Without `api_key` anybody on the
    network may ask. `origins` are the web pages of others that may ask, `pin` keeps the first turn's mixture for
    conversations that do not say what they want.
    """

    max_tokens: int = 4096
    max_body: int = 4 << 20
    max_rows: int = 128
    api_key: str | None = field(default=None, repr=False)
    open_metrics: bool = False
    origins: tuple[str, ...] = ()
    pin: bool = False


@dataclass(frozen=True)
class Served:
    """A bundle as its clients see it.

    `experts` answer beside `dense`; `routes` tells whether a router or gates choose among them, `pins` whether that is
    once for a prompt. `context` is the most tokens of prompt and answer, `n_ids` how many token ids there are. `draw`
    is how tokens are chosen where a request does not say. The tokenizer must not be used by others: it is not made for
    several threads.
    """

    name: str
    experts: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    n_ids: int
    context: int | None = None
    routes: bool = False
    pins: bool = False
    draw: Draw = field(default_factory=lambda: Draw(temperature=1.0))
    created: int = 0


@dataclass
class Life:
    """Whether the server still takes requests."""

    is_draining: bool = False
