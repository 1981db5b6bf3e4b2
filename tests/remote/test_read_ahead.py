"""Read-ahead: any reads give the file's bytes, many small ones become few requests, and memory is bounded."""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.checkpoint.remote.ahead import GRANULE, Ahead

RANGES = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 300), st.integers(0, 1200)), max_size=30)


def made_of(n: int) -> bytes:
    return bytes((i * 7 + i // 256) % 256 for i in range(n))


class Source:
    """A file in memory that keeps the ranges it was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked, self._lock = data, [], Lock()

    def fetch(self, start: int, stop: int) -> bytes:
        with self._lock:
            self.asked.append((start, stop))
        return self.data[start:stop]

    @property
    def n_bytes(self) -> int:
        return sum(stop - start for start, stop in self.asked)


def read(ahead: Ahead, file: int, start: int, n: int, end: int, begin: int = 0) -> bytes:
    view = bytearray(n)
    return bytes(view[: ahead.read_into(file, start, memoryview(view), (begin, end))])


@given(size=st.integers(0, 1000), ranges=RANGES, granule=st.integers(1, 64), kept=st.integers(1, 500))
def test_any_sequence_of_ranges_gives_the_files_bytes(size, ranges, granule, kept):
    files = [Source(made_of(size)), Source(made_of(size)[::-1])]
    with Ahead(kept, granule) as ahead:
        numbers = [ahead.add(size, source.fetch) for source in files]
        for at, (start, n, end) in enumerate(ranges):
            source = files[at % 2]
            assert read(ahead, numbers[at % 2], start, n, end) == source.data[start : start + n]
    for source in files:
        assert all(0 <= start < stop <= size for start, stop in source.asked)


@given(ranges=RANGES, granule=st.integers(1, 64))
def test_threads_read_the_same_bytes(ranges, granule):
    source = Source(made_of(1000))
    with Ahead(200, granule) as ahead, ThreadPoolExecutor(4) as pool:
        file = ahead.add(1000, source.fetch)
        found = pool.map(lambda asked: read(ahead, file, *asked), ranges)
        assert list(found) == [source.data[start : start + n] for start, n, _ in ranges]


def test_small_reads_in_order_become_few_requests_and_no_byte_comes_twice():
    size = 12 << 20
    source = Source(bytes(size))
    with Ahead() as ahead:
        file = ahead.add(size, source.fetch)
        for start in range(0, size, 64 << 10):
            assert len(read(ahead, file, start, 64 << 10, size)) == 64 << 10
    assert source.n_bytes == size
    assert len(source.asked) <= 9


def test_a_single_read_brings_no_more_than_its_granules():
    source = Source(bytes(8 << 20))
    with Ahead() as ahead:
        file = ahead.add(8 << 20, source.fetch)
        read(ahead, file, 3 * GRANULE + 5, 100, 8 << 20)
    assert source.asked == [(3 * GRANULE, 4 * GRANULE)]


def test_reads_go_ahead_to_the_end_of_the_tensor_and_one_extent_farther_at_most():
    source, end = Source(bytes(32 << 20)), 5 << 20
    with Ahead() as ahead:
        file = ahead.add(32 << 20, source.fetch)
        for start in range(0, end, GRANULE):
            read(ahead, file, start, GRANULE, end)
    assert end <= max(stop for _, stop in source.asked) <= end + (4 << 20)


def test_a_tensor_that_is_begun_is_read_ahead_but_not_beyond_it():
    source, begin = Source(bytes(32 << 20)), 10 * GRANULE + 8
    with Ahead() as ahead:
        file = ahead.add(32 << 20, source.fetch)
        read(ahead, file, begin, 100, begin + 2 * GRANULE, begin)
    assert source.asked == [(10 * GRANULE, 13 * GRANULE)]


def test_what_is_kept_is_bounded():
    kept = 1 << 20
    files = [Source(bytes(4 << 20)) for _ in range(8)]
    with Ahead(kept) as ahead:
        numbers = [ahead.add(4 << 20, source.fetch) for source in files]
        for start in range(0, 4 << 20, GRANULE):
            for number in numbers:
                read(ahead, number, start, GRANULE, 4 << 20)
                held = {id(extent): extent for extent in ahead._granules.values()}
                assert sum(extent.stop - extent.start for extent in held.values()) <= kept


def test_an_error_of_a_request_reaches_the_reader():
    def fetch(start: int, stop: int) -> bytes:
        raise RuntimeError("no such bytes")

    with Ahead() as ahead, pytest.raises(RuntimeError, match="no such bytes"):
        read(ahead, ahead.add(100, fetch), 0, 10, 100)
