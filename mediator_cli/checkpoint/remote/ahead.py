"""Read-ahead for files that are read by ranges: small reads in about their order become few large requests.

A file is cut into granules; an extent is a run of granules that one request brings. A read that follows on another,
or begins a tensor, brings more than it needs and the next extents early; any other brings what it needs and no more.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    Fetch = Callable[[int, int], bytes]
    Span = tuple[int, int]

GRANULE = 128 << 10
_LARGEST = 4 << 20
_FIRST = 1 << 20
"""Of a tensor that is begun."""
_GROWTH = 4
_DEPTH = 2
"""Extents that are asked for before they are needed."""
_AT_A_TIME = 16
KEPT_BYTES = 64 << 20
"""What all files of one reading keep together; the extents in use at the moment come on top."""


@dataclass(frozen=True, eq=False)
class _Extent:
    start: int
    stop: int
    follows: bool
    data: Future[bytes]


class Ahead:
    """What was brought of some files, the least recently used dropped first; all methods from any thread."""

    def __init__(self, kept: int = KEPT_BYTES, granule: int = GRANULE) -> None:
        self._kept, self._granule = kept, granule
        self._granules: dict[tuple[int, int], _Extent] = {}
        self._used: OrderedDict[tuple[int, int], _Extent] = OrderedDict()
        self._sizes: list[int] = []
        self._fetches: list[Fetch] = []
        self._held = 0
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(_AT_A_TIME)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, size: int, fetch: Fetch) -> int:
        """Add a file of `size` bytes that `fetch` reads from start to stop; gives its number."""
        self._sizes.append(size)
        self._fetches.append(fetch)
        return len(self._sizes) - 1

    def read_into(self, file: int, offset: int, view: memoryview, span: Span) -> int:
        """Fill `view` with the bytes from `offset`; gives how many there are. `span` is that of the tensor."""
        stop = min(offset + len(view), self._sizes[file])
        at = offset
        while at < stop:
            extent = self._find(file, at, stop, span)
            upto = min(stop, extent.stop)
            # The view of the bytes spares a copy of the slice.
            data = memoryview(extent.data.result())
            view[at - offset : upto - offset] = data[at - extent.start : upto - extent.start]
            at = upto
        return max(0, stop - offset)

    def _find(self, file: int, at: int, stop: int, span: Span) -> _Extent:
        """Give the extent that holds byte `at`, and start on those behind it where reads go on."""
        with self._lock:
            number = at // self._granule
            found = self._granules.get((file, number)) or self._start(file, number, stop, span)
            self._used.move_to_end((file, found.start))
            last = found
            for _ in range(_DEPTH):
                if not last.follows or last.stop >= min(span[1], self._sizes[file]):
                    break
                number = last.stop // self._granule
                last = self._granules.get((file, number)) or self._start(file, number, last.stop, span)
            return found

    def _start(self, file: int, number: int, stop: int, span: Span) -> _Extent:
        """Ask for an extent from a granule on, at least to `stop` where that is not too far."""
        start, largest = number * self._granule, self._largest()
        before = self._granules.get((file, number - 1))
        begins = start <= span[0] < start + self._granule
        wanted = min(stop, start + largest)
        if before is not None:
            # This may go on behind the end of the tensor: most often that is where the next one lies.
            wanted = max(wanted, start + min(_GROWTH * (before.stop - before.start), largest))
        elif begins:
            wanted = max(wanted, min(span[1], start + min(_FIRST, largest)))
        first, last = number + 1, max(number + 1, -(-wanted // self._granule))
        free = next((n for n in range(first, last) if (file, n) in self._granules), last)
        stop = min(free * self._granule, self._sizes[file])
        follows = begins or before is not None
        extent = _Extent(start, stop, follows, self._pool.submit(self._fetches[file], start, stop))
        self._keep(file, extent)
        return extent

    def _largest(self) -> int:
        """Bound extents so that four of each file that is being read fit in what is kept."""
        active = len({file for file, _ in self._used}) + 1
        return max(self._granule, min(_LARGEST, self._kept // (4 * active)))

    def _keep(self, file: int, extent: _Extent) -> None:
        for number in self._numbers(extent):
            self._granules[file, number] = extent
        self._used[file, extent.start] = extent
        self._held += extent.stop - extent.start
        while self._held > self._kept and len(self._used) > 1:
            (owner, _), old = self._used.popitem(last=False)
            self._held -= old.stop - old.start
            for number in self._numbers(old):
                del self._granules[owner, number]

    def _numbers(self, extent: _Extent) -> range:
        return range(extent.start // self._granule, -(-extent.stop // self._granule))
