"""The bench on which strategies are fitted and asked: one base in memory, the library, and the rows of each task."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.runtime.gates import Gates
from mediator_cli.runtime.gating import set_gates
from mediator_cli.runtime.held import folded, give_experts, give_router, hold_experts
from mediator_cli.runtime.open import load_dense
from mediator_cli.runtime.prompts import load_tokenizer, prompt_reader
from mediator_cli.runtime.router import Router
from mediator_cli.strategies.strategy import ByTask, Fixed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.evaluate.score import RowScore
    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.strategies.library import Library
    from mediator_cli.strategies.strategy import Fitted


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task, and the expert that was trained on it; None for a task held out of everything but tests."""

    name: str
    train: tuple[Row, ...] = ()
    valid: tuple[Row, ...] = ()
    test: tuple[Row, ...] = ()
    expert: str | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether strategies may not see its rows before they are tested."""
        return self.expert is None


@dataclass(eq=False)
class Bench:
    """A base in memory that mixes any low-rank experts, the library, and the tasks.

    `found` keeps what several strategies need, by a key, so that it is computed once. `progress` hears of a stage, what
    is done and of how much. Strategies fit on the `valid` rows of `seen` tasks alone. `parent` is the bench that this
    one was made of, with other experts.
    """

    model: RoutedModel
    tokenizer: PreTrainedTokenizerBase
    library: Library
    tasks: tuple[TaskRows, ...]
    seed: int = 0
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    found: dict[Any, Any] = field(default_factory=dict)
    parent: Bench | None = None

    @property
    def seen(self) -> tuple[TaskRows, ...]:
        """The tasks that strategies may look at."""
        return tuple(task for task in self.tasks if not task.is_held_out)

    def fit_rows(self) -> list[tuple[TaskRows, Row]]:
        """Give all rows to fit on, task by task."""
        return [(task, row) for task in self.seen for row in task.valid]

    def with_library(self, library: Library, right: Mapping[str, str] | None = None) -> Bench:
        """Give a bench with other experts, such as some of these or what was made of them.

        `right` names the expert for each seen task, by the task's name; without it each task keeps its own. Raises
        CheckpointError where a task's expert is not in the library.
        """
        named = {task.name: task.expert for task in self.seen} | dict(right or {})
        if lost := [name for name, expert in named.items() if expert not in library.experts]:
            message = f"its expert {named[lost[0]]} is not in the library"
            raise CheckpointError(Problem(lost[0], message, "say which expert takes its place"))
        tasks = tuple(task if task.is_held_out else replace(task, expert=named[task.name]) for task in self.tasks)
        return Bench(self.model, self.tokenizer, library, tasks, self.seed, self.progress, parent=self)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever is kept
        """Give what is kept under a key, made when it is first asked for."""
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]

    @contextmanager
    def answering(self, fitted: Fitted) -> Iterator[RoutedModel]:
        """Let the model answer as a fitted strategy does inside the block; a mixture by task is given by the caller."""
        give_experts(self.model, fitted.experts)
        before = self.model.combine
        self.model.combine = fitted.combine
        with ExitStack() as stack:
            stack.enter_context(folded(self.model, fitted.folded))
            try:
                if isinstance(fitted.decision, Gates):
                    set_gates(self.model, fitted.decision)
                elif isinstance(fitted.decision, Router):
                    give_router(self.model, fitted.decision)
                yield self.model
            finally:
                self.model.combine = before
                give_experts(self.model, {})

    def score(
        self, fitted: Fitted, task: TaskRows, rows: Sequence[Row], advance: Callable[[int], None] = lambda n: None
    ) -> list[RowScore]:
        """Score rows of one task: log-probability of the answer, exactness, choice."""
        with self.answering(fitted) as model:
            settings = ScoreSettings(mixture=mixture_for(fitted, task))
            return score_rows(model, self.tokenizer, list(rows), settings, advance)

    def loss(self, fitted: Fitted, rows: Mapping[str, Sequence[Row]] | None = None) -> float:
        """Mean over tasks of the mean -ln p of a row's answer, in nats; of validation rows unless others are given."""
        chosen = rows or {task.name: task.valid for task in self.seen if task.valid}
        means = []
        for task in self.tasks:
            if own := chosen.get(task.name):
                scores = self.score(fitted, task, own)
                means.append(-sum(score.log_prob for score in scores) / len(scores))
        return sum(means) / len(means)


def mixture_for(fitted: Fitted, task: TaskRows) -> str | Mapping[str, float] | None:
    """Say which mixture to ask for: None where a router or gates decide."""
    if isinstance(fitted.decision, Router | Gates):
        return None
    if isinstance(fitted.decision, Fixed):
        return dict(fitted.decision.weights) or "dense"
    if isinstance(fitted.decision, ByTask) and task.name in fitted.decision.weights:
        return dict(fitted.decision.weights[task.name]) or "dense"
    raise CheckpointError(Problem(task.name, "no mixture is known for this task", "leave the reference out"))


def open_bench(library: Library, tasks: Sequence[TaskRows], seed: int = 0) -> Bench:
    """Load the base of a library and make a bench of it; raises BundleError where the base is damaged."""
    tokenizer = load_tokenizer(library.base)
    model = load_dense(library.base)
    routed = hold_experts(model, library.shapes, library.base, prompt_reader(tokenizer))
    return Bench(routed, tokenizer, library, tuple(tasks), seed)
