"""Answers requests in one thread: prompts are read in chunks between the tokens of the answers that run."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mediator_cli.errors import BundleError, MediatorError, Problem, first_line
from mediator_cli.runtime.features import context_length
from mediator_cli.runtime.mixing import as_weights
from mediator_cli.serve.engine.batch import count_ids, make_batch
from mediator_cli.serve.engine.choose import make_chooser
from mediator_cli.serve.engine.prefixes import Prefixes
from mediator_cli.serve.engine.request import Failed, Finished, Started
from mediator_cli.serve.engine.row import Row
from mediator_cli.serve.engine.table import Table
from mediator_cli.serve.engine.words import Vocabulary, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.serve.engine.prefixes import Weights
    from mediator_cli.serve.engine.request import Event, Request

_LOG = logging.getLogger("mediator.serve")


class EngineFull(BundleError):
    """As many requests wait as may; try again later."""


class EngineClosed(BundleError):
    """No new requests are taken."""


@dataclass(frozen=True)
class Limits:
    """Rows answered at once, requests that wait, and tokens: of prompt and answer together (None = as many as the model
    takes), and of a prompt in one pass. `cache_bytes` keeps keys and values for prompts that begin like earlier ones.
    """

    rows: int = 8
    queue: int = 256
    context: int | None = None
    chunk: int = 256
    cache_bytes: int = 256 << 20


@dataclass(frozen=True)
class Facts:
    """What the engine does and has done since it started: requests, tokens, passes, and bytes held."""

    waiting: int
    running: int
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    passes: int
    mixtures_held: int
    mixture_bytes: int
    prefix_bytes: int
    prefix_entries: int
    is_alive: bool


@dataclass
class Ticket:
    """A request that was taken; `cancel` makes it leave before the next pass."""

    request: Request
    deliver: Callable[[Event], None]
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Ask for the end of the answer, from any thread."""
        self.is_cancelled = True

    def tell(self, event: Event) -> None:
        """Deliver an event; a caller that cannot take it is gone, which is no reason to stop."""
        try:
            self.deliver(event)
        except Exception as error:  # noqa: BLE001 - callers are not the engine's
            _LOG.debug("an event was not delivered: %s", first_line(error))
            self.is_cancelled = True


@dataclass
class Engine:
    """Answers requests; made by `start_engine`."""

    model: RoutedModel
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    table: Table
    words: Vocabulary
    ends: frozenset[int]
    context: int | None
    queue: deque[Ticket] = field(default_factory=deque)
    changed: threading.Condition = field(default_factory=threading.Condition)
    is_closing: bool = False
    is_over: bool = False
    is_held: bool = False
    thread: threading.Thread | None = None

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Ticket:
        """Take a request; its events are delivered in the engine's thread, Finished or Failed last.

        Raises EngineFull, EngineClosed, and BundleError for an empty or too long prompt and unknown experts.
        """
        self._check(request)
        ticket = Ticket(request, deliver)
        with self.changed:
            if self.is_closing or not self.is_alive:
                raise EngineClosed(Problem("", "the server is shutting down", "try again, or another server"))
            if len(self.queue) >= self.limits.queue:
                raise EngineFull(Problem("", f"{len(self.queue)} requests are waiting", "try again later"))
            self.queue.append(ticket)
            self.changed.notify_all()
        return ticket

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def facts(self) -> Facts:
        """What the engine does at present."""
        cache, counts, prefixes = self.model.opened.cache, self.table.counts, self.table.prefixes
        held = list(cache.entries)
        return Facts(
            len(self.queue), len(self.table.rows), counts.prompt_tokens, counts.cached_tokens, counts.answer_tokens,
            counts.passes, len(held), sum(map(cache.size, held)), prefixes.n_bytes, len(prefixes.entries),
            self.is_alive,
        )  # fmt: skip

    def drain(self, seconds: float) -> bool:
        """Take no more requests, wait for those that run, cancel what is left; tell whether all ended in time."""
        with self.changed:
            self.is_closing = True
            self.changed.notify_all()
            in_time = self.changed.wait_for(lambda: not self._is_busy() or not self.is_alive, seconds)
        self.close()
        return in_time

    def close(self) -> None:
        """Cancel what runs and end the thread."""
        with self.changed:
            self.is_closing = self.is_over = True
            self.changed.notify_all()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def run(self) -> None:
        """Answer until closed; the body of the thread."""
        try:
            with torch.no_grad():
                while self._has_work():
                    self._admit()
                    self.table.turn()
        finally:
            self._leave_all()

    def _is_busy(self) -> bool:
        return bool(self.queue or self.table.rows)

    def _has_work(self) -> bool:
        """Wait for something to do; false once the engine is closed."""
        with self.changed:
            self.changed.notify_all()
            if not self._is_busy() and self.is_held:
                self.table.batch.clear()
                self.is_held = False
            self.changed.wait_for(lambda: self._is_busy() or self.is_over)
            return not self.is_over

    def _admit(self) -> None:
        """Give places to requests that wait, in the order in which they came."""
        while not self.table.is_full:
            with self.changed:
                if not self.queue:
                    return
                ticket = self.queue.popleft()
            if ticket.is_cancelled:
                ticket.tell(Finished("cancelled", len(ticket.request.prompt), 0))
                continue
            self.is_held = True
            try:
                self.table.seat(self._begin(ticket))
            except MediatorError as error:
                ticket.tell(Failed(error.problems[0]))
            except Exception as error:  # noqa: BLE001 - a defect in one request is not that of the others
                _LOG.exception("a request could not begin")
                ticket.tell(Failed(Problem("", f"the router failed: {first_line(error)}"), is_ours=True))

    def _begin(self, ticket: Ticket) -> Row:
        request = ticket.request
        weights, started = self._decide(request)
        return Row(
            request, ticket.tell, lambda: ticket.is_cancelled, weights, started, make_chooser(request.draw),
            Writer(self.tokenizer, request.stop), self.words, self.ends,
        )  # fmt: skip

    def _decide(self, request: Request) -> tuple[Weights, Started]:
        """Give the weights of a request's mixture, and what its caller is told of them."""
        names = self.model.expert_names
        if request.mixture is not None:
            given = as_weights(dict(request.mixture) or "dense", names, "mixture")[0].tolist()
            return tuple(given), Started(_named(names, given))
        routing = self.model.route([list(request.route_on or request.prompt)])
        weights = [float(weight) for weight in routing.weights[0]]
        if self.model.gating is not None:
            # Gates choose anew for every token: no weights are set, and what is told is the mean over the prompt.
            return (), Started(_named(names, weights))
        probabilities = dict(zip(names, map(float, routing.probabilities[0]), strict=True))
        uncertainty, is_outside = float(routing.entropy[0]), bool(routing.is_outside[0])
        return tuple(weights), Started(_named(names, weights), probabilities, uncertainty, is_outside)

    def _leave_all(self) -> None:
        with self.changed:
            self.is_closing = True
            waiting = list(self.queue)
            self.queue.clear()
        for ticket in waiting:
            ticket.tell(Finished("cancelled", len(ticket.request.prompt), 0))
        for row in self.table.rows:
            row.finish()
        self.table.rows.clear()
        self.table.batch.clear()
        with self.changed:
            self.changed.notify_all()

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise BundleError(Problem("prompt", "is empty", "give some text"))
        n_ids = self.words.n_ids
        if wrong := [token for token in request.prompt if not 0 <= token < n_ids]:
            raise BundleError(Problem("prompt", f"token {wrong[0]} is not one of the model's {n_ids}"))
        total = len(request.prompt) + request.max_tokens
        if self.context is not None and total > self.context:
            asked = f"{len(request.prompt)} tokens and {request.max_tokens} of the answer"
            message = f"{asked} are more than the {self.context} that the model reads"
            raise BundleError(Problem("prompt", message, "shorten it, or ask for fewer tokens"))
        if request.mixture is not None:
            as_weights(dict(request.mixture) or "dense", self.model.expert_names, "mixture")


def start_engine(model: RoutedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits | None = None) -> Engine:
    """Start an engine in a thread of its own; the model must not be used beside it."""
    limits = limits or Limits()
    longest = context_length(model.config)
    context = limits.context if longest is None else min(limits.context or longest, longest)
    with torch.no_grad():
        batch = make_batch(model, limits.rows, context)
    table = Table(batch, Prefixes(limits.cache_bytes), limits.chunk)
    words = Vocabulary(tokenizer, count_ids(model))
    engine = Engine(model, tokenizer, limits, table, words, _end_tokens(model, tokenizer), context)
    engine.thread = threading.Thread(target=engine.run, name="mediator-engine", daemon=True)
    engine.thread.start()
    return engine


def _end_tokens(model: RoutedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """List the tokens that end an answer: those of the generation config, and the tokenizer's."""
    found: set[int] = set()
    for given in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found |= set(given) if isinstance(given, list) else set() if given is None else {int(given)}
    return frozenset(found)


def _named(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    # Weights are float32: 0.2 should not be told as 0.20000000298.
    return {name: float(f"{weight:.7g}") for name, weight in zip(names, weights, strict=True) if weight}
