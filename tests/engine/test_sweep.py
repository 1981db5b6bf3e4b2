"""Sweeps: each slab read once for all that look at it, sums in the order of blocks, short passes first."""

import random
import threading

import numpy as np
import pytest

from mediator_cli.engine.streams import Inputs, Piece
from mediator_cli.engine.sweep import OrderedSum, Sweep, all_of, carry_out, sum_sweep

PIECES = [Piece("t", start, start + 10) for start in range(0, 100, 10)]


def silent(n):
    pass


def sweep(source, parts=PIECES, quick=False):
    """A pass that gathers the numbers of all entries that it saw, once each."""
    seen, lock = np.zeros(100, np.int64), threading.Lock()

    def look(piece, inputs):
        with lock:
            seen[piece.start : piece.stop] += 1

    return Sweep(source, parts, look, lambda: [seen], quick)


@pytest.mark.parametrize("seed", range(5))
def test_an_ordered_sum_does_not_depend_on_the_order_of_arrival(seed):
    blocks = np.random.default_rng(0).standard_normal((40, 3)) * 10.0 ** np.arange(-20, 20)[:, None]
    exact = np.zeros(3)
    for block in blocks:
        exact += block
    parts = [(Piece("t", at * 8, min(at * 8 + 24, 320)), blocks[at : at + 3]) for at in range(0, 40, 3)]
    random.Random(seed).shuffle(parts)
    total = OrderedSum(3)
    threads = [threading.Thread(target=total.add, args=part) for part in parts]
    for thread in threads:
        thread.start()
        if seed == 0:
            thread.join()
    for thread in threads:
        thread.join()
    assert total.total.tobytes() == exact.tobytes()


def test_an_ordered_sum_waits_for_what_is_missing():
    total = OrderedSum(1)
    total.add(Piece("t", 10, 20), np.ones((1, 1)))
    assert total.total[0] == 0
    total.add(Piece("t", 0, 10), np.ones((1, 1)))
    assert total.total[0] == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_sums_of_several_tensors_stand_in_their_order(workers):
    values = {"b": np.arange(7.0), "a": np.arange(5.0) * 100}
    parts = [Piece(name, at, at + 1) for name, row in values.items() for at in range(len(row))]
    found = sum_sweep(
        lambda piece: Inputs(values[piece.tensor][None, piece.start : piece.stop], None),
        {"b": 7, "a": 5},
        parts,
        1,
        lambda piece, inputs: inputs.rows,
    )

    def search():
        return (yield [found])

    ((totals,),) = carry_out(search(), workers, silent)
    assert totals.tolist() == [[21.0], [1000.0]]


class Source:
    """Notes which pieces are read."""

    def __init__(self):
        self.read = []

    def __call__(self, piece):
        self.read.append(piece)
        return Inputs(np.zeros((1, piece.size), np.float32), None)


def passes(source, number, quick=()):
    """A search of several passes, some of them quick: gives how often it saw each entry in each."""
    found = []
    for at in range(number):
        parts = PIECES[:2] if at in quick else PIECES
        ((seen,),) = yield [sweep(source, parts, at in quick)]
        found.append(seen.copy())
    return found


@pytest.mark.parametrize("workers", [1, 4])
def test_searches_side_by_side_read_each_slab_once_for_all(workers):
    source = Source()
    found = carry_out(all_of([passes(source, 2), passes(source, 1), passes(source, 2)]), workers, silent)
    assert sorted(source.read, key=lambda piece: piece.start) == sorted(PIECES * 2, key=lambda piece: piece.start)
    assert [len(each) for each in found] == [2, 1, 2]
    assert all((seen == 1).all() for each in found for seen in each)


def test_samples_come_first_so_that_long_passes_are_shared():
    source = Source()
    carry_out(all_of([passes(source, 2, quick={0}), passes(source, 1), passes(source, 3, quick={0, 1})]), 1, silent)
    # One round of samples for two, one more for the third, then a single long pass for all three.
    assert source.read == [*PIECES[:2], *PIECES[:2], *PIECES]


def test_other_sources_are_read_by_themselves():
    one, other = Source(), Source()
    carry_out(all_of([passes(one, 1), passes(other, 1)]), 2, silent)
    assert len(one.read) == len(other.read) == len(PIECES)


def test_no_searches_give_nothing_and_read_nothing():
    assert carry_out(all_of([]), 2, silent) == []


def test_a_search_gets_the_results_of_its_own_sweeps():
    source = Source()

    def two():
        (first,), (second,) = yield [sweep(source, PIECES[:1]), sweep(source, PIECES[1:])]
        return int(first.sum()), int(second.sum())

    assert carry_out(all_of([two(), two()]), 2, silent) == [(10, 90), (10, 90)]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_told_adds_up_to_what_is_read(workers):
    told = []
    carry_out(all_of([passes(Source(), 3)]), workers, told.append)
    assert sum(told) == 300
