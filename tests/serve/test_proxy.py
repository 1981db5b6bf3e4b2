"""The router as a proxy over real sockets: streams, callers that leave, a server that dies and comes back."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fake_upstream import FakeUpstream, StubRouter, made_adapters

from mediator_cli.errors import BundleError
from mediator_cli.serve.router import proxy as proxies
from mediator_cli.serve.router.forward import Forward, Patience, failure, make_client, one_hop_less
from mediator_cli.serve.router.proxy import Upstream, make_proxy, shown

CHAT = "/v1/chat/completions"


def bound(port: int = 0) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", port))
    return found


@contextmanager
def listening(app: Any, port: int = 0) -> Iterator[int]:
    """Serve an application on loopback from a thread."""
    sock = bound(port)
    config = uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        _until(lambda: server.started)
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


def _until(is_so: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    # Renaming works on dataclasses, and the stub is one; its routing is in the prompts.
    monkeypatch.setattr(proxies, "open_router", lambda folder: StubRouter())
    monkeypatch.setattr(proxies, "_renamed", lambda router, upstream: router)


@contextmanager
def proxied(port: int, **fields: Any) -> Iterator[httpx.Client]:
    app = make_proxy(Path("router"), Upstream(f"http://127.0.0.1:{port}", **fields))
    with listening(app) as own, httpx.Client(base_url=f"http://127.0.0.1:{own}", timeout=10, trust_env=False) as client:
        yield client


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], **fields}


def test_requests_go_through_with_their_headers_and_come_back() -> None:
    upstream = FakeUpstream()
    with listening(upstream) as port, proxied(port) as client:
        reply = client.post(CHAT, json=chat("a"), headers={"authorization": "Bearer k", "x-own": "1", "te": "trailers"})
        assert (reply.json()["model"], reply.headers["x-mediator-mixture"]) == ("expert-a", "a=1")
        seen = upstream.headers[-1]
        assert (seen["authorization"], seen["x-own"], seen["host"]) == ("Bearer k", "1", f"127.0.0.1:{port}")
        assert "te" not in seen
        assert [one["id"] for one in client.get("/v1/models").json()["data"]][:2] == ["auto", "dense"]
        assert client.post("/tokenize?x=1&y=%20", json={"model": "z"}).json()["model"] == "z"
        big = b'{"model":"z","x":"' + b"y" * 3_000_000 + b'"}'
        assert client.post("/v1/other", content=big).json()["body"]["x"] == "y" * 3_000_000


def test_streams_arrive_while_the_server_still_writes() -> None:
    upstream = FakeUpstream(pause=0.05)
    with listening(upstream) as port, proxied(port) as client:
        start = time.monotonic()
        with client.stream("POST", CHAT, json=chat("b", stream=True)) as reply:
            first = next(parts := reply.iter_raw())
            early = time.monotonic() - start
            assert reply.headers["x-mediator-mixture"] == "b=1"
            whole = first + b"".join(parts)
        assert whole == b"".join(FakeUpstream.parts("expert-b"))
        assert early < (time.monotonic() - start) / 2


def test_a_caller_that_leaves_is_no_longer_answered() -> None:
    upstream = FakeUpstream(pause=0.05)
    with listening(upstream) as port, proxied(port) as client:
        with client.stream("POST", CHAT, json=chat("b", stream=True)) as reply:
            next(reply.iter_raw())
        _until(lambda: upstream.n_gone == 1)
        assert client.post(CHAT, json=chat("a")).json()["model"] == "expert-a"


def test_a_server_that_dies_and_comes_back_is_used_again() -> None:
    with listening(FakeUpstream()) as port:
        pass
    with proxied(port) as client:
        reply = client.post(CHAT, json=chat("a"))
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.json()["error"]["code"] == "upstream_down"
        assert client.get("/health").status_code == 503
        for _ in range(2):
            with listening(FakeUpstream(), port):
                assert client.get("/health").json() == {
                    "status": "ok",
                    "router": {"experts": ["a", "b"], "features": "text"},
                    "upstream": {"url": f"http://127.0.0.1:{port}", "status": "ok"},
                }
                assert client.post(CHAT, json=chat("a")).json()["model"] == "expert-a"
            assert client.post(CHAT, json=chat("a")).status_code == 503
        counts = client.get("/metrics").text
        assert 'mediator_upstream_failures_total{kind="connect"} 3.0' in counts
        assert f'mediator_requests_total{{endpoint="{CHAT}",model="auto",status="200"}} 2.0' in counts


def test_a_stream_that_breaks_off_says_so() -> None:
    upstream = FakeUpstream(breaks_after=2)
    with listening(upstream) as port, proxied(port) as client:
        with client.stream("POST", CHAT, json=chat("b", stream=True)) as reply:
            lines = reply.read().decode().strip().split("\n\n")
        assert [line.encode() + b"\n\n" for line in lines[:2]] == FakeUpstream.parts("expert-b")[:2]
        assert json.loads(lines[2].removeprefix("data: "))["error"]["code"] == "upstream_broken"
        assert len(lines) == 3


def test_many_callers_get_their_own_answers_and_some_leave() -> None:
    upstream = FakeUpstream(pause=0.001)

    async def one(client: httpx.AsyncClient, at: int) -> None:
        text, model = [("a", "expert-a"), ("b", "expert-b"), ("dense", "dense")][at % 3]
        async with client.stream("POST", CHAT, json=chat(text, stream=True, mark=at)) as reply:
            assert reply.status_code == 200
            parts = reply.aiter_raw()
            first = await anext(parts)
            assert json.loads(first.split(b"\n")[0].removeprefix(b"data: "))["model"] == model
            if at % 5:
                whole = first + b"".join([part async for part in parts])
                assert whole == b"".join(FakeUpstream.parts(model))

    async def all_of_them(url: str) -> None:
        limits = httpx.Limits(max_connections=24)
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False, limits=limits) as client:
            await asyncio.gather(*(one(client, at) for at in range(60)))

    with listening(upstream) as port, proxied(port) as client:
        asyncio.run(all_of_them(str(client.base_url)))
        assert client.post(CHAT, json=chat("a")).json()["model"] == "expert-a"
    assert sorted(body["mark"] for body in upstream.bodies if "mark" in body) == list(range(60))


def test_a_silent_server_is_given_up() -> None:
    silent = bound()
    silent.listen()
    with proxied(silent.getsockname()[1], patience=Patience(silence=0.1)) as client:
        reply = client.post(CHAT, json=chat("a"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "upstream_silent")
    silent.close()


def test_mixtures_are_loaded_through_the_proxy(tmp_path: Path) -> None:
    upstream = FakeUpstream()
    adapters = made_adapters(tmp_path)
    with listening(upstream) as port, proxied(port, mixtures="grid", adapters=adapters, built=tmp_path) as client:
        reply = client.post(CHAT, json=chat("a=0.5,b=0.5"))
        assert reply.json()["model"] == upstream.loads[0]["lora_name"]
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "y"}).status_code == 403


def test_llama_cpp_behind_the_proxy_gets_scales() -> None:
    upstream = FakeUpstream(llama=[{"id": 3, "path": "expert-a.gguf"}, {"id": 5, "path": "expert-b.gguf"}])
    with listening(upstream) as port, proxied(port, kind="llama.cpp") as client:
        reply = client.post(CHAT, json=chat("a=0.6,b=0.4"))
        assert reply.json()["body"]["lora"] == [{"id": 3, "scale": 0.6}, {"id": 5, "scale": 0.4}]
    with proxied(port, kind="llama.cpp") as client:
        reply = client.post(CHAT, json=chat("a"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "upstream_down")


def test_failures_are_told_apart() -> None:
    found = {type(error).__name__: failure(error) for error in (
        httpx.PoolTimeout(""), httpx.ConnectError("refused"), httpx.ConnectTimeout(""), httpx.ReadTimeout(""),
        httpx.ReadError("reset"), httpx.RemoteProtocolError("closed"),
    )}  # fmt: skip
    assert {name: (kind, error.status_code) for name, (kind, error) in found.items()} == {
        "PoolTimeout": ("busy", 503), "ConnectError": ("connect", 503), "ConnectTimeout": ("connect", 503),
        "ReadTimeout": ("silence", 504), "ReadError": ("broken", 502), "RemoteProtocolError": ("broken", 502),
    }  # fmt: skip


def test_headers_of_one_hop_stay_there() -> None:
    kept = one_hop_less([(b"Connection", b"X-Own, close"), (b"X-Own", b"1"), (b"Upgrade", b"h2c"), (b"Accept", b"a")])
    assert kept == [(b"accept", b"a")]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(BundleError, match="is no URL"):
        make_proxy(Path("router"), Upstream(url))


def test_paths_and_passwords_of_the_url() -> None:
    proxy = make_proxy(Path("router"), Upstream("http://user:secret@127.0.0.1:9/v1/"))
    assert shown(proxy.client.base_url) == "http://127.0.0.1:9"
    with suppress(AttributeError):
        asyncio.run(proxy.client.aclose())
    client = make_client("http://127.0.0.1:9/below", Patience())
    assert isinstance(Forward(client).client, httpx.AsyncClient)


@pytest.mark.slow
def test_ten_thousand_requests_of_all_kinds_leave_nothing_behind() -> None:
    upstream = FakeUpstream()
    with listening(upstream) as port:
        app = make_proxy(Path("router"), Upstream(f"http://127.0.0.1:{port}"))
        with listening(app) as own:
            url = f"http://127.0.0.1:{own}"
            asyncio.run(_rounds(url, 1000))
            upstream.bodies.clear(), upstream.raw.clear(), upstream.headers.clear()
            before, objects = _resident(), len(gc.get_objects())
            for _ in range(10):
                asyncio.run(_rounds(url, 1000))
                upstream.bodies.clear(), upstream.raw.clear(), upstream.headers.clear()
            grown, more = _resident() - before, len(gc.get_objects()) - objects
            _until(lambda: app.running.n == 0)
            assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    # One object left by each request would be 10,000; memory that Python keeps for its next use goes up and down.
    assert more < 3000
    assert grown < 96 << 20


async def _rounds(url: str, n: int) -> None:
    turns = asyncio.Semaphore(16)

    async def one(at: int) -> None:
        async with turns:
            await _one_of_a_kind(client, at)

    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
        await asyncio.gather(*(one(at) for at in range(n)))


async def _one_of_a_kind(client: httpx.AsyncClient, at: int) -> None:
    text, model = [("a", "expert-a"), ("b", "expert-b"), ("dense", "dense")][at % 3]
    kind = at % 7
    if kind == 0:
        async with client.stream("POST", CHAT, json=chat(text, stream=True)) as reply:
            assert json.loads((await anext(reply.aiter_lines())).removeprefix("data: "))["model"] == model
        return
    wrong = {
        1: b"{no json",
        2: b'{"model": "auto", "x": "' + b"y" * (5 << 20) + b'"}',
        3: json.dumps(chat("too long")).encode(),
    }
    if kind in wrong and (kind != 2 or at % 49 == 2):
        with suppress(httpx.WriteError, httpx.ReadError):
            reply = await client.post(CHAT, content=wrong[kind])
            assert reply.status_code == {1: 400, 2: 413, 3: 400}[kind]
            assert reply.json()["error"]["message"]
        return
    reply = await client.post(CHAT, json=chat(text, model="a=1,zz=1" if kind == 4 else "auto", mark=at))
    assert reply.status_code == (404 if kind == 4 else 200)
    assert kind == 4 or (reply.json()["model"], reply.json()["body"]["mark"]) == (model, at)


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
