"""Parts of the engine: text as it comes, tokens by chance, keys and values in their places."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokens import SPECIALS, byte_tokenizer

from mediator_cli.serve.engine.choose import Chooser, make_chooser
from mediator_cli.serve.engine.prefixes import Kept, Prefixes
from mediator_cli.serve.engine.request import Draw
from mediator_cli.serve.engine.slots import SlotCache
from mediator_cli.serve.engine.words import Vocabulary, Writer

TOKENIZER = byte_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER, len(TOKENIZER))


def written(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Writer]:
    """Write a text token by token, until it is stopped; give all pieces."""
    writer = Writer(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        pieces.append(writer.add(token))
        if writer.is_stopped:
            return pieces, writer
    return [*pieces, writer.finish()], writer


@given(st.text(alphabet="ab é→🙂🏳️‍🌈the apples\n", max_size=60))
def test_pieces_make_the_whole_text_without_broken_characters(text: str) -> None:
    pieces, writer = written(text)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert not writer.is_stopped


@given(
    st.text(alphabet="abé🙂", max_size=40),
    st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_sequence(text: str, stop: list[str]) -> None:
    pieces, writer = written(text, tuple(stop))
    places = [text.find(each) for each in stop if each in text]
    assert writer.is_stopped == bool(places)
    said = "".join(pieces)
    if not places:
        assert said == text
    else:
        # A token may complete two sequences: what is said ends before the first of those found by then.
        assert text.startswith(said)
        assert not any(each in said for each in stop)
        assert any(text.startswith(each, len(said)) for each in stop)


def test_nothing_is_said_that_may_have_to_be_taken_back() -> None:
    writer = Writer(TOKENIZER, ("abc",))
    tokens = [TOKENIZER.encode(letter, add_special_tokens=False)[0] for letter in "xababd"]
    assert [writer.add(token) for token in tokens] == ["x", "", "", "ab", "", "abd"]


def test_a_character_that_never_ends_is_written_as_a_broken_one() -> None:
    writer = Writer(TOKENIZER)
    half = TOKENIZER.convert_tokens_to_ids(["ð", "Ł"])
    assert [writer.add(token) for token in half] == ["", ""]
    assert writer.finish() == TOKENIZER.decode(half)


def test_special_tokens_are_not_written() -> None:
    writer = Writer(TOKENIZER)
    tokens = [*TOKENIZER.encode("ab", add_special_tokens=False), TOKENIZER.convert_tokens_to_ids("<|im_end|>")]
    assert "".join(writer.add(token) for token in tokens) + writer.finish() == "ab"


def test_long_answers_are_written_without_reading_all_of_them_again() -> None:
    text = "how many apples are left é🙂 " * 30
    writer = Writer(TOKENIZER)
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    said = "".join(writer.add(token) for token in tokens)
    assert said + writer.finish() == text
    assert len(writer.tokens) - writer._start <= 32


@pytest.mark.parametrize("text", ["a", "é", "🙂", " apples"])
def test_bytes_of_tokens_make_the_bytes_of_the_text(text: str) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    assert b"".join(VOCABULARY.raw(token) for token in tokens) == text.encode()


def test_the_most_probable_tokens_are_told_best_first() -> None:
    log_probs = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    scored = VOCABULARY.scored(1, log_probs, 2)
    assert scored.log_prob == pytest.approx(float(log_probs[1]))
    assert [(token, pytest.approx(value)) for token, _, _, value in scored.best] == [
        (3, float(log_probs[3])),
        (2, float(log_probs[2])),
    ]
    assert scored.text == SPECIALS[1]


def shares(draw: Draw, logits: torch.Tensor, n: int = 4000) -> dict[int, float]:
    chooser = make_chooser(draw)
    counts = Counter(Chooser(draw, chooser.generator).choose(logits) for _ in range(n))
    return {token: count / n for token, count in counts.items()}


LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (Draw(1.0, seed=1), {0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}),
        (Draw(1.0, top_k=2, seed=1), {0: 2 / 3, 1: 1 / 3}),
        (Draw(1.0, top_p=0.6, seed=1), {0: 2 / 3, 1: 1 / 3}),
        (Draw(1.0, top_p=0.5, seed=1), {0: 1.0}),
        (Draw(1.0, top_p=0.0, seed=1), {0: 1.0}),
        (Draw(0.5, seed=1), {0: 0.725, 1: 0.181, 2: 0.065, 3: 0.029}),
        (Draw(1.0, bias={0: -100.0, 3: 100.0}, seed=1), {3: 1.0}),
        (Draw(1e-30, seed=1), {0: 1.0}),
        (Draw(0.0), {0: 1.0}),
    ],
)
def test_tokens_are_drawn_by_their_shares(draw: Draw, expected: dict[int, float]) -> None:
    found = shares(draw, LOGITS)
    assert set(found) == set(expected)
    for token, share in expected.items():
        # Four standard deviations of 4000 draws.
        assert found[token] == pytest.approx(share, abs=0.032)


def test_penalties_count_what_was_said() -> None:
    chooser = make_chooser(Draw(presence_penalty=0.5, frequency_penalty=0.3))
    # From -0.69, -1.39, -1.90, -2.30: the first 0 costs it 0.8, so 1 follows; then 0 leads at -1.49, again at -1.79, …
    assert [chooser.choose(LOGITS) for _ in range(6)] == [0, 1, 0, 0, 2, 0]


def test_the_same_seed_draws_the_same() -> None:
    draws = [[make_chooser(Draw(2.0, seed=seed)).choose(LOGITS) for _ in range(1)] for seed in (5, 5)]
    assert draws[0] == draws[1]
    chooser, again = make_chooser(Draw(2.0, seed=-3)), make_chooser(Draw(2.0, seed=-3))
    assert [chooser.choose(LOGITS) for _ in range(20)] == [again.choose(LOGITS) for _ in range(20)]


def put(
    cache: SlotCache, first: int, starts: list[int], values: list[list[float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.tensor(starts)[:, None] + torch.arange(len(values[0]))
    cache.look_at(first, positions)
    states = torch.tensor(values)[:, None, :, None]
    return cache.update(states, -states, 0)


def test_rows_keep_their_places_while_room_grows() -> None:
    cache = SlotCache(1, torch.device("cpu"))
    put(cache, 0, [0, 0], [[1.0, 2.0], [3.0, 4.0]])
    keys, values = put(cache, 1, [2], [[5.0]])
    assert keys.flatten().tolist() == [3.0, 4.0, 5.0]
    assert values.flatten().tolist() == [-3.0, -4.0, -5.0]
    keys, _ = put(cache, 2, [0], [[9.0] * 700])
    assert keys.shape == (1, 1, 700, 1)
    keys, _ = put(cache, 0, [2, 3], [[6.0], [7.0]])
    assert keys[:, 0, :4, 0].tolist() == [[1.0, 2.0, 6.0, 0.0], [3.0, 4.0, 5.0, 7.0]]


def test_rows_are_moved_exchanged_and_copied() -> None:
    cache = SlotCache(1, torch.device("cpu"))
    put(cache, 0, [0, 0, 0], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    cache.swap(0, 2, 2)
    cache.move(2, 1, 2)
    kept = cache.copy_out(0, 2)
    assert [array.flatten().tolist() for array in kept] == [[5.0, 6.0], [-5.0, -6.0]]
    cache.clear()
    assert not cache._arrays()
    cache.copy_in(3, kept, 1)
    keys, values = put(cache, 3, [1], [[8.0]])
    assert keys.flatten().tolist() == [5.0, 8.0]
    assert values.flatten().tolist() == [-5.0, -8.0]


def kept(*tokens: int) -> Kept:
    return Kept(tokens, (torch.zeros(len(tokens)),))


def test_the_longest_beginning_of_the_same_mixture_is_found() -> None:
    prefixes = Prefixes(10_000)
    long, short = tuple(range(40)), tuple(range(20))
    prefixes.keep((1.0,), kept(*short, 99))
    prefixes.keep((1.0,), kept(*long))
    prefixes.keep((0.5,), kept(*range(60)))
    found, n_same = prefixes.find((1.0,), (*range(30), 7))
    assert (found.tokens, n_same) == (long, 30)
    assert prefixes.find((1.0,), long)[1] == 39
    assert prefixes.find((0.2,), long) is None
    assert prefixes.find((1.0,), tuple(range(15))) is None
    assert prefixes.find((1.0,), (50, *long)) is None


def test_what_a_longer_row_begins_with_is_not_kept_twice_and_the_oldest_goes() -> None:
    prefixes = Prefixes(4 * 100)
    prefixes.keep((1.0,), kept(*range(20)))
    prefixes.keep((1.0,), kept(*range(40)))
    assert [len(each.tokens) for each in prefixes.entries.values()] == [40]
    prefixes.keep((1.0,), kept(*range(100, 150)))
    prefixes.find((1.0,), tuple(range(40)))
    prefixes.keep((1.0,), kept(*range(200, 230)))
    assert [each.tokens[0] for each in prefixes.entries.values()] == [0, 200]
    assert prefixes.n_bytes == 4 * 70
    prefixes.keep((1.0,), kept(*range(300, 500)))
    assert (prefixes.n_bytes, len(prefixes.entries)) == (0, 0)
