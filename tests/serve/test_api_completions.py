"""Prompts over HTTP: their four forms, echo with log probabilities, who would answer; the engine is a fake one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import httpx
import pytest
from fake_engine import FakeEngine, Running, serving

from mediator_cli.serve.api.flow import Answer
from mediator_cli.serve.api.shapes import ChatShape, CompletionShape
from mediator_cli.serve.engine.request import Finished, Request, Scored, Started, Text

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakeEngine(), max_rows=6) as running:
        yield running


@pytest.fixture
def engine(server: Running) -> FakeEngine:
    engine = server.engine
    engine.tickets.clear()
    return engine


def ask(server: Running, **fields: object) -> httpx.Response:
    return server.client.post(PATH, json={"model": "films", "max_tokens": 2} | fields)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("two plus", [(5, 7)]),
        (["two", "plus three"], [(5,), (7, 6)]),
        ([5, 7], [(5, 7)]),
        ([[5, 7], [6]], [(5, 7), (6,)]),
    ],
)
def test_a_prompt_has_four_forms(server: Running, engine: FakeEngine, prompt: object, ids: list) -> None:
    body = ask(server, prompt=prompt).json()
    assert [ticket.request.prompt for ticket in engine.tickets] == ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(ids)))
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [[5], []], [5, "a"], [True], {"a": 1}, None, [[5], ["a"]], 7])
def test_other_forms_are_refused(server: Running, prompt: object) -> None:
    reply = ask(server, prompt=prompt)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


def test_the_older_endpoint_writes_sixteen_tokens_unless_told(server: Running, engine: FakeEngine) -> None:
    server.client.post(PATH, json={"prompt": "two"})
    assert engine.tickets[0].request.max_tokens == 16


def test_echo_tells_the_log_probabilities_of_the_prompt_as_lm_eval_reads_them(server: Running) -> None:
    body = ask(server, prompt=[[5, 7, 6]], max_tokens=1, logprobs=1, echo=True).json()
    (choice,) = body["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "two plus three three"
    assert told["tokens"] == [" two", " plus", " three", " three"]
    assert told["token_logprobs"] == [None, -1.0, -2.0, 0.0]
    assert told["top_logprobs"] == [None, {" plus": -1.0, " x": -9.5}, {" three": -2.0, " x": -9.5},
                                    {" three": 0.0, " x": -9.5}]  # fmt: skip
    assert told["text_offset"] == [0, 4, 9, 15]


def test_a_prompt_alone_may_be_scored(server: Running, engine: FakeEngine) -> None:
    choice = ask(server, prompt="two plus", max_tokens=0, logprobs=0, echo=True).json()["choices"][0]
    assert choice["text"] == "two plus"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
    assert engine.tickets[0].request == Request((5, 7), 0, {"films": 1.0}, draw=engine.tickets[0].request.draw,
                                                logprobs=0, echo=True)  # fmt: skip
    refused = ask(server, prompt="two", max_tokens=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_one_token_after_a_scored_prompt_is_always_scored(server: Running, engine: FakeEngine) -> None:
    """lm-eval drops the last scored token as the answer's: for an end that is not scored it would drop a prompt's."""
    for fields, expected in (
        ({"echo": True, "logprobs": 1, "max_tokens": 1}, True),
        ({"echo": True, "logprobs": 1, "max_tokens": 2}, False),
        ({"echo": True, "max_tokens": 1}, False),
        ({"logprobs": 1, "max_tokens": 1}, False),
    ):
        ask(server, prompt="two", **fields)
        assert engine.tickets[-1].request.ignore_eos == expected


def test_an_echo_streams_before_the_answer(server: Running) -> None:
    reply = ask(server, prompt=["two", "plus"], echo=True, logprobs=1, stream=True)
    blocks = [block.removeprefix("data: ") for block in reply.text.split("\n\n")[:-2]]
    choices = [json.loads(block)["choices"][0] for block in blocks]
    whole = ask(server, prompt=["two", "plus"], echo=True, logprobs=1).json()["choices"]
    for at in (0, 1):
        own = [choice for choice in choices if choice["index"] == at]
        assert "".join(choice["text"] for choice in own) == whole[at]["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [one for choice in own if choice["logprobs"] for one in choice["logprobs"][name]]
            assert told == whole[at]["logprobs"][name]


def test_prompts_of_one_request_each_tell_who_answered(server: Running) -> None:
    body = ask(server, model="auto", prompt=[[6], [5]]).json()
    assert [choice["mediator"]["mixture"] for choice in body["choices"]] == [
        {"maths": 1.0}, {"maths": 0.25, "films": 0.75},
    ]  # fmt: skip
    assert body["mediator"] == body["choices"][0]["mediator"]
    assert "mediator" not in ask(server, model="auto", prompt=[6], n=2).json()["choices"][0]


def test_what_a_prompt_does_not_take(server: Running) -> None:
    for fields, param in (
        ({"best_of": 3}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"mediator": {"route": "conversation"}}, "mediator.route"),
        ({"n": 7}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ):
        reply = ask(server, prompt="two", **fields)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert ask(server, prompt="two", best_of=2, n=2).status_code == 200


def test_who_would_answer_is_told_without_an_answer(server: Running, engine: FakeEngine) -> None:
    reply = server.client.post("/v1/route", json={"prompt": "two plus"})
    assert reply.json() == {
        "object": "route", "model": "auto", "mixture": {"maths": 1.0}, "probabilities": {"maths": 1.0, "films": 0.0},
        "uncertainty": 0.125, "outside": False,
    }  # fmt: skip
    assert engine.tickets[0].request == Request((5,), 0, None, (5, 7))
    turns = [
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "of"},
    ]
    server.client.post("/v1/route", json={"messages": turns})
    server.client.post("/v1/route", json={"messages": turns, "mediator": {"route": "conversation"}})
    whole, first = (ticket.request.route_on for ticket in list(engine.tickets)[1:])
    assert (len(whole), first) == (7, (3, 5, 4))
    for body in ({}, {"prompt": "a", "messages": turns}, {"prompt": ""}):
        assert server.client.post("/v1/route", json=body).status_code == 400


def answer(*tokens: Scored) -> Answer:
    made = Answer()
    for event in (Started({}), Text("x", tokens), Finished("stop", 1, len(tokens))):
        made.take(event)
    return made


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e6])
def test_numbers_that_json_has_not_are_the_least_one(value: float) -> None:
    token = Scored(1, "x", b"x", value, ((1, "x", b"x", value),))
    chat = ChatShape(logprobs=True).whole(0, answer(token))["logprobs"]["content"][0]
    text = CompletionShape(logprobs=True).whole(0, answer(token))["logprobs"]
    assert [chat["logprob"], chat["top_logprobs"][0]["logprob"], text["token_logprobs"][0]] == [-9999.0] * 3
    assert text["top_logprobs"] == [{"x": -9999.0}]


def test_of_tokens_with_the_same_text_the_best_is_told_and_the_chosen_one_always() -> None:
    best = ((7, "\ufffd", b"\xe2", -0.1), (8, "\ufffd", b"\xe3", -3.0))
    told = CompletionShape(logprobs=True).whole(0, answer(Scored(9, "z", b"z", -4.0, best)))["logprobs"]
    assert told["top_logprobs"] == [{"\ufffd": -0.1, "z": -4.0}]
