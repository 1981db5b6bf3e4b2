"""Answers of a routed bundle: batches, conversations, and what must not pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mediator_cli.errors import BundleError
from mediator_cli.runtime.generate import Conversation, Sampling, answer, chat_ids, reply
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.runtime.open import open_bundle

SHORT = Sampling(max_new_tokens=4)
TEXTS = ("two plus three", "the film is dull", "apples left")


@pytest.fixture
def model(routed: Path) -> RoutedModel:
    return open_bundle(routed, dtype=torch.float32)


def ids(model: RoutedModel, text: str) -> list[int]:
    return chat_ids(model.opened.tokenizer, [{"role": "user", "content": text}])


def test_generate_mixes_what_the_router_decides(model: RoutedModel) -> None:
    for text in TEXTS:
        prompt = torch.tensor([ids(model, text)])
        weights = model.route([prompt[0].tolist()]).weights
        by_itself = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=2)
        by_hand = model.generate(prompt, mixture=weights, max_new_tokens=4, do_sample=False, pad_token_id=2)
        assert by_itself.tolist() == by_hand.tolist()


def test_the_router_sends_each_task_to_its_expert(model: RoutedModel) -> None:
    routing = model.route([ids(model, "two plus apples"), ids(model, "film actor plot")])
    assert routing.weights.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_a_plain_call_routes_each_row_without_its_padding(model: RoutedModel) -> None:
    prompts = [ids(model, "two plus apples left"), ids(model, "film")]
    width = max(map(len, prompts))
    batch = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        plain = model(batch, attention_mask=mask).logits
        with model.mixing(model.route(prompts).weights):
            by_hand = model(batch, attention_mask=mask).logits
    assert torch.equal(plain, by_hand)


def test_prompts_of_a_batch_get_the_answers_that_they_get_alone(model: RoutedModel) -> None:
    prompts = [ids(model, text) for text in TEXTS]
    mixtures = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    together = answer(model, model.opened.tokenizer, prompts, mixtures, SHORT)
    alone = [answer(model, model.opened.tokenizer, [p], [m], SHORT)[0] for p, m in zip(prompts, mixtures, strict=True)]
    assert together == alone


def test_a_seed_decides_what_is_drawn(model: RoutedModel) -> None:
    def draw(seed: int) -> list[str]:
        sampling = Sampling(max_new_tokens=12, temperature=2.0, seed=seed)
        return answer(model, model.opened.tokenizer, [ids(model, TEXTS[0])], "a", sampling)

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


def talk(model: RoutedModel, texts: tuple[str, ...], mixture: object = None, *, forget: bool = False) -> Conversation:
    conversation = Conversation()
    for text in texts:
        if forget:
            conversation = Conversation(conversation.messages, conversation.weights)
        turn = reply(model, model.opened.tokenizer, conversation, text, SHORT, mixture=mixture)  # type: ignore[arg-type]
        conversation = turn.conversation
    return conversation


@pytest.mark.parametrize("mixture", ["a", {"a": 0.5, "b": 0.5}, None])
def test_keys_and_values_kept_over_turns_change_no_answer(model: RoutedModel, mixture: object) -> None:
    assert talk(model, TEXTS, mixture).messages == talk(model, TEXTS, mixture, forget=True).messages


def test_each_turn_is_routed_by_its_own_text(model: RoutedModel) -> None:
    tokenizer = model.opened.tokenizer
    first = reply(model, tokenizer, Conversation(), "two plus apples", SHORT)
    second = reply(model, tokenizer, first.conversation, "film actor plot", SHORT)
    kept = reply(model, tokenizer, first.conversation, "film actor plot", SHORT, mixture=first.conversation.weights)
    assert first.routing is not None
    assert first.conversation.weights.tolist() == [[1.0, 0.0]]
    assert second.conversation.weights.tolist() == [[0.0, 1.0]]
    assert kept.conversation.weights.tolist() == [[1.0, 0.0]]
    assert kept.routing is None


def test_another_mixture_does_not_use_the_cache_of_the_one_before(model: RoutedModel) -> None:
    tokenizer = model.opened.tokenizer
    first = reply(model, tokenizer, Conversation(), TEXTS[0], SHORT, mixture="a").conversation
    fresh = Conversation(first.messages)
    assert (
        reply(model, tokenizer, first, TEXTS[1], SHORT, mixture="b").text
        == reply(model, tokenizer, fresh, TEXTS[1], SHORT, mixture="b").text
    )


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(BundleError) as caught:
        call()
    assert caught.value.problems[0].hint
    return caught.value.problems[0].message


def test_an_empty_prompt_is_refused(model: RoutedModel) -> None:
    assert "is empty" in refusal(lambda: answer(model, model.opened.tokenizer, [[]], "a", SHORT))
    assert "no tokens" in refusal(lambda: model.route([[]])) or "is empty" in refusal(lambda: model.route([[]]))


def test_a_prompt_that_fills_the_context_is_refused(model: RoutedModel) -> None:
    limit = model.config.max_position_embeddings
    message = refusal(lambda: answer(model, model.opened.tokenizer, [[5] * limit], "a", SHORT))
    assert str(limit) in message


def test_a_router_that_names_other_experts_is_refused(routed: Path) -> None:
    import json

    from conftest import edit_json

    manifest = json.loads((routed / "routing_manifest.json").read_text())
    manifest["router"]["experts"] = ["a", "c"]
    edit_json(routed / "routing_manifest.json", router=manifest["router"])
    with pytest.raises(BundleError):
        open_bundle(routed)
