"""The server with the real engine on a tiny bundle: what it says is what the run time says, for all its clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from fake_engine import on_loopback
from tiny_tokens import FILMS, SUMS, WORDS, word_tokenizer

from mediator_cli.runtime.generate import Sampling, answer
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import chat_ids
from mediator_cli.serve.api.settings import Settings
from mediator_cli.serve.app import make_app
from mediator_cli.serve.engine.engine import Limits
from mediator_cli.serve.opened import Serving, start_serving, usual_draw

SUM, FILM = "two plus three", "dull film plot"


@pytest.fixture(scope="module")
def serving(routed_once: Path) -> Iterator[Serving]:
    # In bfloat16, prompts that are read in parts differ from whole ones in the last digit, and so tiny models' words.
    model = open_bundle(routed_once, dtype=torch.float32)
    made = start_serving(routed_once, model, word_tokenizer(), Limits(rows=4, cache_bytes=1 << 20))
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def url(serving: Serving) -> Iterator[str]:
    with on_loopback(make_app(serving.engine, serving.served, Settings())) as found:
        yield f"{found}/v1"


@contextmanager
def client_of(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_facts_are_those_of_the_bundle(serving: Serving, routed_once: Path) -> None:
    served = serving.served
    assert (served.name, served.experts, served.routes, served.pins) == ("out", ("a", "b"), True, True)
    assert served.n_ids == len(WORDS)
    assert served.tokenizer is not serving.engine.tokenizer
    draw = usual_draw(serving.engine.model)
    assert (draw.temperature, draw.top_p, draw.top_k) == (1.0, 1.0, 0)


def test_answers_and_decisions_are_those_of_the_run_time(url: str, routed_once: Path) -> None:
    model = open_bundle(routed_once, dtype=torch.float32)
    chats = [[{"role": "user", "content": text}] for text in (SUM, FILM, "film two of the")]
    prompts = [chat_ids(word_tokenizer(), chat) for chat in chats]
    routing = model.route(prompts)
    expected = answer(model, word_tokenizer(), prompts, routing.weights, Sampling(max_new_tokens=6))
    with client_of(url) as client:
        for at, chat in enumerate(chats):
            made = client.chat.completions.create(model="auto", messages=chat, max_tokens=6, temperature=0)
            assert (made.choices[0].message.content or "").strip() == expected[at].strip()
            assert made.mediator["uncertainty"] == pytest.approx(float(routing.entropy[at]))
            assert list(made.mediator["probabilities"].values()) == pytest.approx(routing.probabilities[at].tolist())
            parts = client.chat.completions.create(
                model="auto", messages=chat, max_tokens=6, temperature=0, stream=True
            )
            streamed = "".join(part.choices[0].delta.content or "" for part in parts)
            assert streamed == made.choices[0].message.content


def test_a_pinned_conversation_keeps_its_experts_through_all_turns(url: str, routed_once: Path) -> None:
    turns = [{"role": "user", "content": SUM}]
    found = []
    with client_of(url) as client:
        for text in (FILM, FILM, SUM):
            made = client.chat.completions.create(
                model="auto", messages=turns, max_tokens=3, extra_body={"mediator": {"route": "conversation"}}
            )
            found.append(made.mediator["mixture"])
            turns += [{"role": "assistant", "content": "fine"}, {"role": "user", "content": text}]
        anew = client.chat.completions.create(model="auto", messages=turns[:3], max_tokens=3)
    expected = open_bundle(routed_once).route([chat_ids(word_tokenizer(), turns[:1])]).weights[0]
    assert found[0] == pytest.approx({name: float(w) for name, w in zip("ab", expected, strict=True) if w})
    assert found == [found[0]] * 3
    assert anew.mediator["mixture"] != found[0]


def test_callers_at_once_get_what_each_gets_alone(url: str) -> None:
    def ask(client: openai.OpenAI, at: int) -> str:
        words = [(*SUMS, *FILMS)[(3 * at + n) % 10] for n in range(1 + at % 6)]
        made = client.chat.completions.create(
            model=("auto", "a", "b", "dense", "a=0.5,b=0.5")[at % 5], max_tokens=5, temperature=1, seed=at,
            messages=[{"role": "user", "content": " ".join(words)}],
        )  # fmt: skip
        return f"{made.mediator['mixture']} {made.choices[0].message.content}"

    with client_of(url) as client:
        alone = [ask(client, at) for at in range(12)]
        together: dict[int, str] = {}
        threads = [threading.Thread(target=lambda at=at: together.update({at: ask(client, at)})) for at in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [together[at] for at in range(12)] == alone


def test_an_empty_turn_and_a_long_prompt_are_the_callers_fault(url: str, serving: Serving) -> None:
    with client_of(url) as client:
        with pytest.raises(openai.BadRequestError, match="empty"):
            client.chat.completions.create(model="auto", messages=[{"role": "user", "content": ""}], max_tokens=2)
        with pytest.raises(openai.BadRequestError, match="more than the"):
            client.completions.create(model="a", prompt=[5] * (serving.served.context or 1), max_tokens=2)
        with pytest.raises(openai.BadRequestError, match="token 20 is not one of"):
            client.completions.create(model="a", prompt=[20], max_tokens=2)


@pytest.mark.slow
def test_lm_eval_over_http_scores_as_it_does_in_process(url: str, routed_once: Path, tmp_path: Path) -> None:
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from mediator_cli.evaluate.harness import HarnessModel

    folder = tmp_path / "tokenizer"
    word_tokenizer().save_pretrained(folder)
    for name, mixture in (("a", "a"), ("dense", "dense"), ("auto", None)):
        theirs = LocalCompletionsAPI(
            model=name, base_url=f"{url}/completions", tokenizer=str(folder), tokenizer_backend="huggingface",
            batch_size=5, max_length=64,
        )  # fmt: skip
        ours = HarnessModel(open_bundle(routed_once, dtype=torch.float32), word_tokenizer(), mixture)
        contexts = ["<|user|> two plus <|bot|>", "<|user|> dull film plot <|bot|>", "<|user|> two the film <|bot|>"]
        pairs = [(context, word) for context in contexts for word in (" three", " fine", " apples left of", " </s>")]
        asked = [request(context, continuation) for context, continuation in pairs]
        found, expected = theirs.loglikelihood(asked), ours.loglikelihood(asked, disable_tqdm=True)
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
        assert [one[1] for one in found] == [one[1] for one in expected]


def request(context: str, continuation: str) -> object:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, (context, continuation), 0)


@pytest.mark.slow
def test_lm_eval_knows_our_models_by_name(
    routed_once: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.api.registry import get_model

    from mediator_cli.evaluate import lm_eval as entry
    from mediator_cli.evaluate.harness import HarnessModel

    entry.register()
    entry.register()
    made = get_model("mediator").create_from_arg_string(
        f"pretrained={routed_once}::b", {"batch_size": 8, "max_batch_size": None, "device": "cpu"}
    )
    pair = [request("two plus", " three")]
    expected = HarnessModel(open_bundle(routed_once), word_tokenizer(), "b").loglikelihood(pair, disable_tqdm=True)
    assert made.loglikelihood(pair, disable_tqdm=True) == expected
    monkeypatch.setattr(entry, "cli_evaluate", lambda: get_model("mediator")(pretrained="/nowhere"))
    assert entry.main() == 2
    assert "/nowhere" in capsys.readouterr().err
