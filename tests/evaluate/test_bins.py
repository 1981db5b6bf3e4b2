"""Where tokens stand in a batch: every sequence can be read off, and no token sees a stranger."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.evaluate.layout import Query, common_opening, group_bins, lay_out, pack_bins, single_bins

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=8).map(tuple)
QUERIES = st.lists(st.builds(Query, TOKENS, TOKENS, st.booleans()), min_size=1, max_size=12)


def sequences(batch, queries, n_opening, opening):
    """Read each query's tokens back: what the token that predicts its last answer token sees, by position."""
    for index, (row, kept) in batch.reads.items():
        columns = [batch.ids.shape[1] - batch.n_kept + column for column in kept]
        for n, column in enumerate(columns):
            sees = np.flatnonzero(batch.mask[row, column])
            own = sees[sees >= n_opening] - n_opening
            own = own[np.argsort(batch.positions[row, own])]
            n_tokens = len(queries[index].prompt) + n
            assert (sees < n_opening).sum() == n_opening
            assert batch.positions[row, own].tolist() == list(range(n_opening, n_tokens))
            assert opening + tuple(batch.ids[row, own]) == queries[index].fed[:n_tokens]
            assert own[-1] == column
        yield index


@given(QUERIES, st.integers(4, 20), st.integers(10, 60))
def test_every_query_is_read_where_it_stands_alone(queries, capacity, budget):
    n_opening = common_opening(queries)
    bins = pack_bins(queries, range(len(queries)), n_opening, capacity)
    found = []
    for chosen in group_bins(bins, budget):
        batch = lay_out([bins[i] for i in chosen], n_opening, pad=9)
        assert len(chosen) == 1 or batch.ids.size <= budget
        found += sequences(batch, queries, n_opening, queries[0].prompt[:n_opening])
    assert sorted(found) == list(range(len(queries)))


@given(QUERIES)
def test_a_bin_holds_no_prefix_twice(queries):
    (whole,) = pack_bins(queries, range(len(queries)), 0, capacity=1000)
    assert len(whole.tokens) == len({q.fed[:n] for q in queries for n in range(1, len(q.fed) + 1)})


@given(QUERIES)
def test_single_bins_are_left_padded_sequences(queries):
    bins = single_bins(queries, range(len(queries)))
    batch = lay_out(bins, 0, pad=9)
    for index, (row, _) in batch.reads.items():
        real = batch.mask[row, -1]
        assert tuple(batch.ids[row][real]) == queries[index].fed
        assert real.tolist() == sorted(real.tolist())


def test_choices_of_a_long_question_share_its_bin():
    prompt = tuple(range(100))
    queries = [Query(prompt, (200 + n,)) for n in range(50)]
    assert [len(b.tokens) for b in pack_bins(queries, range(50), 0, capacity=16)] == [150]
    apart = [Query((*prompt, n), tuple(range(60))) for n in range(3)]
    assert [len(b.tokens) for b in pack_bins(apart, range(3), 0, capacity=16)] == [161 + 61 + 61]


def test_an_answer_without_end_leaves_its_last_token_unread():
    assert Query((1, 2), (3, 4), ends=False).fed == (1, 2, 3)
    assert Query((1, 2), (3, 4)).fed == (1, 2, 3, 4)


def test_the_opening_stops_short_of_the_token_that_predicts():
    assert common_opening([Query((1, 2, 3), (4,)), Query((1, 2, 3), (5,))]) == 2
    assert common_opening([Query((1, 2, 3), (4,)), Query((1, 7, 3), (5,))]) == 1
