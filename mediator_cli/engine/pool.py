"""Worker threads that go through a list; the kernels they call run without the interpreter's lock."""

from __future__ import annotations

import ctypes
import sys
from itertools import count
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_WAKE = 0.1
"""Seconds between two looks at how far the workers are."""


class Stopped(Exception):
    """Ends an item that takes long when the work has become useless."""


def keep_freed_memory() -> None:
    """Let glibc keep freed slabs for the next ones; a process that only merges calls this once.

    By default every slab comes from the kernel and goes back to it: a third of the processor time of a TIES merge.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)


def run_all(
    function: Callable[[T], object],
    items: Sequence[T],
    workers: int,
    advance: Callable[[int], None] = lambda n: None,
    stop: Event | None = None,
) -> None:
    """Call a function for every item from `workers` threads, in about their order.

    `advance` is told, from the calling thread, how many more items are done. The first error, by the order of the
    items that failed, ends all; so does an interrupt, after the items in flight. Those that take long may look at
    `stop`, which is set then.
    """
    stop, turn = stop or Event(), count()
    errors: dict[int, BaseException] = {}
    done = [0] * workers

    def work(worker: int) -> None:
        while not stop.is_set() and (at := next(turn)) < len(items):
            try:
                function(items[at])
            except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
                errors[at] = error
                stop.set()
            done[worker] += 1

    threads = [Thread(target=work, args=(worker,), daemon=True) for worker in range(min(workers, len(items)))]
    try:
        _watch(threads, lambda: sum(done), advance)
    except BaseException:
        stop.set()
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    causes = {at: error for at, error in errors.items() if not isinstance(error, Stopped)} or errors
    if causes:
        raise causes[min(causes)]


def _watch(threads: Sequence[Thread], done: Callable[[], int], advance: Callable[[int], None]) -> None:
    """Start threads, wait for their end and tell how far they are; the wait is short, so that signals are heard."""
    told = 0
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(_WAKE)
            told, before = done(), told
            if told > before:
                advance(told - before)
    if done() > told:
        advance(done() - told)
