"""How far experts' answers are apart: the Jensen-Shannon divergence of their next tokens, on the same rows.

One model is loaded, and takes the experts' weights one after another; what they say of some tokens is kept for all.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import combinations, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.engine.streams import Piece, fill
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.pipeline.align import open_aligned
from mediator_cli.pipeline.download import download_weights
from mediator_cli.pipeline.kinship import Answers
from mediator_cli.pipeline.progress import counter
from mediator_cli.runtime.features import context_length
from mediator_cli.runtime.open import load_dense
from mediator_cli.runtime.prompts import load_tokenizer
from mediator_cli.runtime.tokens import answer_tokens, prompt_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mediator_cli.engine.streams import Streams
    from mediator_cli.evaluate.tasks import Row, Task
    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan

_BATCH_TOKENS = 512
"""Tokens in one pass, with padding."""
_SLICE = 32
"""Positions whose divergences are computed at a time."""


@dataclass(frozen=True)
class _Asked:
    """One row as the model reads it: its tokens, behind the last `count` of which the next one is compared."""

    ids: tuple[int, ...]
    count: int


def compare_answers(plan: Plan, tasks: Sequence[Task], run: Settings, positions: int = 512) -> Answers:
    """Measure the mean divergence of all pairs of experts, in nats from 0 to ln 2, over `positions` tokens at most.

    Compared are the tokens of the rows' answers and the one behind, given all before: rows of all tasks in turn, from
    the first on. Computed in float32 where the model then takes half of the memory at most, else in the base's dtype.

    Raises CheckpointError for rows that are longer than the model reads.
    """
    download_weights(plan, run.progress)
    model = load_dense(plan.base.path, _dtype(plan, run))
    tokenizer = load_tokenizer(plan.tokenizer_folder or plan.base.path)
    asked = _asked(tokenizer, list(_in_turn(tasks)), positions)
    _refuse_long(model, asked)
    n, vocabulary = len(plan.experts), int(model.get_output_embeddings().weight.shape[0])
    chunks = list(_chunks(asked, max(1, run.memory // (10 * n * vocabulary))))
    advance = counter(run.progress, "answers", len(chunks) * sum(_n_bytes(plan, at) for at in range(n)))
    total = np.zeros((n, n))
    with open_aligned(plan, run) as streams, torch.inference_mode():
        weights = _Weights(plan, streams, dict(model.named_parameters()))
        for chunk in chunks:
            said = torch.empty(n, sum(each.count for each in chunk), vocabulary)
            for at in range(n):
                weights.take(at)
                torch.cat([_probabilities(model, batch) for batch in _batches(chunk)], out=said[at])
                advance(_n_bytes(plan, at))
            total += _divergences(said)
    count = sum(each.count for each in asked)
    return Answers(total / count, count)


def _dtype(plan: Plan, run: Settings) -> torch.dtype | None:
    size = sum(info.size for info in plan.base.tensors.values())
    return torch.float32 if 4 * size <= run.memory // 2 else None


def _in_turn(tasks: Sequence[Task]) -> Iterator[Row]:
    """Give the first rows of all tasks, then the second ones, and so on."""
    for rows in zip_longest(*(task.rows for task in tasks)):
        yield from (row for row in rows if row is not None)


def _asked(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], positions: int) -> list[_Asked]:
    rows = rows[:positions]
    prompts = prompt_tokens(tokenizer, [row.prompt for row in rows])
    answers = answer_tokens(tokenizer, prompts, [row.answer for row in rows])
    found: list[_Asked] = []
    left = positions
    for prompt, answer in zip(prompts, answers, strict=True):
        if left > 0:
            count = min(left, len(answer) + 1)
            found.append(_Asked((prompt.ids + answer)[: len(prompt.ids) - 1 + count], count))
            left -= count
    return found


def _refuse_long(model: PreTrainedModel, asked: Sequence[_Asked]) -> None:
    most = context_length(model.config)
    long = max(len(each.ids) for each in asked)
    if most is not None and long > most:
        hint = "leave long rows out"
        raise CheckpointError(Problem("--rows", f"a row has {long} tokens, the model reads {most}", hint))


def _chunks(asked: Sequence[_Asked], most: int) -> Iterator[list[_Asked]]:
    """Cut rows into groups of so many compared positions at most, or of one row."""
    chunk: list[_Asked] = []
    for each in asked:
        if chunk and sum(one.count for one in chunk) + each.count > most:
            yield chunk
            chunk = []
        chunk.append(each)
    yield chunk


def _batches(rows: Sequence[_Asked]) -> Iterator[list[_Asked]]:
    """Cut rows into passes, in their order."""
    batch: list[_Asked] = []
    for each in rows:
        if batch and (len(batch) + 1) * max(len(one.ids) for one in (*batch, each)) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(each)
    yield batch


def _probabilities(model: PreTrainedModel, batch: Sequence[_Asked]) -> torch.Tensor:
    """Give the probabilities of next tokens at all compared positions of a batch; float32 [positions, vocabulary]."""
    longest, kept = max(len(each.ids) for each in batch), max(each.count for each in batch)
    pads = [longest - len(each.ids) for each in batch]
    mask = torch.arange(longest) >= torch.tensor(pads)[:, None]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[*[each.ids[0]] * pad, *each.ids] for pad, each in zip(pads, batch, strict=True)]),
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
        "logits_to_keep": kept,
    }
    known = inspect.signature(model.forward).parameters
    logits = model(**{name: value for name, value in inputs.items() if name in known}).logits
    own = [logits[row, -each.count :] for row, each in enumerate(batch)]
    return torch.softmax(torch.cat(own).float(), dim=-1)


def _divergences(said: torch.Tensor) -> Doubles:
    """Sum the Jensen-Shannon divergences of all pairs over positions; said [n, positions, vocabulary] → [n, n]."""
    n = len(said)
    found = np.zeros((n, n))
    for start in range(0, said.shape[1], _SLICE):
        part = said[:, start : start + _SLICE]
        entropy = [float(torch.special.entr(each).sum(dtype=torch.float64)) for each in part]
        for i, j in combinations(range(n), 2):
            mixed = float(torch.special.entr((part[i] + part[j]) / 2).sum(dtype=torch.float64))
            found[i, j] += max(0.0, mixed - (entropy[i] + entropy[j]) / 2)
    return found + found.T


@dataclass
class _Weights:
    """The parameters of one model that is each expert in turn; `changed` are the names that are not the base's now."""

    plan: Plan
    streams: Streams
    parameters: dict[str, torch.Tensor]
    changed: frozenset[str] = frozenset()

    def take(self, at: int) -> None:
        """Make the model an expert."""
        own = _changed_by(self.plan, at)
        for name in sorted(own | self.changed):
            self._fill(at, name)
        self.changed = own

    def _fill(self, at: int, name: str) -> None:
        parameter, shape = self.parameters.get(name), self.plan.base.tensors[name].shape
        if parameter is None or tuple(parameter.shape) != shape:
            message = "transformers loads this tensor under another name or in another shape"
            raise CheckpointError(Problem(name, message, "leave --rows out"))
        values = np.empty(parameter.numel(), np.float32)
        who = f"expert {self.streams.names[at]}"
        fill(self.streams.experts[at], who, Piece(name, 0, values.size), values)
        parameter.copy_(torch.from_numpy(values).view(shape))


def _changed_by(plan: Plan, at: int) -> frozenset[str]:
    source = plan.experts[at].source
    return frozenset(source.changes if isinstance(source, Adapter) else plan.base.tensors)


def _n_bytes(plan: Plan, at: int) -> int:
    return sum(plan.base.tensors[name].n_bytes for name in _changed_by(plan, at))
