"""From rows to scores: prompts through the chat template, mixtures decided by the prompts alone, choices compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.evaluate.forward import Limits, make_job
from mediator_cli.evaluate.layout import Query
from mediator_cli.evaluate.routed import score_by_prompt
from mediator_cli.runtime.features import context_length
from mediator_cli.runtime.tokens import answer_tokens, end_tokens, prompt_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mediator_cli.evaluate.forward import Scored
    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.runtime.tokens import Prompt


@dataclass(frozen=True)
class RowScore:
    """How a model did on one row.

    `exact`: greedy decoding gives the answer and then the end of the turn, nothing else. `chosen_right`: of the
    choices the answer is the most probable; None without choices. `log_prob` of answer and end in nats.
    """

    exact: bool
    chosen_right: bool | None
    log_prob: float
    n_prompt_tokens: int


@dataclass(frozen=True)
class ScoreSettings:
    """How rows are asked: `raw` without chat template; `mixture` None = as the bundle's router decides."""

    raw: bool = False
    mixture: str | Mapping[str, float] | None = None
    limits: Limits = field(default_factory=Limits)


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: ScoreSettings | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[RowScore]:
    """Score every row in one teacher-forced pass over its prompt and answers, in the order of the rows.

    `advance` is told of rows as they are done. Raises CheckpointError naming rows that are longer than the model
    reads, BundleError when a bundle has no router and no mixture is given.
    """
    settings = settings or ScoreSettings()
    asked = ask_rows(model, tokenizer, rows, raw=settings.raw)
    found: dict[int, Scored] = {}
    missing = Counter(asked.owners)
    job = make_job(model, asked.queries, asked.ends, settings.limits)
    for index, scored in score_by_prompt(job, asked.owners, settings.mixture):
        found[index] = scored
        missing[asked.owners[index]] -= 1
        if not missing[asked.owners[index]]:
            advance(1)
    return row_scores(asked, found)


@dataclass(frozen=True)
class Asked:
    """Rows as queries: each row's answer first, then its other choices. `owners` say which row each query is of.

    `ends` are the tokens of which any ends a turn.
    """

    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    queries: Sequence[Query]
    owners: Sequence[int]
    ends: Sequence[int]


def ask_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, raw: bool = False
) -> Asked:
    """Turn rows into queries; raises CheckpointError naming rows that are longer than the model reads."""
    prompts = prompt_tokens(tokenizer, [row.prompt for row in rows], raw=raw)
    texts = [_texts(row) for row in rows]
    owners = [at for at, answers in enumerate(texts) for _ in answers]
    ends = end_tokens(model, tokenizer)
    answers = answer_tokens(tokenizer, [prompts[at] for at in owners], [text for each in texts for text in each])
    queries = [Query(prompts[at].ids, ids, bool(ends)) for at, ids in zip(owners, answers, strict=True)]
    _refuse_long(model, queries, owners)
    return Asked(rows, prompts, queries, owners, ends)


def row_scores(asked: Asked, found: Mapping[int, Scored]) -> list[RowScore]:
    """Turn the scores of queries, by their index, into those of rows."""
    first = np.searchsorted(asked.owners, np.arange(len(asked.rows)))
    scores = []
    for row, prompt, start in zip(asked.rows, asked.prompts, first.tolist(), strict=True):
        own = {text: found[start + at] for at, text in enumerate(_texts(row))}
        scores.append(_row_score(row, own, prompt))
    return scores


def _texts(row: Row) -> list[str]:
    return list(dict.fromkeys([row.answer, *(row.choices or ())]))


def _row_score(row: Row, found: Mapping[str, Scored], prompt: Prompt) -> RowScore:
    chosen = max(row.choices, key=lambda choice: found[choice].log_prob) if row.choices else None
    own = found[row.answer]
    return RowScore(own.greedy, None if chosen is None else chosen == row.answer, own.log_prob, len(prompt.ids))


def _refuse_long(model: PreTrainedModel, queries: Sequence[Query], owners: Sequence[int]) -> None:
    most = context_length(model.config)
    sizes: dict[int, int] = {}
    for query, at in zip(queries, owners, strict=True):
        sizes[at] = max(sizes.get(at, 0), len(query.fed))
    problems = [
        Problem(f"row {at + 1}", f"has {size} tokens, the model reads {most}", "shorten the prompt or leave it out")
        for at, size in sizes.items()
        if most is not None and size > most
    ]
    if problems:
        raise CheckpointError(problems)
