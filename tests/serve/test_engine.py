"""The engine: every row gets what it gets alone, whoever is answered beside it, whatever happens to others."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_architectures import DECODERS, N_TOKENS
from tiny_engine import EXPERTS, Caller, ask, held_model, random_gates
from tiny_tokens import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from mediator_cli.errors import BundleError
from mediator_cli.runtime.gating import set_gates
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.serve.engine.batch import SlotBatch, SoloBatch
from mediator_cli.serve.engine.engine import Engine, EngineClosed, EngineFull, Limits, start_engine
from mediator_cli.serve.engine.request import Draw, Failed, Finished, Request, Started

MIXTURES = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "c": 0.5}, {"a": 0.2, "b": 0.3, "c": 0.5}, {"c": -0.5}]

WINDOWED = {"gemma2", "gemma3_text", "mamba", "jamba", "lfm2"}
"""Windows and states of a fixed size are not kept in slots."""


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> RoutedModel:
    return held_model()


@contextmanager
def running(model: RoutedModel, words: PreTrainedTokenizerFast, **limits: int) -> Iterator[Engine]:
    engine = start_engine(model, words, Limits(**{"rows": 5, "chunk": 7, "cache_bytes": 0, **limits}))
    try:
        yield engine
    finally:
        engine.close()


def plain(n: int = 6, **fields: object) -> Request:
    return Request(
        **{"prompt": (3, 4, 5, 6), "max_tokens": n, "mixture": {"a": 1.0}, "logprobs": 0, "ignore_eos": True, **fields}
    )


def many(n: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        plain(
            rng.randrange(1, 12), prompt=tuple(rng.randrange(N_TOKENS) for _ in range(rng.randrange(1, 30))),
            mixture=rng.choice(MIXTURES), logprobs=2, echo=rng.random() < 0.2,
            draw=Draw(rng.choice([0.0, 0.0, 1.0]), seed=rng.randrange(1000)),
        )
        for _ in range(n)
    ]  # fmt: skip


@torch.no_grad()
def naive(model: RoutedModel, request: Request) -> list[int]:
    """Choose the most probable token, by a pass over all tokens each time."""
    tokens = list(request.prompt)
    with model.mixing(dict(request.mixture or {}) or "dense"):
        for _ in range(request.max_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(request.prompt) :]


@torch.no_grad()
def scores(model: RoutedModel, request: Request, tokens: list[int]) -> torch.Tensor:
    """Give the log probabilities of all tokens but the first."""
    with model.mixing(dict(request.mixture or {}) or "dense"):
        logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_rows_that_come_and_go_get_what_they_get_alone(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    requests = many(60)
    with running(model, words) as engine:
        assert isinstance(engine.table.batch, SlotBatch)
        told = ask(engine, *requests)
        facts = engine.facts
    for request, caller in zip(requests, told, strict=True):
        assert caller.end == Finished("length", len(request.prompt), request.max_tokens)
        assert caller.started.mixture == request.mixture
        if request.draw.temperature == 0:
            assert caller.tokens == naive(model, request)
        expected = scores(model, request, [*request.prompt, *caller.tokens])
        torch.testing.assert_close(
            torch.tensor(caller.log_probs), expected[len(request.prompt) - 1 :], atol=2e-4, rtol=0
        )
        if request.echo:
            echoed = caller.started.prompt
            assert [scored.token for scored in echoed] == list(request.prompt)
            assert echoed[0].log_prob is None
            found = torch.tensor([scored.log_prob for scored in echoed[1:]])
            torch.testing.assert_close(found, expected[: len(request.prompt) - 1], atol=2e-4, rtol=0)
    assert facts.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert facts.answer_tokens == sum(request.max_tokens for request in requests)
    assert facts.passes < sum(request.max_tokens for request in requests)
    assert (facts.waiting, facts.running) == (0, 0)


def test_a_seed_gives_the_same_answer_beside_others(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    request = plain(20, draw=Draw(1.5, top_p=0.9, seed=7))
    with running(model, words) as engine:
        (alone,) = ask(engine, request)
        _, beside, *_, other = ask(engine, many(1, 1)[0], request, *many(8, 2), plain(20, draw=Draw(1.5, 0.9, seed=8)))
    assert alone.tokens == beside.tokens
    assert alone.tokens != other.tokens


@pytest.mark.parametrize("kind", sorted(set(DECODERS) - {"llama"}))
def test_every_architecture_answers_as_it_does_alone(kind: str, words: PreTrainedTokenizerFast) -> None:
    model = held_model(kind)
    requests = [
        plain(5, prompt=tuple(range(2, 2 + n)), mixture=mixture)
        for n, mixture in ((11, {"a": 1.0}), (3, {}), (6, {"b": 0.5, "c": 0.5}))
    ]
    with running(model, words, chunk=40) as engine:
        told = ask(engine, *requests)
        is_solo = isinstance(engine.table.batch, SoloBatch)
    assert [caller.tokens for caller in told] == [naive(model, request) for request in requests]
    assert is_solo == (kind in WINDOWED)


@pytest.mark.parametrize("combine", ["probabilities", "hidden"])
def test_experts_that_run_apart_are_answered_one_by_one(combine: str, words: PreTrainedTokenizerFast) -> None:
    model = held_model()
    model.combine = combine
    requests = [plain(5, mixture={"a": 0.5, "b": 0.5}), plain(5, mixture={"c": 1.0})]
    with running(model, words) as engine:
        told = ask(engine, *requests)
    assert [caller.tokens for caller in told] == [naive(model, request) for request in requests]


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_there(
    model: RoutedModel, words: PreTrainedTokenizerFast
) -> None:
    start = tuple(range(5, 35))
    with running(model, words, cache_bytes=1 << 20) as engine:
        (first,) = ask(engine, plain(6, prompt=start))
        longer = plain(6, prompt=(*start, *first.tokens[:3], 9, 9))
        told = ask(
            engine,
            longer,
            plain(6, prompt=longer.prompt, mixture={"b": 1.0}),
            plain(6, prompt=start),
            plain(6, prompt=longer.prompt, echo=True),
        )
    assert [caller.started.n_cached for caller in told] == [33, 0, 29, 0]
    assert told[0].tokens == naive(model, longer)
    assert told[1].tokens == naive(model, plain(6, prompt=longer.prompt, mixture={"b": 1.0}))
    assert told[2].tokens == first.tokens


def test_what_is_kept_stays_within_its_budget(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    with running(model, words, cache_bytes=20_000) as engine:
        ask(engine, *(plain(2, prompt=tuple(random.Random(n).choices(range(N_TOKENS), k=20))) for n in range(30)))
        facts = engine.facts
    assert 0 < facts.prefix_bytes <= 20_000
    assert facts.prefix_bytes == sum(kept.n_bytes for kept in engine.table.prefixes.entries.values())
    assert 0 < facts.prefix_entries < 30


def test_memory_goes_back_when_nobody_is_answered(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    with running(model, words) as engine:
        ask(engine, *many(10))
        assert engine.drain(10)
        assert not engine.table.batch.cache._arrays()


def test_the_last_token_ends_an_answer(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    request = plain(12)
    token = naive(model, request)[4]
    with running(model, words) as engine:
        first = naive(model, request).index(token)
        engine.ends = frozenset({token})
        ended, ignored = ask(engine, plain(12, ignore_eos=False), request)
    assert ended.end == Finished("stop", 4, first + 1)
    assert ended.tokens == naive(model, request)[:first]
    assert ignored.end == Finished("length", 4, 12)


def test_a_stop_sequence_is_cut_off(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    whole = words.decode(naive(model, plain(12)), skip_special_tokens=True)
    stop = whole[5:8]
    with running(model, words) as engine:
        (told,) = ask(engine, plain(12, stop=("never", stop)))
    assert told.text == whole[: whole.find(stop)]
    assert told.end.reason == "stop"


def test_a_cancelled_answer_makes_room(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    long, waiting = Caller(), Caller()
    with running(model, words, rows=2) as engine:
        told = threading.Event()
        long.ticket = engine.submit(plain(50, prompt=(3,)), lambda event: (long(event), told.set()))
        assert told.wait(60)
        waiting.ticket = engine.submit(plain(50, prompt=(4,)), waiting)
        waiting.ticket.cancel()
        long.ticket.cancel()
        (short,) = ask(engine, plain(3))
        assert long.wait().end.reason == "cancelled"
        assert waiting.wait().end.reason == "cancelled"
    assert long.end.n_answer < 50
    assert short.tokens == naive(model, plain(3))


def test_a_full_queue_and_a_closed_engine_refuse(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    gate = threading.Event()
    with running(model, words, rows=1, queue=2) as engine:
        entered = threading.Event()
        blocked = engine.submit(plain(2), lambda event: (entered.set(), gate.wait(60)))
        assert entered.wait(60)
        others = [Caller(), Caller()]
        for caller in others:
            engine.submit(plain(2), caller)
        with pytest.raises(EngineFull, match="2 requests are waiting"):
            engine.submit(plain(2), Caller())
        gate.set()
        assert [caller.wait().end.reason for caller in others] == ["length", "length"]
        assert engine.drain(10)
        with pytest.raises(EngineClosed):
            engine.submit(plain(2), Caller())
    assert not engine.is_alive
    assert not blocked.is_cancelled


def test_a_drain_cancels_what_does_not_end_in_time(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    with running(model, words, rows=2) as engine:
        gate, entered = threading.Event(), threading.Event()
        callers = [Caller(), Caller()]

        def slow(event: object) -> None:
            callers[0](event)
            entered.set()
            gate.wait(60)

        engine.submit(plain(40), slow)
        assert entered.wait(60)
        engine.submit(plain(40), callers[1])
        threading.Timer(0.05, gate.set).start()
        assert not engine.drain(0.01)
    assert [caller.wait().end.reason for caller in callers] == ["cancelled", "cancelled"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "is empty"),
        ({"prompt": (1, N_TOKENS)}, f"token {N_TOKENS} is not one of the model's {N_TOKENS}"),
        ({"prompt": (1, -1)}, "token -1 is not one"),
        ({"prompt": (1,) * 60}, "60 tokens and 6 of the answer are more than the 64"),
        ({"mixture": {"d": 1.0}}, "no expert 'd'"),
        ({"mixture": {"a": float("nan")}}, "not finite"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(
    fields: dict[str, object], message: str, model: RoutedModel, words: PreTrainedTokenizerFast
) -> None:
    with running(model, words) as engine, pytest.raises(BundleError, match=message):
        engine.submit(plain(6, **fields), Caller())


def test_without_a_router_the_reason_is_told(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    with running(model, words) as engine:
        (told,) = ask(engine, plain(mixture=None))
    assert isinstance(told.end, Failed)
    assert not told.end.is_ours
    assert "no router" in told.end.problem.message


def test_a_failing_pass_ends_its_rows_and_no_others(
    model: RoutedModel, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model, words) as engine:
        run, left = engine.table.batch.run, [3]

        def fails_once(first: int, chunks: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("out of luck")
            return run(first, chunks)

        monkeypatch.setattr(engine.table.batch, "run", fails_once)
        broken = ask(engine, *(plain(8, prompt=(n, 2, 3)) for n in range(3)))
        after = ask(engine, *many(8, 3))
    assert {type(caller.end) for caller in broken} <= {Failed, Finished}
    failed = [caller.end for caller in broken if isinstance(caller.end, Failed)]
    assert failed
    assert all(end.is_ours and "out of luck" in end.problem.message for end in failed)
    for request, caller in zip(many(8, 3), after, strict=True):
        if request.draw.temperature == 0:
            assert caller.tokens == naive(model, request)


def test_a_caller_that_raises_harms_nobody(model: RoutedModel, words: PreTrainedTokenizerFast) -> None:
    def gone(event: object) -> None:
        raise ConnectionError("gone")

    with running(model, words) as engine:
        engine.submit(plain(40), gone)
        (told,) = ask(engine, plain(6))
        assert engine.drain(10)
    assert told.tokens == naive(model, plain(6))


def test_a_bundle_is_routed_on_what_the_request_says(routed: object) -> None:
    from mediator_cli.runtime.open import open_bundle
    from mediator_cli.runtime.prompts import chat_ids

    model = open_bundle(routed, dtype=torch.float32)
    tokenizer = model.opened.tokenizer
    assert tokenizer is not None
    sums, films = (
        tuple(chat_ids(tokenizer, [{"role": "user", "content": text}]))
        for text in ("two plus apples", "film actor plot")
    )
    routing = model.route([list(sums), list(films)])
    with running(model, tokenizer) as engine:
        told = ask(
            engine,
            plain(3, prompt=sums, mixture=None),
            plain(3, prompt=films, mixture=None),
            plain(3, prompt=films, mixture=None, route_on=sums),
        )
    assert [caller.started.mixture for caller in told] == [{"a": 1.0}, {"b": 1.0}, {"a": 1.0}]
    started = told[1].started
    assert isinstance(started, Started)
    assert started.probabilities == pytest.approx(
        dict(zip(routing.experts, routing.probabilities[1].tolist(), strict=True))
    )
    assert started.uncertainty == pytest.approx(float(routing.entropy[1]))
    assert started.is_outside is False
    assert told[0].tokens == naive(model, plain(3, prompt=sums, mixture={"a": 1.0}))
    assert set(told[0].started.mixture) < set(EXPERTS)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_where_gates_choose_rows_are_answered_one_by_one(per: str, words: PreTrainedTokenizerFast) -> None:
    model = held_model()
    set_gates(model, random_gates(model, per))
    prompts = [(3, 4, 5, 6), (9, 8, 7)]
    with running(model, words) as engine:
        told = ask(engine, *(plain(5, prompt=prompt, mixture=None) for prompt in prompts), plain(5))
        assert isinstance(engine.table.batch, SoloBatch)
    for prompt, caller in zip(prompts, told, strict=False):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False
        )
        assert caller.tokens == expected[0, len(prompt) :].tolist()
        chosen = model.route([list(prompt)]).weights[0].tolist()
        assert list(caller.started.mixture.values()) == pytest.approx([weight for weight in chosen if weight], rel=1e-5)
        assert caller.started.probabilities is None
    assert told[2].tokens == naive(model, plain(5))
