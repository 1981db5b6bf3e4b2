"""The router before an application in the same process: what it rewrites, what it leaves alone, what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fake_upstream import FakeUpstream, StubRouter, call, made_adapters
from prometheus_client import CollectorRegistry, generate_latest
from safetensors.numpy import load_file

from mediator_cli.errors import BundleError
from mediator_cli.serve.router.environment import front_from_environment
from mediator_cli.serve.router.front import Front
from mediator_cli.serve.router.grid import make_grid, name_of, nearest, points
from mediator_cli.serve.router.low_rank import concatenate, gram, open_adapter, safe_rank
from mediator_cli.serve.router.meter import make_meter
from mediator_cli.serve.router.middleware import RouterMiddleware
from mediator_cli.serve.router.targets import Scales, TopOne

CHAT = "/v1/chat/completions"


def front(**fields: Any) -> Front:
    router = StubRouter()
    return Front(router, **{"target": TopOne("dense", router.models), **fields})


def chat(text: str, model: str = "auto", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


async def ask(app: Any, body: Any, path: str = CHAT, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return await client.post(path, content=content, headers=headers, **options)


def answer(body: Any, path: str = CHAT, **fields: Any) -> tuple[httpx.Response, FakeUpstream]:
    upstream = FakeUpstream()
    return asyncio.run(ask(RouterMiddleware(upstream, front(**fields)), body, path)), upstream


@pytest.mark.parametrize(
    ("text", "model", "mixture", "wanted"),
    [
        ("a", "expert-a", "a=1", None),
        ("b", "expert-b", "b=1", None),
        ("dense", "dense", "dense", None),
        ("a=0.6,b=0.4", "dense", "dense", "a=0.6,b=0.4"),
        ("a=0.2,b=0.8", "expert-b", "b=1", "a=0.2,b=0.8"),
    ],
)
def test_the_sure_expert_answers_and_else_the_dense_one(
    text: str, model: str, mixture: str, wanted: str | None
) -> None:
    reply, upstream = answer(chat(text, temperature=0.5, extra={"kept": [1, None]}))
    assert reply.json()["model"] == model
    assert upstream.bodies == [chat(text, model, temperature=0.5, extra={"kept": [1, None]})]
    assert reply.headers["x-mediator-mixture"] == mixture
    assert reply.headers["x-mediator-uncertainty"] == "0.25"
    assert reply.headers.get("x-mediator-wanted") == wanted


def test_prompts_are_routed_as_texts_and_as_tokens() -> None:
    for prompt in ("b", [2], ["b"], [[2]], ["b", "b"]):
        assert answer({"model": "auto", "prompt": prompt}, "/v1/completions")[0].json()["model"] == "expert-b"
    differ, upstream = answer({"model": "auto", "prompt": ["a", "b"]}, "/v1/completions")
    assert (differ.status_code, differ.json()["error"]["param"]) == (400, "prompt")
    assert upstream.bodies == []
    for nothing in ("", [], 3, None, {"x": 1}, [[-1]], [True]):
        assert answer({"model": "auto", "prompt": nothing}, "/v1/completions")[0].json()["model"] == "dense"


def test_all_else_passes_byte_for_byte() -> None:
    for body in (
        b'{"model": "other",  "x": 1}',
        b"{not json",
        b"[1]",
        b'"auto"',
        b"",
        b'{"model": ["auto"]}',
        b"\xff\xfe",
    ):
        reply, upstream = answer(body)
        assert upstream.raw == [body]
        assert reply.status_code == (200 if body.startswith(b'{"model": "other"') else 400)
        assert "x-mediator-mixture" not in reply.headers
    _, upstream = answer(json.dumps(chat("a")).encode(), "/v1/embeddings")
    assert upstream.raw == [json.dumps(chat("a")).encode()]


def test_who_is_asked_can_be_said() -> None:
    def model(name: str, **fields: Any) -> str:
        return str(answer(chat("b", name, **fields))[0].json()["model"])

    assert [model("a"), model("dense"), model("a=0.9,b=0.1"), model("a=1")] == [
        "expert-a",
        "dense",
        "expert-a",
        "expert-a",
    ]
    assert model("auto", mediator={"mixture": {"a": 1.0}}) == "expert-a"
    assert model("expert-a") == "expert-a"
    for name, fields, status, param in [
        ("a=1,c=2", {}, 404, "model"),
        ("a=", {}, 404, "model"),
        ("auto", {"mediator": {"mixture": {"c": 1.0}}}, 400, "mediator.mixture"),
        ("a", {"mediator": {"mixture": {"b": 1.0}}}, 400, "mediator.mixture"),
        ("auto", {"mediator": {"route": "never"}}, 400, "mediator.route"),
        ("auto", {"mediator": {"other": 1}}, 400, "mediator.other"),
        ("auto", {"mediator": 3}, 400, "mediator"),
    ]:
        reply, upstream = answer(chat("b", name, **fields))
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
        assert upstream.bodies == []


def test_our_field_never_reaches_the_server() -> None:
    for name in ("auto", "other", "a"):
        _, upstream = answer(chat("b", name, mediator={"route": "turn"}))
        assert list(upstream.bodies[0]) == ["model", "messages"]


def test_a_conversation_can_keep_the_expert_of_its_first_turn() -> None:
    turns = [("system", "b"), ("user", "a"), ("assistant", "x"), ("user", "b")]
    body = {"model": "auto", "messages": [{"role": role, "content": text} for role, text in turns]}
    assert answer(body)[0].json()["model"] == "expert-b"
    assert answer(body | {"mediator": {"route": "conversation"}})[0].json()["model"] == "expert-a"
    assert answer(body, pin=True)[0].json()["model"] == "expert-a"
    assert answer(body | {"mediator": {"route": "turn"}}, pin=True)[0].json()["model"] == "expert-b"


def test_contents_of_many_forms_are_read_as_text() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "b"}]
    assert answer({"model": "auto", "messages": [{"role": "user", "content": parts}]})[0].json()["model"] == "expert-b"
    for odd in (None, [], [{"role": "user", "content": None}], [3], [{"role": 1, "content": {"a": 1}}], "x"):
        assert answer({"model": "auto", "messages": odd})[0].json()["model"] == "dense"
    assert answer(chat("\ud800"))[0].status_code == 200


def test_a_body_above_the_limit_is_refused_before_it_is_read() -> None:
    reply, upstream = answer(chat("a" * 200), max_body=100)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert upstream.bodies == []

    async def in_parts() -> httpx.Response:
        async def parts() -> Any:
            for _ in range(50):
                yield b"x" * 10

        app = RouterMiddleware(FakeUpstream(), front(max_body=100))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            return await client.post(CHAT, content=parts())

    assert asyncio.run(in_parts()).status_code == 413


def test_the_list_of_models_begins_with_auto() -> None:
    app = RouterMiddleware(FakeUpstream(), front())
    status, headers, parts = asyncio.run(call(app, "GET", "/v1/models"))
    listed = json.loads(b"".join(parts))
    assert [one["id"] for one in listed["data"]] == ["auto", "dense", "expert-a", "expert-b"]
    assert (status, listed["data"][0]["max_model_len"]) == (200, 512)
    assert int(headers["content-length"]) == len(b"".join(parts))


def test_streams_come_through_part_by_part() -> None:
    upstream = FakeUpstream()
    body = json.dumps(chat("a", stream=True)).encode()
    _, headers, parts = asyncio.run(call(RouterMiddleware(upstream, front()), "POST", CHAT, body))
    assert parts == upstream.parts("expert-a")
    assert headers["x-mediator-mixture"] == "a=1"


def test_many_at_once_get_their_own_answers() -> None:
    app = RouterMiddleware(FakeUpstream(), front())

    async def all_of_them() -> list[httpx.Response]:
        texts = [("a", "b", "dense")[at % 3] for at in range(120)]
        return await asyncio.gather(*(ask(app, chat(text, mark=at)) for at, text in enumerate(texts)))

    for at, reply in enumerate(asyncio.run(all_of_them())):
        assert reply.json()["model"] == ("expert-a", "expert-b", "dense")[at % 3]
        assert reply.json()["body"]["mark"] == at
        assert reply.headers["x-mediator-mixture"] == ("a=1", "b=1", "dense")[at % 3]


def test_what_the_router_cannot_read_is_told_as_the_callers_fault() -> None:
    reply, upstream = answer(chat("too long"))
    assert (reply.status_code, upstream.bodies) == (400, [])
    assert "is too long" in reply.json()["error"]["message"]


def test_requests_are_counted_by_who_answers() -> None:
    registry = CollectorRegistry()
    app = RouterMiddleware(FakeUpstream(), front(meter=make_meter(registry)))
    for text in ("a", "a", "b", "dense", "too long"):
        asyncio.run(ask(app, chat(text)))
    text = generate_latest(registry).decode()
    assert 'mediator_expert_share_total{expert="a"} 2.0' in text
    assert 'mediator_expert_share_total{expert="dense"} 1.0' in text
    assert "mediator_router_entropy_count 4.0" in text
    assert f'mediator_requests_total{{endpoint="{CHAT}",model="auto",status="200"}} 4.0' in text
    assert f'mediator_requests_total{{endpoint="{CHAT}",model="auto",status="400"}} 1.0' in text


def test_the_environment_says_what_to_do(routed_once: Any) -> None:
    router = {"MEDIATOR_ROUTER": str(routed_once)}
    made = front_from_environment(FakeUpstream(), router | {"MEDIATOR_PIN": "conversation", "MEDIATOR_MAX_BODY": "99"})
    assert (made.pin, made.max_body, made.target) == (True, 99, TopOne("dense", {"a": "a", "b": "b"}))
    for wrong, said in [
        ({}, "MEDIATOR_ROUTER: is not set"),
        ({"MEDIATOR_ROUTER": "/nowhere"}, "no such folder"),
        (router | {"MEDIATOR_MIXTURES": "all"}, "'all' is not known"),
        (router | {"MEDIATOR_MAX_BODY": "-1"}, "'-1' is not a number above zero"),
        (router | {"MEDIATOR_MIXTURES": "grid", "MEDIATOR_ADAPTERS": "/nowhere"}, "/nowhere"),
    ]:
        with pytest.raises(BundleError, match=said):
            front_from_environment(FakeUpstream(), wrong)


# Mixtures on a grid.


def test_the_grid_has_what_it_says() -> None:
    assert len(points(4, 0.25)) == 1 + 4 * 4 + 6 * 6
    found = points(3, 0.25)
    assert ((found > 0).sum(axis=1) <= 2).all()
    assert (found.sum(axis=1) <= 1).all()
    assert len(np.unique(found, axis=0)) == len(found)


def test_the_nearest_mixture_is_that_of_a_search_over_whole_deltas() -> None:
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=(3, 40)) + rng.normal(size=40)
    for _ in range(30):
        p = rng.dirichlet(np.ones(3))
        rounded, error = nearest(p, deltas @ deltas.T, 0.25)
        distances = [np.linalg.norm((p - q) @ deltas) for q in points(3, 0.25)]
        assert np.linalg.norm((p - rounded) @ deltas) == pytest.approx(min(distances))
        assert error == pytest.approx(min(distances) / np.linalg.norm(p @ deltas))
    assert nearest(np.array([0.75, 0.0, 0.25]), deltas @ deltas.T, 0.25)[0].tolist() == [0.75, 0.0, 0.25]


def test_a_concatenated_adapter_is_the_sum(tmp_path: Any) -> None:
    folder = made_adapters(tmp_path, ranks=(3, 4))
    parts = [(open_adapter(folder / "expert-a"), 0.75), (open_adapter(folder / "expert-b"), 0.25)]
    concatenate(parts, tmp_path / "built")
    built = open_adapter(tmp_path / "built")
    assert (built.config["r"], built.config["lora_alpha"], built.scale) == (8, 8, 1.0)
    modules = {module for adapter, _ in parts for module in adapter.factors}
    assert set(built.factors) == modules
    for module in modules:
        expected = sum(
            weight * adapter.scale * adapter.read(module)[1] @ adapter.read(module)[0]
            for adapter, weight in parts
            if module in adapter.factors
        )
        a, b = built.read(module)
        assert a.shape[0] == b.shape[1] == 8
        np.testing.assert_allclose(b @ a, expected, atol=1e-6)


def test_inner_products_are_those_of_whole_deltas(tmp_path: Any) -> None:
    folder = made_adapters(tmp_path, ranks=(2, 3))
    opened = [open_adapter(folder / name) for name in ("expert-a", "expert-b")]
    modules = sorted({module for adapter in opened for module in adapter.factors})
    whole = np.zeros((2, 2))
    for module in modules:
        deltas = [x.scale * x.read(module)[1] @ x.read(module)[0] if module in x.factors else None for x in opened]
        for i, one in enumerate(deltas):
            for j, other in enumerate(deltas):
                whole[i, j] += 0.0 if one is None or other is None else float((one * other).sum())
    np.testing.assert_allclose(gram(opened), whole, rtol=1e-5)


def test_names_tell_contents_apart(tmp_path: Any) -> None:
    one, other = (made_adapters(tmp_path / name, ranks=(2, 2), seed=seed) for name, seed in (("x", 0), ("y", 1)))

    def name(folder: Any, a: float, b: float) -> str:
        return name_of(
            {"a": a, "b": b}, [(open_adapter(folder / "expert-a"), a), (open_adapter(folder / "expert-b"), b)]
        )

    names = [name(one, 0.75, 0.25), name(one, 0.5, 0.5), name(other, 0.75, 0.25)]
    assert len(set(names)) == 3
    assert name(one, 0.75, 0.25) == names[0]
    assert [safe_rank(rank) for rank in (1, 8, 9, 300)] == [8, 8, 16, 320]
    with pytest.raises(BundleError, match="more than the 512"):
        safe_rank(513)


@dataclass
class Gridded:
    """A server that loads adapters, and the router before it."""

    upstream: FakeUpstream
    app: RouterMiddleware
    headers: list[Mapping[str, str]] = field(default_factory=list)

    async def ask(self, text: str) -> httpx.Response:
        return await ask(self.app, chat(text), headers={"authorization": "Bearer k"})


async def with_grid(tmp_path: Any, work: Callable[[Gridded], Any], most: int = 2, **options: Any) -> None:
    upstream = FakeUpstream(**options)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(upstream), base_url="http://server")
    grid = make_grid(TopOne("dense", StubRouter.models), made_adapters(tmp_path), client, built=tmp_path, most=most)
    await work(Gridded(upstream, RouterMiddleware(upstream, front(target=grid, closed=grid.paths))))


def test_a_mixture_is_built_once_loaded_once_and_asked_by_its_name(tmp_path: Any) -> None:
    async def work(it: Gridded) -> None:
        replies = await asyncio.gather(*(it.ask("a=0.7,b=0.3") for _ in range(8)))
        names = {reply.json()["model"] for reply in replies}
        assert len(names) == len(it.upstream.loads) == 1
        assert names == {it.upstream.loads[0]["lora_name"]}
        assert replies[0].headers["x-mediator-mixture"] == "a=0.75,b=0.25"
        assert replies[0].headers["x-mediator-wanted"] == "a=0.7,b=0.3"
        assert 0 < float(replies[0].headers["x-mediator-error"]) < 0.2
        assert set(it.upstream.keys) == {"Bearer k"}
        assert (await it.ask("a=0.95,b=0.05")).json()["model"] == "expert-a"
        assert (await it.ask("dense")).json()["model"] == "dense"
        assert len(it.upstream.loads) == 1

    asyncio.run(with_grid(tmp_path, work))


def test_the_longest_unused_mixture_goes_first_and_comes_back_under_its_own_name(tmp_path: Any) -> None:
    async def work(it: Gridded) -> None:
        texts = ["a=0.75,b=0.25", "a=0.5,b=0.5", "a=0.75,b=0.25", "a=0.25,b=0.75", "a=0.5,b=0.5"]
        names = [(await it.ask(text)).json()["model"] for text in texts]
        assert names[0] == names[2]
        assert names[1] == names[4]
        assert [body["lora_name"] for body in it.upstream.unloads] == [names[1], names[0]]
        assert sorted(it.upstream.adapters) == sorted(["expert-a", "expert-b", names[3], names[1]])
        contents = [body["digest"] for body in it.upstream.loads if body["lora_name"] == names[1]]
        assert len(contents) == 2
        assert contents[0] == contents[1]

    asyncio.run(with_grid(tmp_path, work))


def test_a_server_that_has_lost_a_mixture_gets_it_again_unseen(tmp_path: Any) -> None:
    async def work(it: Gridded) -> None:
        name = (await it.ask("a=0.5,b=0.5")).json()["model"]
        it.upstream.adapters.discard(name)
        reply = await it.ask("a=0.5,b=0.5")
        assert (reply.status_code, reply.json()["model"]) == (200, name)
        assert len(it.upstream.loads) == 2

    asyncio.run(with_grid(tmp_path, work))


def test_one_expert_or_the_dense_one_answers_where_nothing_can_be_loaded(tmp_path: Any) -> None:
    async def work(it: Gridded) -> None:
        reply = await it.ask("a=0.5,b=0.5")
        assert (reply.json()["model"], reply.headers["x-mediator-mixture"]) == ("dense", "dense")
        assert (await it.ask("a=0.2,b=0.8")).json()["model"] == "expert-b"
        assert reply.headers["x-mediator-wanted"] == "a=0.5,b=0.5"

    asyncio.run(with_grid(tmp_path, work, refuses_to_load=True))


def test_nobody_else_loads_adapters(tmp_path: Any) -> None:
    async def work(it: Gridded) -> None:
        reply = await ask(it.app, {"lora_name": "x", "lora_path": "/etc"}, "/v1/load_lora_adapter")
        assert (reply.status_code, it.upstream.loads) == (403, [])

    asyncio.run(with_grid(tmp_path, work))


# llama.cpp's scales.


def test_llama_cpp_gets_every_adapters_scale() -> None:
    async def work() -> None:
        upstream = FakeUpstream(llama=[{"id": 0, "path": "x/expert-b.gguf"}, {"id": 1, "path": "expert-a.gguf"}])
        client = httpx.AsyncClient(transport=httpx.ASGITransport(upstream), base_url="http://server")
        app = RouterMiddleware(upstream, front(target=Scales(client, StubRouter.models)))
        reply = await ask(app, chat("a=0.7,b=0.3"))
        assert upstream.bodies[-1]["lora"] == [{"id": 1, "scale": 0.7}, {"id": 0, "scale": 0.3}]
        assert reply.headers["x-mediator-mixture"] == "a=0.7,b=0.3"
        assert "x-mediator-wanted" not in reply.headers
        await ask(app, chat("dense"))
        assert {one["scale"] for one in upstream.bodies[-1]["lora"]} == {0.0}
        upstream.llama.pop()
        client_2 = SimpleNamespace(target=Scales(client, StubRouter.models))
        missing = await ask(RouterMiddleware(upstream, front(target=client_2.target)), chat("a"))
        assert (missing.status_code, missing.json()["error"]["code"]) == (503, "no_adapter")

    asyncio.run(work())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ],
)
def test_adapters_that_are_more_than_factors_are_refused(tmp_path: Any, change: dict[str, Any], said: str) -> None:
    folder = made_adapters(tmp_path) / "expert-a"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(BundleError, match=said):
        open_adapter(folder)
    assert load_file(folder / "adapter_model.safetensors")
