"""One request while it is answered: what was read, what was written, what its caller is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mediator_cli.errors import Problem, first_line
from mediator_cli.serve.engine.request import Failed, Finished, Started, Text

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mediator_cli.serve.engine.choose import Chooser
    from mediator_cli.serve.engine.prefixes import Weights
    from mediator_cli.serve.engine.request import Event, Reason, Request, Scored
    from mediator_cli.serve.engine.words import Vocabulary, Writer


@dataclass
class Row:
    """A request that has a place: `n_read` tokens of its prompt are read, `answer` are the tokens chosen so far.

    `tell` delivers events and never raises. `is_cancelled` asks whether the caller has gone.
    """

    request: Request
    tell: Callable[[Event], None]
    is_cancelled: Callable[[], bool]
    weights: Weights
    started: Started
    chooser: Chooser
    writer: Writer
    words: Vocabulary
    ends: frozenset[int]
    n_read: int = 0
    n_cached: int = 0
    answer: list[int] = field(default_factory=list)
    echoed: list[Scored] = field(default_factory=list)
    reason: Reason | None = None
    is_told: bool = False
    is_failed: bool = False

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt is read."""
        return self.n_read >= len(self.request.prompt)

    @property
    def is_over(self) -> bool:
        """Whether the row has nothing more to do."""
        return self.reason is not None or self.is_failed or self.is_cancelled()

    @property
    def n_held(self) -> int:
        """Count the tokens whose keys and values are held: the last one chosen is not read yet."""
        return self.n_read + max(0, len(self.answer) - 1)

    def take_prompt(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Take the logits [tokens or 1, vocabulary] of a chunk of the prompt; the last ones choose the first token."""
        start, self.n_read = self.n_read, self.n_read + len(tokens)
        if self.request.echo:
            self._echo(start, tokens, logits)
        if not self.is_read:
            return
        self._tell_start()
        if self.request.max_tokens == 0:
            self.reason = "length"
        else:
            self.take(logits[-1])

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token by logits [vocabulary], and tell what it adds; a failure is that of this row alone."""
        try:
            self._take(logits)
        except Exception as error:  # noqa: BLE001 - other rows go on
            self.fail(Failed(Problem("", f"no token could be chosen: {first_line(error)}"), is_ours=True))

    def fail(self, failed: Failed) -> None:
        """Tell that there is no more answer."""
        if not self.is_failed:
            self.is_failed = True
            self.tell(failed)

    def finish(self) -> None:
        """Tell that the answer is complete, or was cancelled."""
        if self.is_failed:
            return
        self._tell_start()
        self.tell(Finished(self.reason or "cancelled", len(self.request.prompt), len(self.answer)))

    def _take(self, logits: torch.Tensor) -> None:
        token = self.chooser.choose(logits)
        self.answer.append(token)
        is_end = token in self.ends and not self.request.ignore_eos
        text = "" if is_end else self.writer.add(token)
        if is_end or self.writer.is_stopped:
            self.reason = "stop"
        elif len(self.answer) >= self.request.max_tokens:
            self.reason = "length"
        if self.reason is not None:
            text += self.writer.finish()
            # What was held back may be a whole stop sequence by now.
            self.reason = "stop" if self.writer.is_stopped else self.reason
        scored = () if self.request.logprobs is None or is_end else (self._scored(token, logits),)
        if text or scored:
            self.tell(Text(text, scored))

    def _tell_start(self) -> None:
        if not self.is_told:
            self.is_told = True
            self.tell(replace(self.started, n_cached=self.n_cached, prompt=tuple(self.echoed)))

    def _scored(self, token: int, logits: torch.Tensor) -> Scored:
        return self.words.scored(token, logits.log_softmax(-1), self.request.logprobs or 0)

    def _echo(self, start: int, tokens: list[int], logits: torch.Tensor) -> None:
        """Score tokens of the prompt: the first has none before it, and the logits of a chunk score what follows."""
        prompt, n_best = self.request.prompt, self.request.logprobs
        if start == 0:
            self.echoed.append(self.words.scored(prompt[0], None, 0))
        following = prompt[start + 1 : start + 1 + len(tokens)]
        for token, row in zip(following, logits, strict=False):
            self.echoed.append(self.words.scored(token, None if n_best is None else row.log_softmax(-1), n_best or 0))
