"""Log-probabilities of answers under every expert alone, from which mixtures of their probabilities are known exactly.

One pass for each expert and one for the base, over any rows. Of every token of an answer this keeps its log-probability
under each model, and its rivals: the tokens that greedy decoding could prefer in some mixture. A token that another one
beats under every model wins in no mixture, so few rivals are left. Of the tokens that are in no model's top 16 a bound
is kept; where it decides, or two tokens are so near that rounding may, a row counts as not certain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.evaluate.forward import Scored
from mediator_cli.evaluate.score import row_scores
from mediator_cli.runtime.mixing import DENSE
from mediator_cli.runtime.router import Router
from mediator_cli.strategies._sweep import sweep_rows
from mediator_cli.strategies.strategy import ByTask, Fixed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from numpy.typing import NDArray

    from mediator_cli.evaluate.score import Asked, RowScore
    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.strategies._sweep import Kept, Tokens
    from mediator_cli.strategies.bench import Bench, TaskRows
    from mediator_cli.strategies.strategy import Fitted

    Floats = NDArray[np.float64]
    Which = Literal["train", "valid", "test"]

_ROUNDING = 1e-5
"""As the run time does: weights that sum to 1 but for this leave nothing to the base."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """How a mixture does on rows; where not `is_certain` [rows], whether it gives the answer exactly is not known."""

    scores: list[RowScore]
    is_certain: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ExpertScores:
    """Rows under each of `models`: the base, called `dense`, and the experts."""

    models: tuple[str, ...]
    asked: Asked
    tokens: Tokens

    @property
    def answers(self) -> Floats:
        """Log-probability of each row's answer under each model alone [rows, models], in nats."""
        first = np.searchsorted(self.asked.owners, np.arange(len(self.asked.rows)))
        return self._by_query(self.tokens.wanted())[first]

    def wanted(self) -> tuple[Floats, NDArray[np.int64]]:
        """Log-probability of each token of the rows' answers [tokens, models], and the row of each [tokens]."""
        own = self._is_answer()
        return self.tokens.wanted()[own], np.asarray(self.asked.owners)[self.tokens.query[own]]

    def kept(self) -> Kept | None:
        """What is kept of the places of those tokens; None where nothing was to be kept."""
        kept = self.tokens.kept
        return kept and replace(kept, place=kept.place[self._is_answer()])

    def _is_answer(self) -> NDArray[np.bool_]:
        """Mark the tokens [tokens] of answers, not of other choices."""
        owners = np.asarray(self.asked.owners)
        first: NDArray[np.bool_] = np.concatenate([[True], owners[1:] != owners[:-1]])
        return first[self.tokens.query]

    def vector(self, weights: Mapping[str, float]) -> Floats:
        """Turn weights by expert into weights of all models [models]: what they leave to 1 is the base's."""
        given = np.array([0.0, *(weights.get(name, 0.0) for name in self.models[1:])])
        left = 1.0 - given.sum()
        given[0] = left if abs(left) > _ROUNDING else 0.0
        return given

    def mixed(self, weights: Floats) -> Mixed:
        """Score all rows with weights [models] for all, or [rows, models], of probabilities; none may be negative.

        Weights of one model alone give what that model gives.
        """
        if (weights < 0).any() or not (weights.sum(-1) > 0).all():
            raise ValueError("shares of probability are above 0, none is below")
        each = np.broadcast_to(weights, (len(self.asked.rows), len(self.models)))
        with np.errstate(divide="ignore"):
            logs = np.log(each)[np.asarray(self.asked.owners)]
        tokens = self.tokens
        wanted, greedy, certain = tokens.mixed(logs[tokens.query])
        total = self._by_query(wanted)
        n_queries = len(self.asked.queries)
        wrong, unknown = (np.bincount(tokens.query[~flag], minlength=n_queries) > 0 for flag in (greedy, certain))
        found = {at: Scored(not wrong[at], float(total[at])) for at in range(n_queries)}
        first = np.searchsorted(self.asked.owners, np.arange(len(each)))
        # A token that is surely not the best settles the answer, whatever the others are.
        return Mixed(row_scores(self.asked, found), ~unknown[first] | tokens.settled(greedy, certain, n_queries)[first])

    def of(self, models: Mapping[str, str]) -> ExpertScores:
        """Keep the base and these experts, given as {new name: name here}."""
        columns = [0, *(self.models.index(name) for name in models.values())]
        return replace(self, models=(DENSE, *models), tokens=self.tokens.of(columns))

    def _by_query(self, values: Floats) -> Floats:
        total = np.zeros((len(self.asked.queries), *values.shape[1:]))
        np.add.at(total, self.tokens.query, values)
        return total


def sweep(bench: Bench, rows: Sequence[Row], stage: str = "ask each expert", n_kept: int = 0) -> ExpertScores:
    """Run the base and every expert of the bench over rows.

    `n_kept` tokens of each place are kept with their log-probabilities, for sums over the vocabulary. Raises
    CheckpointError naming rows that are longer than the model reads.
    """
    asked, tokens = sweep_rows(bench, rows, stage, n_kept)
    return ExpertScores((DENSE, *bench.library.names), asked, tokens)


N_KEPT = 32
"""Tokens of each place that are kept of validation rows, for geometric ensembles."""


def expert_scores(bench: Bench, task: TaskRows, which: Which) -> ExpertScores:
    """Give the scores of a task's rows under each expert; computed once on a bench.

    On a bench that was made of another one by `with_library`, experts that both have are not asked again.
    """

    def make() -> ExpertScores:
        rows = getattr(task, which)
        if (known := _from_parent(bench, task, which)) is not None:
            return known
        return sweep(bench, rows, f"ask each expert: {task.name}", N_KEPT if which == "valid" else 0)

    found: ExpertScores = bench.once(("expert_scores", task.name, which), make)
    return found


def _from_parent(bench: Bench, task: TaskRows, which: Which) -> ExpertScores | None:
    parent = bench.parent
    if parent is None:
        return None
    names = {id(change): name for name, change in parent.library.experts.items()}
    own = {name: names.get(id(change)) for name, change in bench.library.experts.items()}
    same = next((t for t in parent.tasks if t.name == task.name and getattr(t, which) == getattr(task, which)), None)
    if same is None or None in own.values():
        return None
    return expert_scores(parent, same, which).of({name: old for name, old in own.items() if old is not None})


def cached_scores(bench: Bench, fitted: Fitted, task: TaskRows, which: Which) -> list[RowScore] | None:
    """Score a task's rows as `bench.score` does, without a pass for what answers with experts' own probabilities.

    None for what the cache cannot know: changes folded in, other experts than the library's, gates, mixed parameters,
    logits or hidden states. Rows that are not certain are asked for real.
    """
    if fitted.folded or not _are_known(bench, fitted):
        return None
    rows = getattr(task, which)
    if not rows:
        return []
    if not isinstance(fitted.decision, Fixed | ByTask | Router):
        return None
    scores = expert_scores(bench, task, which)
    weights = _weights(bench, fitted, task, scores)
    if weights is None or (fitted.combine != "probabilities" and not _is_one_each(weights)):
        return None
    mixed = scores.mixed(weights)
    found, doubtful = mixed.scores, np.flatnonzero(~mixed.is_certain).tolist()
    if doubtful:
        for at, score in zip(doubtful, bench.score(fitted, task, [rows[at] for at in doubtful]), strict=True):
            found[at] = score
    return found


def _are_known(bench: Bench, fitted: Fitted) -> bool:
    own = bench.library.experts
    return all(own.get(name) is change for name, change in fitted.experts.items())


def _is_one_each(weights: Floats) -> bool:
    return bool((((weights == 1).sum(-1) == 1) & ((weights != 0).sum(-1) == 1)).all())


def _weights(bench: Bench, fitted: Fitted, task: TaskRows, scores: ExpertScores) -> Floats | None:
    """Find the weights of all models, [models] or [rows, models]; None where some are no shares."""
    decision = fitted.decision
    if isinstance(decision, Router):
        with bench.answering(fitted) as model:
            routing = model.route([list(prompt.ids) for prompt in scores.asked.prompts])
        found = np.stack(
            [scores.vector(dict(zip(routing.experts, map(float, row), strict=True))) for row in routing.weights]
        )
    elif isinstance(decision, ByTask):
        if task.name not in decision.weights:
            return None
        found = scores.vector(decision.weights[task.name])
    else:
        found = scores.vector(decision.weights if isinstance(decision, Fixed) else {})
    return None if (found < 0).any() else found
