"""Read-ahead for files that are read by ranges: small reads in about their order become few large requests.

A file is cut into granules; an extent is a run of granules that one request brings. A read that follows on another
doubles the extent and brings the next one early; any other brings what it needs and no more.
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

GRANULE = 128 << 10
_LARGEST = 4 << 20
_OVERSHOOT = 1 << 20
"""How far an extent may go on behind the end of a tensor: small tensors are read together."""
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

    def read_into(self, file: int, offset: int, view: memoryview, end: int) -> int:
        """Fill `view` with the bytes from `offset`; gives how many there are. Reads are expected to go on to `end`."""
        stop = min(offset + len(view), self._sizes[file])
        at = offset
        while at < stop:
            extent = self._find(file, at, stop, end)
            upto = min(stop, extent.stop)
            # The view of the bytes spares a copy of the slice.
            data = memoryview(extent.data.result())
            view[at - offset : upto - offset] = data[at - extent.start : upto - extent.start]
            at = upto
        return max(0, stop - offset)

    def _find(self, file: int, at: int, stop: int, end: int) -> _Extent:
        """Give the extent that holds byte `at`, and start on the one behind it where reads go on."""
        with self._lock:
            number = at // self._granule
            extent = self._granules.get((file, number)) or self._start(file, number, stop, end)
            self._used.move_to_end((file, extent.start))
            if extent.follows and extent.stop < min(end, self._sizes[file]):
                following = extent.stop // self._granule
                if (file, following) not in self._granules:
                    self._start(file, following, extent.stop, end)
            return extent

    def _start(self, file: int, number: int, stop: int, end: int) -> _Extent:
        """Ask for an extent from a granule on, at least to `stop` where that is not too far."""
        start = number * self._granule
        before = self._granules.get((file, number - 1))
        wanted = self._up(min(stop, start + self._largest()))
        if before is not None:
            length = min(2 * (before.stop - before.start), self._largest())
            wanted = max(wanted, min(self._up(start + length), max(self._up(end), self._up(start + _OVERSHOOT))))
        first, last = number + 1, max(number + 1, wanted // self._granule)
        free = next((n for n in range(first, last) if (file, n) in self._granules), last)
        stop = min(free * self._granule, self._sizes[file])
        extent = _Extent(start, stop, before is not None, self._pool.submit(self._fetches[file], start, stop))
        self._keep(file, extent)
        return extent

    def _up(self, at: int) -> int:
        return -(-at // self._granule) * self._granule

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
