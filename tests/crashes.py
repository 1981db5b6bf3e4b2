"""Runs `mediator` in a forked process that dies, or fails, at a chosen call to the operating system."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mediator_cli.cli.app import main

WRITES = (
    "pwrite",
    "posix_fallocate",
    "ftruncate",
    "fsync",
    "fdatasync",
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "rmdir",
)
"""All calls by which a merge changes the disk, but for small files, whose writes are followed by one of these."""


@dataclass(frozen=True)
class Ended:
    """How a forked command ended: exit code, or minus the signal; what it told; how many of the calls it made."""

    code: int
    err: str
    n_calls: int


@contextmanager
def at_call(number: int, act: Callable[[], None], names: Sequence[str] = WRITES) -> Iterator[Callable[[], int]]:
    """Act before the call of a number, from 1, among those to functions of `os`; gives how many were made."""
    real = {name: getattr(os, name) for name in names}
    turns, made = itertools.count(1), [0]

    def patched(name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            made[0] = turn = next(turns)
            if turn == number:
                act()
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(os, name, patched(name))
    try:
        yield lambda: made[0]
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def die() -> None:
    """End this process at once, as a power cut or `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_forked(
    folder: Path, words: Sequence[str], number: int = 0, act: Callable[[], None] = die, names: Sequence[str] = WRITES
) -> Ended:
    """Run `mediator` with some words in a folder, in a process of its own, and act before one of its calls."""
    told, calls = folder.parent / f"{folder.name}.err", folder.parent / f"{folder.name}.calls"
    calls.write_text("0")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_as_child(folder, words, told, calls, lambda: at_call(number, act, names)))
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), told.read_text(), int(calls.read_text()))


def _as_child(folder: Path, words: Sequence[str], told: Path, calls: Path, patched: Callable[[], object]) -> int:
    try:
        with told.open("w") as stream:
            sys.stderr, sys.stdout = stream, stream
            os.chdir(folder)
            sys.argv = ["mediator", *words]
            with patched() as made:  # type: ignore[attr-defined]
                code = _exit_code()
            calls.write_text(str(made()))
        return code
    except BaseException:  # noqa: BLE001 - nothing of the parent's may run in the child
        traceback.print_exc(file=sys.__stderr__)
        return 99


def _exit_code() -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 98
