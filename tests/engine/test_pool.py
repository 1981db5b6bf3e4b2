"""Worker threads: every item once, the first error ends all, progress adds up, an interrupt is heard."""

import threading
import time

import pytest

from mediator_cli.engine import pool
from mediator_cli.engine.pool import keep_freed_memory, run_all


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 50])
def test_every_item_is_done_once_and_told(workers, n):
    done, told = [], []
    run_all(done.append, range(n), workers, told.append)
    assert sorted(done) == list(range(n))
    assert sum(told) == n
    assert all(step > 0 for step in told)


def test_items_run_in_several_threads():
    barrier = threading.Barrier(3, timeout=10)
    run_all(lambda n: barrier.wait(), range(3), 3)


def test_one_worker_keeps_the_order():
    done = []
    run_all(done.append, range(100), 1)
    assert done == list(range(100))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_an_error_ends_all_and_is_raised_here(workers):
    seen = []

    def fail(n):
        seen.append(n)
        if n == 3:
            raise ValueError(f"item {n}")
        time.sleep(0.002)

    with pytest.raises(ValueError, match="item 3"):
        run_all(fail, range(10_000), workers)
    assert len(seen) < 1000
    count = len(seen)
    time.sleep(0.02)
    assert len(seen) == count


def test_of_several_errors_that_of_the_first_item_is_raised():
    both = threading.Barrier(2, timeout=10)

    def fail(n):
        both.wait()
        time.sleep(0.05 * (1 - n))
        raise ValueError(f"item {n}")

    with pytest.raises(ValueError, match="item 0"):
        run_all(fail, range(2), 2)


def test_advance_is_told_in_the_calling_thread_while_workers_run(monkeypatch):
    monkeypatch.setattr(pool, "_WAKE", 0.005)
    here, told = threading.current_thread(), []

    def tell(n):
        assert threading.current_thread() is here
        told.append(n)

    run_all(lambda n: time.sleep(0.01), range(20), 2, tell)
    assert sum(told) == 20
    assert len(told) > 1


def test_an_interrupt_stops_the_workers_and_is_raised(monkeypatch):
    monkeypatch.setattr(pool, "_WAKE", 0.005)
    done = []

    def work(n):
        time.sleep(0.005)
        done.append(n)

    def interrupt(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(work, range(10_000), 3, interrupt)
    count = len(done)
    assert count < 5000
    time.sleep(0.05)
    assert len(done) == count


def test_freed_memory_may_be_kept_more_than_once():
    keep_freed_memory()
    keep_freed_memory()
