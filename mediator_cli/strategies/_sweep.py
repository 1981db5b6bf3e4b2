"""The sweep behind `log_probs`: all models over the same batches, and what is kept of their logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mediator_cli.evaluate.forward import find_targets, make_job, passes
from mediator_cli.evaluate.score import ask_rows
from mediator_cli.runtime.mixing import DENSE
from mediator_cli.strategies.strategy import Fitted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mediator_cli.evaluate.forward import Job
    from mediator_cli.evaluate.score import Asked
    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.strategies.bench import Bench

    Floats = NDArray[np.float64]
    Floats32 = NDArray[np.float32]
    Ints = NDArray[np.int64]

_TOP = 16
_LOGIT_BYTES = 128 << 20
"""Logits of all models, in the model's dtype, that are in memory at a time; those of one query may be more."""
_WIDE_BYTES = 32 << 20
"""Logits in float32 at a time; those of one place may be more."""
_BOUND = -1
"""Not a token, but what none of those that are not kept exceeds."""
_NEAR = 1e-3
"""Nats between two tokens that rounding may turn: the same rows in other batches give slightly other logits."""


@dataclass(frozen=True, eq=False)
class Kept:
    """Tokens of places for sums over the vocabulary: log p [places, tokens, models], -inf for none.

    `tail` [places, models] is the log of what is left to 1, `place` [tokens of answers] says where each token stands.
    """

    log_probs: Floats32
    tail: Floats32
    place: Ints


@dataclass(frozen=True, eq=False)
class Tokens:
    """All tokens of all queries' answers: `query` [tokens] are their queries.

    `parts` [parts, models] are log-probabilities of what is wanted, float32: of the token, or of each that ends a turn.
    `rivals` [rivals, models] are those of tokens that may be preferred. `part_of` and `rival_of` say which token each
    belongs to, in rising order, `part_id` and `rival_id` are ids in the vocabulary.
    """

    query: Ints
    parts: Floats32
    part_of: Ints
    part_id: Ints
    rivals: Floats32
    rival_of: Ints
    rival_id: Ints
    kept: Kept | None = None

    @property
    def n_bytes(self) -> int:
        """Count the bytes of all arrays."""
        own = (self.query, self.parts, self.part_of, self.part_id, self.rivals, self.rival_of, self.rival_id)
        kept = (self.kept.log_probs, self.kept.tail, self.kept.place) if self.kept else ()
        return sum(array.nbytes for array in (*own, *kept))

    def wanted(self) -> Floats:
        """Log-probability of what is wanted [tokens, models]."""
        return self._summed(self.parts.astype(np.float64))

    def mixed(self, logs: Floats) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
        """Mix probabilities with log weights [tokens, models].

        Gives, of each token [tokens], its log-probability, whether it is the most probable one, and whether the latter
        is certain: neither near another one, nor below the bound. Of equal tokens the one with the lower id counts.
        """
        parts = _log_sum(self.parts + logs[self.part_of])
        rivals = _log_sum(self.rivals + logs[self.rival_of])
        best, best_id = _best(parts, self.part_of, self.part_id, len(self.query))
        ahead = rivals - best[self.rival_of]
        is_token = self.rival_id != _BOUND
        beats = is_token & ((ahead > 0) | ((ahead == 0) & (self.rival_id < best_id[self.rival_of])))
        beaten = self._any(beats)
        surely = self._any(is_token & (ahead > _NEAR))
        return (
            self._summed(parts),
            ~beaten,
            surely | ~self._any(np.where(is_token, abs(ahead) <= _NEAR, ahead >= -_NEAR)),
        )

    def _any(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tell which tokens have a rival that is flagged."""
        found: NDArray[np.bool_] = np.bincount(self.rival_of[flags], minlength=len(self.query)) > 0
        return found

    def settled(self, greedy: NDArray[np.bool_], certain: NDArray[np.bool_], n_queries: int) -> NDArray[np.bool_]:
        """Tell which queries hold a token that is certainly not the most probable one."""
        found: NDArray[np.bool_] = np.bincount(self.query[certain & ~greedy], minlength=n_queries) > 0
        return found

    def of(self, columns: Sequence[int]) -> Tokens:
        """Keep some of the models."""
        own = list(columns)
        kept = self.kept and replace(self.kept, log_probs=self.kept.log_probs[..., own], tail=self.kept.tail[:, own])
        return replace(self, parts=self.parts[:, own], rivals=self.rivals[:, own], kept=kept)

    def _summed(self, parts: Floats) -> Floats:
        total = np.full((len(self.query), *parts.shape[1:]), -np.inf)
        np.logaddexp.at(total, self.part_of, parts)
        return total


def _log_sum(values: Floats) -> Floats:
    """Logarithm of the sums of exponentials of rows [rows, models]."""
    if not len(values):
        return np.zeros(0)
    top = values.max(axis=1, keepdims=True)
    found: Floats = (top + np.log(np.exp(values - top).sum(axis=1, keepdims=True)))[:, 0]
    return found


def _best(values: Floats, of: Ints, ids: Ints, n: int) -> tuple[Floats, Ints]:
    """Find the largest value of each group, and the lowest id that has it."""
    best = np.full(n, -np.inf)
    np.maximum.at(best, of, values)
    first = np.full(n, np.iinfo(np.int64).max)
    has = values == best[of]
    np.minimum.at(first, of[has], ids[has])
    return best, first


def sweep_rows(bench: Bench, rows: Sequence[Row], stage: str, n_kept: int) -> tuple[Asked, Tokens]:
    """Run all models over rows, a few queries at a time, so that no more logits than `_LOGIT_BYTES` are held."""
    with bench.answering(Fitted(experts=bench.library.experts)) as model:
        asked = ask_rows(model, bench.tokenizer, rows)
        names = (DENSE, *bench.library.names)
        job = make_job(model, asked.queries, asked.ends)
        chunks = list(_chunks(job, len(names)))
        found = []
        for at, chunk in enumerate(chunks):
            bench.progress(stage, at, len(chunks))
            found.append(_read_chunk(job, model, names, chunk, n_kept))
        bench.progress(stage, len(chunks), len(chunks))
    return asked, _joined(found, len(names))


def _chunks(job: Job, n_models: int) -> Iterator[list[int]]:
    """Share queries out, those that open alike together."""
    size = n_models * job.model.config.get_text_config().vocab_size * job.model.dtype.itemsize
    chunk: list[int] = []
    held = 0
    for index in sorted(range(len(job.queries)), key=lambda i: job.queries[i].fed):
        own = size * (len(job.queries[index].answer) + job.queries[index].ends)
        if chunk and held + own > _LOGIT_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(index)
        held += own
    if chunk:
        yield chunk


def _read_chunk(job: Job, model: RoutedModel, names: Sequence[str], chunk: Sequence[int], n_kept: int) -> Tokens:
    """Read what is kept of some queries; tokens come in the order of the batches, the same for all models."""
    logits: list[list[torch.Tensor]] = []
    owners: list[int] = []
    places: list[Ints] = []
    targets: list[int] = []
    for name in names:
        logits.append([])
        with model.mixing(name):
            n_before = 0
            for batch, own in passes(job, chunk):
                own_owners, own_places, own_targets = find_targets(job, batch)
                distinct, which = np.unique(own_places, return_inverse=True)
                logits[-1].append(own.flatten(0, 1)[torch.from_numpy(distinct)].cpu())
                if len(logits) == 1:
                    owners += own_owners
                    targets += own_targets
                    places.append(n_before + which)
                n_before += len(distinct)
    stacked = torch.stack([torch.cat(each) for each in logits], dim=1)
    wanted = [list(job.ends) if target == -1 else [target] for target in targets]
    return _keep(stacked, np.array(owners), np.concatenate(places), wanted, n_kept)


def _keep(logits: torch.Tensor, query: Ints, place: Ints, wanted: Sequence[Sequence[int]], n_kept: int) -> Tokens:
    """Keep of logits [places, models, vocabulary] what the tokens at `place` [tokens] need, which want these ids."""
    of_place: dict[int, list[int]] = {}
    for token, at in enumerate(place.tolist()):
        of_place.setdefault(at, []).append(token)
    found: dict[int, tuple[Floats32, Ints, Floats32, Ints]] = {}
    kept: list[tuple[Floats32, Floats32]] = []
    step = max(1, _WIDE_BYTES // (4 * logits[0].numel()))
    for start in range(0, len(logits), step):
        log_probs = logits[start : start + step].float().log_softmax(-1)
        tops = log_probs.topk(min(_TOP, log_probs.shape[-1]), dim=-1)
        for at, (own, ids, values) in enumerate(zip(log_probs, tops.indices, tops.values, strict=True), start):
            candidates = ids.unique()
            rivals = own[:, candidates].t().numpy()
            bound = values[:, -1].numpy() if len(candidates) < own.shape[-1] else None
            for token in of_place.get(at, ()):
                parts = own[:, wanted[token]].t().numpy().copy()
                part_ids = np.array(wanted[token])
                found[token] = (parts, part_ids, *find_rivals(rivals, candidates.numpy(), parts, part_ids, bound))
            if n_kept:
                kept.append(_most_probable(own, candidates, n_kept))
    return _as_tokens(query, place, [found[token] for token in range(len(query))], kept)


def find_rivals(
    candidates: Floats32, ids: Ints, parts: Floats32, part_ids: Ints, bound: Floats32 | None
) -> tuple[Floats32, Ints]:
    """Leave out candidates [tokens, models] that no mixture prefers to all of the parts [parts, models] and the others.

    `bound` [models] is what no other token exceeds, None where there is no other.
    """
    is_other = ~np.isin(ids, part_ids)
    vectors, names = candidates[is_other], ids[is_other]
    if bound is not None:
        vectors, names = np.vstack([vectors, bound]), np.append(names, _BOUND)
    for part, name in zip(parts, part_ids.tolist(), strict=True):
        stays = ~_is_beaten(vectors, names, part, name)
        vectors, names = vectors[stays], names[stays]
    chosen: list[int] = []
    # What has the largest sum is beaten by none, so each turn keeps one.
    alive = np.lexsort((names, -vectors.astype(np.float64).sum(axis=1)))
    while len(alive):
        chosen.append(int(alive[0]))
        alive = alive[1:]
        alive = alive[~_is_beaten(vectors[alive], names[alive], vectors[chosen[-1]], int(names[chosen[-1]]))]
    return vectors[chosen], names[chosen]


def _is_beaten(vectors: Floats32, names: Ints, other: Floats32, other_name: int) -> NDArray[np.bool_]:
    """Tell which vectors [tokens, models] are nowhere above another one, and lose ties where they are the same."""
    below = np.all(vectors <= other, axis=1)
    loses: NDArray[np.bool_] = below & (np.any(vectors < other, axis=1) | (names > other_name))
    return loses


def _most_probable(own: torch.Tensor, candidates: torch.Tensor, n_kept: int) -> tuple[Floats32, Floats32]:
    """Keep the candidates that some model finds most probable [n_kept, models], and the log of the rest [models]."""
    values = own[:, candidates].t()
    values = values[values.amax(1).argsort(descending=True, stable=True)[:n_kept]]
    rest = (1.0 - values.double().exp().sum(0)).clamp(min=1e-12).log().float()
    filled = torch.full((n_kept, own.shape[0]), -torch.inf)
    filled[: len(values)] = values
    return filled.numpy(), rest.numpy()


def _as_tokens(
    query: Ints,
    place: Ints,
    found: Sequence[tuple[Floats32, Ints, Floats32, Ints]],
    kept: Sequence[tuple[Floats32, Floats32]],
) -> Tokens:
    each = np.arange(len(found))
    parts, part_ids, rivals, rival_ids = (list(values) for values in zip(*found, strict=True))
    return Tokens(
        query,
        np.concatenate(parts),
        np.repeat(each, [len(ids) for ids in part_ids]),
        np.concatenate(part_ids),
        np.concatenate(rivals),
        np.repeat(each, [len(ids) for ids in rival_ids]),
        np.concatenate(rival_ids),
        Kept(np.stack([values for values, _ in kept]), np.stack([rest for _, rest in kept]), place) if kept else None,
    )


def _joined(found: Sequence[Tokens], n_models: int) -> Tokens:
    """Put the tokens of several chunks together."""
    if not found:
        none, ids = np.zeros((0, n_models), np.float32), np.zeros(0, np.int64)
        return Tokens(ids, none, ids, ids, none, ids, ids)
    starts = np.cumsum([0, *(len(tokens.query) for tokens in found)])
    shifted = [
        (tokens.part_of + start, tokens.rival_of + start) for tokens, start in zip(found, starts[:-1], strict=True)
    ]
    return Tokens(
        np.concatenate([tokens.query for tokens in found]),
        np.concatenate([tokens.parts for tokens in found]),
        np.concatenate([part for part, _ in shifted]),
        np.concatenate([tokens.part_id for tokens in found]),
        np.concatenate([tokens.rivals for tokens in found]),
        np.concatenate([rival for _, rival in shifted]),
        np.concatenate([tokens.rival_id for tokens in found]),
        _joined_kept([tokens.kept for tokens in found if tokens.kept is not None]),
    )


def _joined_kept(found: Sequence[Kept]) -> Kept | None:
    if not found:
        return None
    starts = np.cumsum([0, *(len(kept.tail) for kept in found)])
    return Kept(
        np.concatenate([kept.log_probs for kept in found]),
        np.concatenate([kept.tail for kept in found]),
        np.concatenate([kept.place + start for kept, start in zip(found, starts[:-1], strict=True)]),
    )
