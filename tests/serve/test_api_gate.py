"""What every request passes: key, sizes, ids, shutdown, counts, the log; and no failure without an error body."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator

import httpx
import pytest
from fake_engine import EXPERTS, FakeEngine, Running, fake_served, serving, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mediator_cli.errors import OutputError
from mediator_cli.serve.api.errors import ApiError
from mediator_cli.serve.api.settings import Life, Settings
from mediator_cli.serve.app import make_app
from mediator_cli.serve.listen import bind, is_local, url_of

CHAT = "/v1/chat/completions"
BODY = {"model": "auto", "messages": [{"role": "user", "content": "two plus three"}], "max_tokens": 2}
KEY = "sesame-42"
PAGE = "http://friend.example"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakeEngine(), max_body=2000) as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(FakeEngine(), api_key=KEY, origins=(PAGE,)) as running:
        yield running


def error_of(reply: httpx.Response) -> dict:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"]
    return error


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"])
def test_without_the_key_nothing_is_told(locked: Running, given: str | None) -> None:
    headers = {"authorization": given.encode()} if given else {}
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json")):
        reply = locked.client.request(method, path, headers=headers)
        assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert KEY not in reply.text


def test_with_the_key_all_is_told_and_health_and_page_need_none(locked: Running) -> None:
    for word in ("Bearer", "bearer"):
        headers = {"authorization": f"{word} {KEY}"}
        assert locked.client.post(CHAT, json=BODY, headers=headers).status_code == 200
    assert locked.client.get("/metrics", headers=headers).status_code == 200
    assert locked.client.get("/health").json() == {"status": "ok", "needs_key": True}
    assert locked.client.get("/").status_code == 200
    assert KEY not in repr(Settings(api_key=KEY))


def test_metrics_may_be_open() -> None:
    with serving(FakeEngine(), api_key=KEY, open_metrics=True) as server:
        assert server.client.get("/metrics").status_code == 200
        assert server.client.get("/v1/models").status_code == 401


def test_pages_of_others_ask_only_where_they_may(locked: Running, server: Running) -> None:
    asks = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert locked.client.options(CHAT, headers=asks).headers["access-control-allow-origin"] == PAGE
    reply = locked.client.post(CHAT, json=BODY, headers={"origin": PAGE, "authorization": f"Bearer {KEY}"})
    assert "x-mediator-mixture" in reply.headers["access-control-expose-headers"]
    assert locked.client.post(CHAT, headers={"origin": PAGE}).headers["access-control-allow-origin"] == PAGE
    stranger = locked.client.options(CHAT, headers=asks | {"origin": "http://stranger.example"})
    assert "access-control-allow-origin" not in stranger.headers
    closed = server.client.options(CHAT, headers=asks)
    assert closed.status_code == 405
    assert not [name for name in closed.headers if name.startswith("access-control")]


def test_bodies_that_are_too_large_are_refused_told_or_not(server: Running) -> None:
    large = json.dumps(BODY | {"user": "x" * 2000}).encode()
    headers = {"content-type": "application/json"}
    for content in (large, iter([large[:1500], large[1500:]])):
        reply = server.client.post(CHAT, content=content, headers=headers)
        assert (reply.status_code, error_of(reply)["code"]) == (413, "body_too_large")
    assert server.client.post(CHAT, json=BODY).status_code == 200


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"messages": NaN}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 1900, "recursion"),
        (b"[]", "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not valid JSON"),
    ],
)
def test_what_is_no_json_object_is_400(server: Running, body: bytes, what: str) -> None:
    reply = server.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (400, "invalid_json")
    assert what in error["message"]


def test_other_types_of_content_are_415(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = server.client.post(CHAT, content=json.dumps(BODY), headers={"content-type": kind})
        assert reply.status_code == 415
        assert "application/json" in error_of(reply)["message"]
    good = server.client.post(
        CHAT, content=json.dumps(BODY), headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert good.status_code == 200


def test_wrong_paths_methods_and_models_are_told_with_a_suggestion(server: Running) -> None:
    reply = server.client.post("/v1/chat/completion", json=BODY)
    assert (reply.status_code, error_of(reply)["message"]) == (
        404, "nothing at /v1/chat/completion; did you mean '/v1/chat/completions'?",
    )  # fmt: skip
    reply = server.client.get(CHAT)
    assert (reply.status_code, reply.headers["allow"], error_of(reply)["code"]) == (405, "POST", "method_not_allowed")
    reply = server.client.get("/v1/models/film")
    assert (reply.status_code, error_of(reply)["message"]) == (404, "no model 'film'; did you mean 'films'?")


def test_models_tell_their_parents(server: Running) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert {entry["id"]: entry["parent"] for entry in listed["data"]} == {
        "auto": None, **dict.fromkeys(EXPERTS, "dense"), "dense": None,
    }  # fmt: skip
    for entry in listed["data"]:
        assert server.client.get(f"/v1/models/{entry['id']}").json() == entry
        assert (entry["object"], entry["owned_by"], entry["created"]) == ("model", "mediator", 7)
        assert (entry["root"], entry["max_model_len"]) == ("tales", 64)
        assert entry["description"]


def test_a_request_keeps_the_id_it_came_with_where_that_is_sound(server: Running) -> None:
    def given(value: str) -> str:
        return server.client.get("/health", headers={"x-request-id": value}).headers["x-request-id"]

    assert given("trace-7.b") == "trace-7.b"
    for bad in ("a b", "x" * 65, "<b>", ""):
        assert len(given(bad)) == 32


def test_while_stopping_nothing_new_is_taken_and_health_says_so(server: Running) -> None:
    server.life.is_draining = True
    try:
        reply = server.client.post(CHAT, json=BODY)
        assert (reply.status_code, error_of(reply)["code"], reply.headers["retry-after"]) == (503, "draining", "1")
        reply = server.client.get("/health")
        assert (reply.status_code, reply.json()["status"]) == (503, "draining")
    finally:
        server.life.is_draining = False
    server.engine.is_alive = False
    try:
        reply = server.client.get("/health")
        assert (reply.status_code, reply.json()["status"]) == (503, "dead")
    finally:
        server.engine.is_alive = True


def counts(server: Running) -> dict[str, float]:
    lines = server.client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_metrics_count_requests_tokens_times_and_shares() -> None:
    with serving(FakeEngine()) as server:
        for _ in range(3):
            server.client.post(CHAT, json=BODY)
        server.client.post("/v1/completions", json={"model": "films=2,maths=-1", "prompt": "two", "max_tokens": 1})
        server.client.post(CHAT, json=BODY | {"model": "nobody"})
        for at in range(5):
            server.client.get(f"/v1/secret{at}")
        until(lambda: len(server.told) == 10)
        found = counts(server)
    label = 'mediator_requests_total{{endpoint="{}",model="{}",status="{}"}}'
    assert found[label.format(CHAT, "auto", 200)] == 3
    assert found[label.format("/v1/completions", "mixture", 200)] == 1
    assert found[label.format(CHAT, "none", 404)] == 1
    assert found[label.format("other", "none", 404)] == 5
    assert found['mediator_expert_share_total{expert="maths"}'] == 0.75
    assert found['mediator_expert_share_total{expert="films"}'] == 3 * 0.75 + 2
    assert found["mediator_router_entropy_count"] == 3
    assert found["mediator_router_entropy_sum"] == 0.375
    assert found["mediator_router_outside_total"] == 3
    assert found["mediator_time_to_first_token_seconds_count"] == 4
    assert found["mediator_time_per_output_token_seconds_count"] == 3
    engine = {"prompt_tokens_total": 100, "cached_tokens_total": 40, "answer_tokens_total": 70, "passes_total": 9,
              "running": 2, "waiting": 0, "mixtures_held": 3, "mixture_bytes": 4096, "prefix_bytes": 1024,
              "prefix_entries": 5, "engine_up": 1}  # fmt: skip
    assert {name: found[f"mediator_{name}"] for name in engine} == engine


def test_the_log_tells_who_asked_whom_and_nothing_of_what_was_said() -> None:
    with serving(FakeEngine()) as server:
        server.client.post(CHAT, json=BODY)
        server.client.post(CHAT + "?key=secret", json=BODY | {"model": "films"})
        server.client.get("/a%0Ab%1b[31m")
        # A reply reaches its client before the log hears of it.
        until(lambda: len(server.told) == 3)
    one, two, three = server.told
    assert (one.method, one.path, one.status, one.model, one.mixture) == (
        "POST", CHAT, 200, "auto", "maths=0.25,films=0.75",
    )  # fmt: skip
    assert (two.path, two.model, two.mixture) == (CHAT, "films", "films=1")
    assert (three.path, three.status) == ("/a\\nb\\x1b[31m", 404)
    assert one.milliseconds > 0


class Broken(FakeEngine):
    """An engine with a defect."""

    def submit(self, request: object, deliver: object) -> None:
        raise ZeroDivisionError("secret detail")


def test_a_defect_is_500_with_an_id_and_no_detail(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Broken()) as server:
        reply = server.client.post(CHAT, json=BODY, headers={"x-request-id": "me-1"})
    error = error_of(reply)
    assert (reply.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "me-1" in error["message"]
    assert "secret" not in reply.text
    assert "secret detail" in caplog.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["auto", "films", "user", "maths=0.5,films=0.5", "turn"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
FIELDS = (
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "stream", "stream_options",
    "stop", "seed", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "logit_bias", "user",
    "ignore_eos", "mediator", "echo", "best_of", "tools", "response_format",
)  # fmt: skip
GOOD = {
    "temperature": st.floats(0, 2),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "max_tokens": st.integers(0, 60),
    "logprobs": st.booleans() | st.integers(0, 20),
    "logit_bias": st.dictionaries(st.integers(-1, 25).map(str), st.floats(-100, 100)),
    "mediator": st.fixed_dictionaries(
        {}, optional={"mixture": st.dictionaries(st.sampled_from([*EXPERTS, "x"]), JSON), "route": JSON}
    ),
    "model": st.sampled_from(["auto", "films", "dense", "maths=1e400", "maths=-5", "=", ",", "films=1,maths=2"]),
    "seed": st.integers(-(2**70), 2**70),
    "echo": st.booleans(),
    "top_logprobs": st.integers(0, 20),
}
BODIES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "messages": st.just(BODY["messages"]) | JSON | st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": st.text()})
            ),
            "prompt": st.sampled_from(["two", [5], ["two", "plus"], [[5], [6, 7]]]) | JSON,
        },
        optional={name: GOOD.get(name, JSON) | JSON for name in FIELDS},
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def post() -> Iterator[Callable[[str, object], httpx.Response]]:
    app = make_app(FakeEngine(), fake_served(), Settings(), Life())
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=True), base_url="http://test")
    headers = {"content-type": "application/json"}
    with asyncio.Runner() as runner:
        yield lambda path, body: runner.run(client.post(path, content=json.dumps(body), headers=headers))
        runner.run(client.aclose())


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(body=BODIES, path=st.sampled_from([CHAT, "/v1/completions", "/v1/route"]))
def test_whatever_the_body_there_is_an_answer_or_an_error_that_says_why(
    post: Callable[[str, object], httpx.Response], body: object, path: str
) -> None:
    reply = post(path, body)
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code == 200:
        assert reply.text.endswith("data: [DONE]\n\n") or reply.json()["object"]
    else:
        assert error_of(reply)["message"]


def test_an_address_is_taken_once_and_told(server: Running) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(OutputError, match="already in use"):
        bind("127.0.0.1", port)
    with pytest.raises(OutputError, match="is no port"):
        bind("127.0.0.1", 70000)
    with pytest.raises(OutputError, match="cannot listen at nowhere"):
        bind("nowhere.invalid", 0)
    with bind("127.0.0.1", 0) as sock:
        assert is_local(sock)
        assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        assert not is_local(sock)
        assert url_of(sock).startswith("http://127.0.0.1:")


def test_errors_have_types_that_clients_know() -> None:
    found = {status: ApiError(status, "x").body()["error"]["type"] for status in (400, 401, 404, 413, 429, 500, 503)}
    assert found == {
        400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error",
        413: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error",
    }  # fmt: skip
