"""Dividing batches into parts, the cache of mixed matrices, and reading mixtures."""

import pytest
import torch

from mediator_cli.errors import BundleError
from mediator_cli.runtime.mixing import PASS_TOKENS, Matrices, Mixture, MixtureCache, as_weights, divide, spread

ONE, TWO, NONE = (1.0, 0.0), (0.25, 0.75), (0.0, 0.0)


def cache(budget: int = 20, entry: int = 10) -> MixtureCache:
    def build(mixture: Mixture) -> Matrices:
        return {"w": torch.tensor(mixture)}

    return MixtureCache(budget, entry, build)


def test_matrices_are_built_once_enough_tokens_have_asked() -> None:
    kept = cache()
    switch = 3 * PASS_TOKENS + 8
    assert kept.get(ONE, 3, switch) is None
    assert kept.get(ONE, 4, switch) is None
    built = kept.get(ONE, 1, switch)
    assert built is not None
    assert built["w"].tolist() == [1.0, 0.0]
    assert kept.get(ONE, 0, switch=8) is built


def test_the_mixture_used_longest_ago_leaves_first() -> None:
    kept = cache(budget=25, entry=10)
    assert kept.room == 2
    for mixture in (ONE, TWO, ONE, (0.5, 0.5)):
        kept.get(mixture, 1, switch=1)
    assert list(kept.entries) == [ONE, (0.5, 0.5)]


@pytest.mark.parametrize(("budget", "entry"), [(9, 10), (0, 10), (100, 0)])
def test_without_room_nothing_is_built(budget: int, entry: int) -> None:
    kept = cache(budget, entry)
    assert kept.get(ONE, 10**6, switch=1) is None
    assert not kept.waited


def parts(rows: list[Mixture], n_tokens: int, switch: int = 8, budget: int = 100) -> list[tuple[object, str]]:
    division = divide(torch.tensor(rows), n_tokens, cache(budget), switch)
    found = []
    for part in division.parts:
        kind = "products" if part.matrices is None else "matrix" if part.matrices else "dense"
        found.append((None if part.rows is None else part.rows.tolist(), kind))
    return found


def test_one_mixture_with_many_tokens_gets_matrices_and_with_few_waits() -> None:
    switch = PASS_TOKENS + 8
    assert parts([ONE, ONE], 4, switch) == [(None, "matrix")]
    assert parts([ONE, ONE], 3, switch) == [(None, "products")]
    assert divide(torch.tensor([ONE]), 3, cache(), switch).waits
    assert not divide(torch.tensor([ONE]), 9, cache(), switch).waits


def test_the_dense_expert_alone_needs_nothing() -> None:
    assert parts([NONE, NONE], 1) == [(None, "dense")]


def test_several_mixtures_with_few_tokens_share_one_pass() -> None:
    assert parts([ONE, TWO, NONE], 1) == [(None, "products")]
    assert not divide(torch.tensor([ONE, TWO]), 1, cache(), 8).waits


def test_several_mixtures_with_many_tokens_get_matrices_each() -> None:
    found = parts([ONE, TWO, ONE, NONE], 8)
    assert found == [([0, 2], "matrix"), ([1], "matrix"), ([3], "dense")]


def test_rows_too_few_for_matrices_share_products_beside_the_others() -> None:
    assert parts([ONE, TWO, ONE, NONE], 4) == [([0, 2], "matrix"), ([1, 3], "products")]


def test_parts_tell_what_they_use() -> None:
    (part,) = divide(torch.tensor([NONE, TWO]), 1, cache(), 8).parts
    assert part.used == (0, 1)
    assert not part.is_uniform
    (part,) = divide(torch.tensor([ONE, ONE]), 1, cache(), 8).parts
    assert part.used == (0,)
    assert part.is_uniform


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("dense", [[0, 0, 0]]),
        ("b", [[0, 1, 0]]),
        ({"c": 0.25, "a": 0.75}, [[0.75, 0, 0.25]]),
        ([[1, 2, 3], [0, 0, 1]], [[1, 2, 3], [0, 0, 1]]),
    ],
)
def test_a_mixture_is_read_in_every_form(wanted: object, expected: list[list[float]]) -> None:
    assert as_weights(wanted, ("a", "b", "c"), "place").tolist() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "message", "hint"),
    [
        ("bb", "no expert 'bb'", "did you mean 'b'?"),
        ({"a": 1.0, "x": 1.0}, "no expert 'x'", "a, b, dense"),
        ([[1.0]], "shape [1, 1]", "[rows, 2]"),
        ([1.0, 0.0], "shape [2]", "[rows, 2]"),
        ([[float("nan"), 0.0]], "not finite", "finite"),
        ({"a": float("inf")}, "not finite", "finite"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(wanted: object, message: str, hint: str) -> None:
    with pytest.raises(BundleError) as caught:
        as_weights(wanted, ("a", "b"), "place")  # type: ignore[arg-type]
    assert message in caught.value.problems[0].message
    assert hint in caught.value.problems[0].hint


def test_mixtures_follow_their_rows_through_beams() -> None:
    weights = torch.tensor([ONE, TWO])
    assert spread(weights, 6, "").tolist() == [list(ONE)] * 3 + [list(TWO)] * 3
    with pytest.raises(BundleError, match="2 mixtures for a batch of 3 rows"):
        spread(weights, 3, "")


def test_prompts_of_several_mixtures_ask_for_matrices_and_single_tokens_do_not() -> None:
    held, switch = cache(budget=100), 2 * PASS_TOKENS + 80
    rows = torch.tensor([ONE, TWO])

    def kinds(n_tokens: int) -> list[bool]:
        return [part.matrices is not None for part in divide(rows, n_tokens, held, switch).parts]

    assert kinds(1) == [False]
    assert not held.waited
    assert kinds(40) == [False]
    assert held.waited == {ONE: PASS_TOKENS + 40, TWO: PASS_TOKENS + 40}
    assert kinds(40) == [True, True]
    assert kinds(1) == [False]


def test_mixtures_that_wait_are_forgotten_in_the_end() -> None:
    kept = cache(budget=100)
    for n in range(3000):
        kept.get((float(n), 0.0), 1, switch=10**6)
    assert len(kept.waited) == 1024
    assert next(iter(kept.waited)) == (3000.0 - 1024, 0.0)
