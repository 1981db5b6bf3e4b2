"""Chats over HTTP: shapes, streams, routing that is told, errors; the engine is a fake one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest
from fake_engine import EXPERTS, FakeEngine, Running, answer_of, fake_served, serving, until
from tiny_tokens import WORDS, word_tokenizer

from mediator_cli.errors import Problem
from mediator_cli.serve.engine.request import Draw, Failed, Request

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "two plus three"}]
PROMPT = (3, 5, 7, 6, 4)
"""<|user|> two plus three <|bot|>: their sum is odd, so both experts answer."""


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Running]:
    with serving(engine) as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(engine: FakeEngine) -> Iterator[None]:
    engine.tickets.clear()
    yield
    engine.hold = engine.fails = None
    engine.is_full = engine.is_closed = engine.fails_late = False
    engine.is_alive = True


def words(tokens: list[int]) -> str:
    return "".join(f" {WORDS[token]}" for token in tokens)


def ask(server: Running, **fields: object) -> httpx.Response:
    return server.client.post(CHAT, json={"model": "auto", "messages": USER, "max_tokens": 3} | fields)


def refusal(reply: httpx.Response, status: int, param: str | None = None) -> str:
    error = reply.json()["error"]
    assert reply.status_code == status, reply.text
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert reply.headers["x-request-id"]
    return str(error["message"])


def test_a_whole_answer_has_the_fields_of_openai_and_tells_who_answered(server: Running) -> None:
    reply = ask(server)
    body = reply.json()
    assert reply.status_code == 200
    assert (body["object"], body["model"], body["id"]) == (
        "chat.completion", "auto", f"chatcmpl-{reply.headers['x-request-id']}",
    )  # fmt: skip
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": words([4, 6, 7]), "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert body["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip
    shares = {"maths": 0.25, "films": 0.75}
    assert body["mediator"] == {
        "mixture": shares, "probabilities": shares, "uncertainty": 0.125, "outside": True, "cached_tokens": 3,
    }  # fmt: skip
    assert reply.headers["x-mediator-mixture"] == "maths=0.25,films=0.75"
    assert reply.headers["x-mediator-uncertainty"] == "0.125"


def test_all_fields_reach_the_engine(server: Running, engine: FakeEngine) -> None:
    ask(
        server, temperature=0.5, top_p=0.9, top_k=-1, seed=11, stop="film", presence_penalty=1, frequency_penalty=-1,
        logit_bias={"5": 2, "19": -100}, logprobs=True, top_logprobs=2, ignore_eos=True, max_completion_tokens=2, n=2,
        user="me", unheard_of={"a": 1}, tools=None, response_format={"type": "text"},
    )  # fmt: skip
    one, two = (ticket.request for ticket in engine.tickets)
    draw = Draw(0.5, 0.9, 0, 11, 1.0, -1.0, {5: 2.0, 19: -100.0})
    assert one == Request(PROMPT, 2, None, None, draw, ("film",), 2, False, True)
    assert (two.draw.seed, two.prompt) == (12, PROMPT)


def test_without_wishes_the_model_draws_as_its_authors_say(engine: FakeEngine) -> None:
    draw = Draw(0.6, 0.95, 20)
    with serving(engine, fake_served(draw=draw), max_tokens=40) as server:
        assert server.client.post(CHAT, json={"messages": USER}).status_code == 200
        server.client.post(CHAT, json={"messages": USER, "max_tokens": 2, "temperature": 0})
    assert engine.tickets[0].request == Request(PROMPT, 40, draw=draw)
    assert engine.tickets[1].request.draw == Draw(0.0, 0.95, 20)


def test_an_answer_without_a_limit_fills_the_context(server: Running, engine: FakeEngine) -> None:
    server.client.post(CHAT, json={"messages": USER})
    assert engine.tickets[0].request.max_tokens == 64 - 5
    long = [{"role": "user", "content": "two " * 70}]
    reply = server.client.post(CHAT, json={"messages": long})
    assert "leave no room" in refusal(reply, 400, "messages")
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    reply = server.client.post(CHAT, json={"messages": long, "max_tokens": 1})
    assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("model", "mixture"),
    [
        ("auto", None),
        ("tales", None),
        ("dense", {}),
        ("films", {"films": 1.0}),
        ("maths=0.7, films=0.3", {"maths": 0.7, "films": 0.3}),
        ("maths=-1", {"maths": -1.0}),
    ],
)
def test_the_model_says_who_answers(server: Running, engine: FakeEngine, model: str, mixture: object) -> None:
    reply = ask(server, model=model)
    assert reply.json()["model"] == model
    assert engine.tickets[0].request.mixture == mixture
    if mixture == {}:
        assert reply.headers["x-mediator-mixture"] == "dense"
        assert "x-mediator-uncertainty" not in reply.headers
    assert ask(server, model=model, stream=True).headers["x-mediator-mixture"] == reply.headers["x-mediator-mixture"]


def test_a_mixture_may_stand_beside_the_model(server: Running, engine: FakeEngine) -> None:
    assert ask(server, mediator={"mixture": {"films": 0.5}}).json()["mediator"]["mixture"] == {"films": 0.5}
    ask(server, mediator={"mixture": {}})
    assert engine.tickets[1].request.mixture == {}
    both = ask(server, model="maths", mediator={"mixture": {"films": 1}})
    assert "already who answers" in refusal(both, 400, "mediator.mixture")
    assert "no expert 'filmz'; did you mean 'films'?" in refusal(
        ask(server, mediator={"mixture": {"filmz": 1}}), 400, "mediator.mixture"
    )
    assert "between -100 and 100" in refusal(
        ask(server, mediator={"mixture": {"films": 1e38}}), 400, "mediator.mixture"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("film", "no model 'film'; did you mean 'films'?"),
        ("gpt-4", "no model 'gpt-4'; known: auto, maths, films, dense"),
        ("maths=x", "'maths=x' is not NAME=WEIGHT; write for example model maths=0.7,sarcasm=0.3"),
        ("math=1", "no expert 'math'; did you mean 'maths'?"),
        ("maths=1,maths=2", "'maths' is given twice; write for example model maths=0.7,sarcasm=0.3"),
    ],
)
def test_an_unknown_model_is_404_with_a_suggestion(server: Running, model: str, message: str) -> None:
    assert refusal(ask(server, model=model), 404, "model") == message


def test_a_bundle_without_router_has_no_auto() -> None:
    with serving(FakeEngine(), fake_served(routes=False, pins=False)) as server:
        assert [entry["id"] for entry in server.client.get("/v1/models").json()["data"]] == ["maths", "films", "dense"]
        assert "has no router" in refusal(ask(server, model="auto"), 404, "model")
        assert "is missing; known" in refusal(server.client.post(CHAT, json={"messages": USER}), 400, "model")
        assert ask(server, model="films").status_code == 200
    with serving(FakeEngine(), fake_served(routes=False, pins=False, experts=())) as server:
        assert ask(server, model="auto").headers["x-mediator-mixture"] == "dense"


def parsed(reply: httpx.Response) -> list[dict]:
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = reply.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def test_a_stream_tells_first_who_answers_then_the_text_then_why_it_ends(server: Running) -> None:
    whole = ask(server).json()
    chunks = parsed(ask(server, stream=True))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["mediator"] == whole["mediator"]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:-1]] == [" <|bot|>", " three", " plus"]
    assert (chunks[-1]["choices"][0]["delta"], chunks[-1]["choices"][0]["finish_reason"]) == ({}, "length")
    assert all("usage" not in chunk for chunk in chunks)
    assert all("mediator" not in chunk for chunk in chunks[1:])


def test_a_stream_tells_its_usage_where_that_is_wanted(server: Running) -> None:
    *chunks, last = parsed(ask(server, stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], ask(server).json()["usage"])


def test_several_answers_stream_side_by_side(server: Running) -> None:
    chunks = parsed(ask(server, stream=True, n=2, seed=5, max_tokens=7))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    expected = [words(answer_of(Request(PROMPT, 7, draw=Draw(seed=seed)))) for seed in (5, 6)]
    assert list(texts.values()) == expected
    whole = ask(server, n=2, seed=5, max_tokens=7).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == expected
    assert whole["usage"]["prompt_tokens"] == 5
    assert whole["usage"]["completion_tokens"] == 14


def test_log_probabilities_of_a_chat(server: Running) -> None:
    reply = ask(server, logprobs=True, top_logprobs=2, max_tokens=2).json()
    tokens = reply["choices"][0]["logprobs"]["content"]
    assert [(one["token"], one["logprob"], bytes(one["bytes"]).decode()) for one in tokens] == [
        (" <|bot|>", 0.0, " <|bot|>"), (" three", -0.5, " three"),
    ]  # fmt: skip
    assert [best["logprob"] for best in tokens[1]["top_logprobs"]] == [-0.5, -9.5]
    streamed = parsed(ask(server, logprobs=True, top_logprobs=2, max_tokens=2, stream=True))
    assert [chunk["choices"][0]["logprobs"] for chunk in streamed[1:-1]] == [
        {"content": [token], "refusal": None} for token in tokens
    ]
    assert "needs logprobs" in refusal(ask(server, top_logprobs=2), 400, "top_logprobs")


def test_a_conversation_may_keep_the_mixture_of_its_first_turn(server: Running, engine: FakeEngine) -> None:
    system = {"role": "developer", "content": "is fine"}
    first = [system, {"role": "user", "content": "dull"}]
    later = [*first, {"role": "assistant", "content": "plot"}, {"role": "user", "content": "two"}]
    read = tuple(
        word_tokenizer().apply_chat_template(
            [{"role": "system", "content": "is fine"}, first[1]], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    )
    mixtures = [
        ask(server, messages=turns, mediator={"route": "conversation"}).json()["mediator"]["mixture"]
        for turns in (first, later)
    ]
    assert mixtures[0] == mixtures[1]
    assert [ticket.request.route_on for ticket in engine.tickets] == [read, read]
    ask(server, messages=later, mediator={"route": "turn"})
    assert engine.tickets[2].request.route_on is None
    engine.tickets.clear()
    with serving(engine, pin=True) as pinning:
        ask(pinning, messages=later)
        ask(pinning, messages=later, mediator={"route": "turn"})
    assert [ticket.request.route_on for ticket in engine.tickets] == [read, None]
    with serving(engine, fake_served(pins=False)) as gated:
        reply = ask(gated, mediator={"route": "conversation"})
        assert "decides once" in refusal(reply, 400, "mediator.route")


def test_text_parts_are_joined_and_other_parts_refused(server: Running, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "plus three"}]
    ask(server, messages=[{"role": "user", "content": parts}])
    assert engine.tickets[0].request.prompt == PROMPT
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    assert "the model knows text alone" in refusal(ask(server, messages=image), 400, "messages.0.content")


def test_a_template_that_takes_no_such_chat_is_the_callers_fault() -> None:
    picky = fake_served(tokenizer=word_tokenizer("{{ raise_exception('turns must alternate') }}"))
    with serving(FakeEngine(), picky) as server:
        assert "turns must alternate" in refusal(ask(server), 400, "messages")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"20": 1}}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"mediator": {"rout": "turn"}}, "mediator.rout"),
        ({"mediator": {"route": "day"}}, "mediator.route"),
        ({"stream": 1}, "stream"),
    ],
)
def test_what_is_not_taken_is_400_and_names_its_field(server: Running, fields: dict, param: str) -> None:
    refusal(ask(server, **fields), 400, param)


def test_all_faults_are_told_at_once(server: Running) -> None:
    message = refusal(ask(server, temperature=-1, n=500, tools=[1], messages=[{"role": "me"}]), 400, "tools")
    fields = ["tools", "temperature", "n", "messages.0.role", "messages.0.content"]
    assert [part.split(":")[0] for part in message.split("; ")] == fields


def test_a_failure_of_ours_is_500_and_one_of_the_caller_400(server: Running, engine: FakeEngine) -> None:
    engine.fails = Failed(Problem("prompt", "the turn is empty", "write something"))
    assert refusal(ask(server), 400, "prompt") == "the turn is empty; write something"
    engine.fails = Failed(Problem("", "the model failed: no memory"), is_ours=True)
    for stream in (False, True):
        reply = ask(server, stream=stream)
        assert refusal(reply, 500) == "the model failed: no memory"
        assert reply.json()["error"]["type"] == "server_error"


def test_a_failure_within_a_stream_is_told_in_it(server: Running, engine: FakeEngine) -> None:
    engine.fails, engine.fails_late = Failed(Problem("", "the model failed"), is_ours=True), True
    reply = ask(server, stream=True)
    assert reply.status_code == 200
    chunks = parsed(reply)
    assert chunks[-1]["error"]["message"] == "the model failed"
    assert chunks[-2]["choices"][0]["delta"]["content"] == " <|bot|>"


def test_a_full_queue_is_429_and_a_closed_engine_503_with_a_time_to_wait(server: Running, engine: FakeEngine) -> None:
    engine.is_full = True
    reply = ask(server)
    assert refusal(reply, 429) == "9 requests are waiting; try again later"
    assert reply.headers["retry-after"] == "1"
    engine.is_closed = True
    reply = ask(server, stream=True)
    assert "shutting down" in refusal(reply, 503)
    assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_goes_away_lets_go_of_its_place(server: Running, engine: FakeEngine, stream: bool) -> None:
    engine.hold, n_told = threading.Event(), len(server.told)
    body = {"messages": USER, "max_tokens": 50, "stream": stream}
    with httpx.Client(base_url=server.url, timeout=httpx.Timeout(10, read=10 if stream else 1)) as client:
        if stream:
            with client.stream("POST", CHAT, json=body) as reply:
                assert reply.headers["x-mediator-mixture"] == "maths=0.25,films=0.75"
                next(reply.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body)
    until(lambda: engine.tickets)
    assert engine.tickets[0].cancelled.wait(10)
    until(lambda: (200 if stream else 499) in [access.status for access in server.told[n_told:]])


def test_callers_at_once_get_their_own_answers(server: Running) -> None:
    def one(at: int) -> None:
        text = [WORDS[5 + (at * 7 + n) % 15] for n in range(1 + at % 5)]
        reply = ask(server, messages=[{"role": "user", "content": " ".join(text)}], stream=at % 2 == 0, seed=at)
        chunks = parsed(reply) if at % 2 == 0 else [reply.json()]
        message = "delta" if at % 2 == 0 else "message"
        said = "".join(chunk["choices"][0][message].get("content", "") for chunk in chunks)
        ids = (3, *(WORDS.index(word) for word in text), 4)
        found[at] = said == words(answer_of(Request(ids, 3, draw=Draw(seed=at))))

    found: dict[int, bool] = {}
    threads = [threading.Thread(target=one, args=(at,)) for at in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == dict.fromkeys(range(60), True)


def test_the_official_client_understands_all_of_it(server: Running, engine: FakeEngine) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["auto", *EXPERTS, "dense"]
        assert client.models.retrieve("films").parent == "dense"
        made = client.chat.completions.with_raw_response.create(
            model="auto", messages=USER, max_tokens=3, logprobs=True, top_logprobs=1,
            extra_body={"mediator": {"mixture": {"films": 1}}},
        )  # fmt: skip
        assert made.headers["x-mediator-mixture"] == "films=1"
        completion = made.parse()
        assert completion.choices[0].message.content == words([4, 6, 7])
        assert completion.choices[0].logprobs.content[1].logprob == -0.5
        assert completion.usage.prompt_tokens_details.cached_tokens == 0
        stream = client.chat.completions.create(
            model="auto", messages=USER, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == words([4, 6, 7])
        assert chunks[-1].usage.total_tokens == 8
        assert chunks[0].mediator["uncertainty"] == 0.125
        text = client.completions.create(model="films", prompt=[5, 6], max_tokens=1, logprobs=1, echo=True)
        assert text.choices[0].logprobs.tokens == [" two", " three", " three"]
        with pytest.raises(openai.NotFoundError, match="did you mean 'films'"):
            client.chat.completions.create(model="film", messages=USER)
        engine.fails, engine.fails_late = Failed(Problem("", "the model failed"), is_ours=True), True
        with pytest.raises(openai.APIError, match="the model failed"):
            list(client.chat.completions.create(model="auto", messages=USER, stream=True, max_tokens=3))
        engine.is_full = True
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="auto", messages=USER)
