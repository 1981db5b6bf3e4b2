"""Log-probabilities of answers, by one pass of the model over batches laid out in `layout`.

Scores are those of each sequence alone: log-probabilities in float32 from the model's own logits, all answer tokens
teacher-forced. Greedy decoding gives the answer exactly if each of its tokens is the most probable one there.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mediator_cli.evaluate.layout import common_opening, group_bins, lay_out, pack_bins, single_bins

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray
    from transformers import Cache, PreTrainedModel

    from mediator_cli.evaluate.layout import Batch, Bin, Query
    from mediator_cli.runtime.model import RoutedModel

TREE_MODELS = frozenset(
    {
        "apertus", "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox",
        "granite", "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2",
        "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip
"""Model types that take a mask and positions for each token; each is compared with plain sequences by a test."""
_LEAST_OPENING = 8
_LOGIT_ROWS = 128


@dataclass(frozen=True)
class Limits:
    """Tokens in one pass, padding included, and tokens in one bin: larger bins make attention dear."""

    n_pass: int = 1024
    n_bin: int = 160


@dataclass(frozen=True)
class Scored:
    """Whether greedy decoding gives the answer, and the sum of log-probabilities of its tokens in nats."""

    greedy: bool
    log_prob: float


@dataclass(frozen=True)
class Job:
    """What does not change between passes: `ends` are the tokens of which any ends a turn."""

    model: PreTrainedModel
    queries: Sequence[Query]
    ends: Sequence[int]
    limits: Limits
    is_tree: bool


@dataclass(frozen=True)
class Opening:
    """What all prompts begin with: its number of tokens, and their keys and values."""

    size: int = 0
    cache: Cache | None = None


def make_job(
    model: PreTrainedModel, queries: Sequence[Query], ends: Sequence[int], limits: Limits | None = None
) -> Job:
    """Decide how a model can be asked."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    longest = max((len(query.fed) for query in queries), default=0)
    is_tree = config.model_type in TREE_MODELS and config._attn_implementation in ("sdpa", "eager")
    is_tree = is_tree and (window is None or longest <= window) and not _chooses_by_sequence(model)
    return Job(model, queries, ends, limits or Limits(), is_tree)


def _chooses_by_sequence(model: PreTrainedModel) -> bool:
    """Whether gates look at a whole prompt, so that no two prompts may share a row."""
    gating = getattr(model, "gating", None)
    return gating is not None and gating.gates.rule.per == "sequence"


def score_alike(job: Job, indices: Sequence[int]) -> Iterator[tuple[int, Scored]]:
    """Score the queries at `indices` with the model as it is, in any order."""
    for batch, logits in passes(job, indices):
        yield from _read(job, batch, logits)


def passes(job: Job, indices: Sequence[int]) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Run the model as it is over the queries at `indices`: each batch with its logits [rows, n_kept, vocabulary].

    What all queries begin with is computed once. The same queries always make the same batches.
    """
    if not job.is_tree:
        yield from _run_bins(job, single_bins(job.queries, indices), Opening())
        return
    n_opening = common_opening([job.queries[index] for index in indices])
    bins = pack_bins(job.queries, indices, n_opening, job.limits.n_bin)
    if len(bins) == 1 or n_opening < _LEAST_OPENING:
        yield from _run_bins(job, pack_bins(job.queries, indices, 0, job.limits.n_bin), Opening())
        return
    opening = _read_opening(job.model, job.queries[indices[0]].prompt[:n_opening])
    yield from _run_bins(job, bins, opening)


def score_mixed(
    job: Job, model: RoutedModel, groups: Sequence[tuple[NDArray[np.float32], Sequence[int]]]
) -> Iterator[tuple[int, Scored]]:
    """Score small groups of queries together, each with its own mixture [experts]."""
    bins: list[Bin] = []
    weights: list[NDArray[np.float32]] = []
    for mixture, indices in groups:
        own = pack_bins(job.queries, indices, 0, job.limits.n_bin) if job.is_tree else single_bins(job.queries, indices)
        bins += own
        weights += [mixture] * len(own)
    for chosen in group_bins(bins, job.limits.n_pass):
        with model.mixing(torch.from_numpy(np.stack([weights[i] for i in chosen]))):
            found = list(_read(job, *_run(job, [bins[i] for i in chosen], Opening())))
        yield from found


def _run_bins(job: Job, bins: Sequence[Bin], opening: Opening) -> Iterator[tuple[Batch, torch.Tensor]]:
    for chosen in group_bins(bins, job.limits.n_pass):
        yield _run(job, [bins[i] for i in chosen], opening)


def _run(job: Job, bins: Sequence[Bin], opening: Opening) -> tuple[Batch, torch.Tensor]:
    batch = lay_out(bins, opening.size, job.model.config.pad_token_id or 0)
    return batch, _logits(job, batch, opening)


@torch.no_grad()
def _read_opening(model: PreTrainedModel, ids: Sequence[int]) -> Opening:
    """Compute the keys and values of an opening."""
    output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True)
    return Opening(len(ids), output.past_key_values)


@torch.no_grad()
def _logits(job: Job, batch: Batch, opening: Opening) -> torch.Tensor:
    """Compute the logits [rows, n_kept, vocabulary] of the last tokens of a batch."""
    model, device = job.model, job.model.device
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(batch.ids).to(device),
        "position_ids": torch.from_numpy(batch.positions).to(device),
        "attention_mask": _tree_mask(batch, model)
        if job.is_tree
        else torch.from_numpy(batch.mask[:, -1]).long().to(device),
        "logits_to_keep": batch.n_kept,
        "prompt_mask": None if job.is_tree else torch.from_numpy(_prompt_mask(batch)).to(device),
        "use_cache": opening.cache is not None,
    }
    if opening.cache is not None:
        inputs["past_key_values"] = copy.deepcopy(opening.cache)
        inputs["past_key_values"].batch_repeat_interleave(len(batch.ids))
    known = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    inputs = {n: value for n, value in inputs.items() if n in known or (takes_all and n != "prompt_mask")}
    with _reading(job, batch):
        logits: torch.Tensor = model(**inputs).logits
    return logits[:, -batch.n_kept :]


def _reading(job: Job, batch: Batch) -> AbstractContextManager[None]:
    """Tell a model whose gates choose by sequence where the prompts are."""
    model: Any = job.model
    if not _chooses_by_sequence(model):
        return nullcontext()
    reading: AbstractContextManager[None] = model.reading(torch.from_numpy(_prompt_mask(batch)).to(model.device))
    return reading


def _prompt_mask(batch: Batch) -> NDArray[np.bool_]:
    """Mark the tokens [rows, width] of the prompt, of bins with one query each: the last one predicts the answer."""
    first = {row: columns[0] for row, columns in batch.reads.values()}
    ends = np.array([first[row] for row in range(len(batch.ids))]) + batch.ids.shape[1] - batch.n_kept
    marked: NDArray[np.bool_] = batch.mask[:, -1] & (np.arange(batch.ids.shape[1]) <= ends[:, None])
    return marked


def _tree_mask(batch: Batch, model: PreTrainedModel) -> torch.Tensor:
    """Write the mask as sums to attention scores, the one form that all attention kernels take."""
    sees = torch.from_numpy(batch.mask).to(model.device)[:, None]
    blank = torch.zeros(sees.shape, dtype=model.dtype, device=model.device)
    return blank.masked_fill(~sees, torch.finfo(model.dtype).min)


def _read(job: Job, batch: Batch, logits: torch.Tensor) -> Iterator[tuple[int, Scored]]:
    """Read the scores of all queries of a batch off its logits."""
    owners, places, targets = find_targets(job, batch)
    log_probs, is_best = _token_scores(logits.flatten(0, 1), np.array(places), torch.tensor(targets), job.ends)
    total = dict.fromkeys(batch.reads, 0.0)
    greedy = dict.fromkeys(batch.reads, True)
    for owner, log_prob, best in zip(owners, log_probs.tolist(), is_best.tolist(), strict=True):
        total[owner] += log_prob
        greedy[owner] &= best
    for index in batch.reads:
        yield index, Scored(greedy[index], total[index])


def find_targets(job: Job, batch: Batch) -> tuple[list[int], list[int], list[int]]:
    """List the tokens that a batch is asked for: the query of each, its place in flattened logits, and the token."""
    owners: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for index, (row, columns) in batch.reads.items():
        # The end of a turn is no single token; -1 stands for all that end one.
        wanted = [*job.queries[index].answer, *([-1] if job.queries[index].ends else [])]
        owners += [index] * len(wanted)
        places += [row * batch.n_kept + column for column in columns]
        targets += wanted
    return owners, places, targets


def _token_scores(
    flat: torch.Tensor, places: NDArray[np.int64], targets: torch.Tensor, ends: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score targets [n] by the logits at places [n] of flat [tokens, vocabulary]: log-probability, and is it the top.

    Target -1 is any of `ends`.
    """
    rows, row_of = (torch.from_numpy(found).to(flat.device) for found in np.unique(places, return_inverse=True))
    normalisers, tops = [], []
    for part in torch.split(rows, _LOGIT_ROWS):
        scores = flat[part].float()
        normalisers.append(scores.logsumexp(-1))
        tops.append(scores.argmax(-1))
    normaliser, top = torch.cat(normalisers)[row_of], torch.cat(tops)[row_of]
    targets = targets.to(flat.device)
    chosen = flat[rows[row_of], targets.clamp(min=0)].float()
    is_top = top == targets
    if ends:
        last = targets == -1
        chosen[last] = flat[rows[row_of[last]]][:, list(ends)].float().logsumexp(-1)
        is_top[last] = torch.isin(top[last], torch.tensor(ends, device=flat.device))
    return (chosen - normaliser).cpu(), is_top.cpu()
