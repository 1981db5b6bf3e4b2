"""Servers on this machine: started for as long as they are asked, with the memory of all their processes."""

import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

START_SECONDS = 240.0


@contextmanager
def running(command: Sequence[str | Path], port: int, environment: Mapping[str, str]) -> Iterator[int]:
    """Run a server in a process group of its own until the block ends; give its process id once it is healthy."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_until_healthy(process, port)
            yield process.pid
        except Exception:
            log.seek(0)
            print(log.read()[-4000:].decode(errors="replace"))  # noqa: T201
            raise
        finally:
            _stop(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise TimeoutError(f"{process.args!r} did not answer")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        if _alive(process.pid):
            os.killpg(process.pid, number)
        until = time.monotonic() + seconds
        while _alive(process.pid) and time.monotonic() < until:
            process.poll()
            time.sleep(0.1)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def memory_of(pids: Sequence[int]) -> int:
    """Sum the memory of processes and all that they started, shared pages by their share, in bytes."""
    return sum(_pss(pid) for root in pids for pid in _tree(root))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text(encoding="ascii").split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


@contextmanager
def peak_memory(pids: Sequence[int]) -> Iterator[list[int]]:
    """Watch the memory of processes inside the block; the list holds the most at the end."""
    peak, over = [memory_of(pids)], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            peak[0] = max(peak[0], memory_of(pids))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
        peak[0] = max(peak[0], memory_of(pids))


@contextmanager
def all_running(
    commands: Sequence[tuple[Sequence[str | Path], int, Mapping[str, str]]],
) -> Iterator[list[int]]:
    """Run several servers at once."""
    with ExitStack() as stack:
        yield [stack.enter_context(running(*command)) for command in commands]
