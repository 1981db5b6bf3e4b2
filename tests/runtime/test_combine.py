"""Experts run apart and their outputs combined, against the same experts run one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROUTE_ALL, add_prompts, make_workshop
from tiny_bundles import make_rows
from tiny_tokens import word_tokenizer

from mediator_cli.errors import BundleError
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.runtime.combine import COMBINATIONS, find_members
from mediator_cli.runtime.generate import Conversation, Sampling, reply
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import chat_ids

APART = COMBINATIONS[1:]
IDS = torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(0))
MIXED = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 0.0], [0.5, 0.2]])


@pytest.fixture(scope="module")
def model(routed_once: Path) -> RoutedModel:
    return open_bundle(routed_once, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _parameters(model: RoutedModel) -> None:
    model.combine = "parameters"


@torch.no_grad()
def by_hand(model: RoutedModel, ids: torch.Tensor, weights: list[float], combine: str) -> torch.Tensor:
    """Combine what single passes of the experts give for one sequence, as logits [tokens, vocabulary]."""
    shares = {"a": weights[0], "b": weights[1], "dense": 1 - sum(weights)}
    used = {name: share for name, share in shares.items() if abs(share) > 1e-6}
    kept, model.combine = model.combine, "parameters"
    logits, hidden = {}, {}
    for name in used:
        with model.mixing(name):
            logits[name] = model(ids[None]).logits[0]
            hidden[name] = model.base_model(ids[None]).last_hidden_state[0]
    if combine == "hidden":
        mean = sum(share * hidden[name] for name, share in used.items())
        for name in used:
            with model.mixing(name):
                model.base_model(ids[None])
                logits[name] = model.lm_head(mean[None])[0]
    model.combine = kept
    if combine == "probabilities":
        return sum(share * logits[name].softmax(-1) for name, share in used.items()).log()
    return sum(share * logits[name] for name, share in used.items())


@pytest.mark.parametrize("combine", APART)
def test_rows_with_other_mixtures_are_those_of_their_experts(model: RoutedModel, combine: Any) -> None:
    model.combine = combine
    with torch.no_grad(), model.mixing(MIXED):
        found = model(IDS).logits
    for row, weights in enumerate(MIXED.tolist()):
        expected = by_hand(model, IDS[row], weights, combine)
        torch.testing.assert_close(found[row].log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("combine", APART)
@pytest.mark.parametrize("asked", ["a", "b", "dense"])
def test_one_expert_answers_as_by_itself_bit_for_bit(model: RoutedModel, combine: Any, asked: str) -> None:
    found = []
    for way in ("parameters", combine):
        model.combine = way
        with torch.no_grad(), model.mixing(asked):
            found.append(model(IDS).logits)
    assert torch.equal(*found)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> RoutedModel:
    shop = add_prompts(make_workshop(tmp_path_factory.mktemp("twins")))
    experts = [{"name": name, "model": "./a"} for name in ("a", "b")]
    folder = shop.merge("out", experts=experts, **ROUTE_ALL | {"extract": {"dense": "base", "density": 0.5}})
    return open_bundle(folder, dtype=torch.float32)


@pytest.mark.parametrize("combine", APART)
def test_two_experts_that_are_the_same_answer_as_one(twins: RoutedModel, combine: Any) -> None:
    twins.combine = combine
    with torch.no_grad(), twins.mixing({"a": 0.3, "b": 0.7}):
        found = twins(IDS).logits
    with torch.no_grad(), twins.mixing("a"):
        expected = twins(IDS).logits
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("combine", APART)
def test_a_batch_with_padding_goes_on_as_each_sequence_read_anew(model: RoutedModel, combine: Any) -> None:
    model.combine = combine
    lengths = [6, 4, 5, 3]
    batch = torch.stack([torch.cat([torch.full((6 - n,), 2), row[:n]]) for n, row in zip(lengths, IDS, strict=True)])
    mask = torch.tensor([[0] * (6 - n) + [1] * n for n in lengths])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    found = model.generate(batch, attention_mask=mask, mixture=MIXED, **options)[:, 6:]
    for row, weights in enumerate(MIXED.tolist()):
        ids = IDS[row, : lengths[row]]
        for _ in range(5):
            ids = torch.cat([ids, by_hand(model, ids, weights, combine)[-1].argmax()[None]])
        assert found[row].tolist() == ids[lengths[row] :].tolist()


def test_samples_are_drawn_from_the_mixed_probabilities(model: RoutedModel) -> None:
    model.combine = "probabilities"
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2000, "pad_token_id": 2}
    drawn = model.generate(IDS[:1], mixture={"a": 0.5, "b": 0.5}, max_new_tokens=1, **options)[:, -1]
    expected = by_hand(model, IDS[0], [0.5, 0.5], "probabilities")[-1].exp()
    shares = torch.bincount(drawn, minlength=20) / 2000
    assert (shares - expected).abs().max() < 4 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize("combine", APART)
def test_a_conversation_goes_on_as_one_read_anew(model: RoutedModel, combine: Any) -> None:
    model.combine = combine
    tokenizer, short, mixture = word_tokenizer(), Sampling(max_new_tokens=4), {"a": 0.5, "b": 0.5}
    first = reply(model, tokenizer, Conversation(), "two plus three", short, mixture=mixture)
    second = reply(model, tokenizer, first.conversation, "the film", short, mixture=mixture)
    anew = reply(model, tokenizer, Conversation(first.conversation.messages), "the film", short, mixture=mixture)
    assert second.text == anew.text
    model.combine = "parameters"
    third = reply(model, tokenizer, second.conversation, "dull", short, mixture=mixture)
    assert third.conversation.combine == "parameters"
    assert len(chat_ids(tokenizer, third.conversation.messages)) > 0


@pytest.mark.parametrize("combine", APART)
@pytest.mark.parametrize("mixture", [{"a": 0.4, "b": 0.6}, None], ids=["given", "routed"])
def test_answers_are_scored_by_the_combined_experts(model: RoutedModel, combine: Any, mixture: Any) -> None:
    model.combine = combine
    tokenizer, rows = word_tokenizer(), make_rows(16)
    found = score_rows(model, tokenizer, rows, ScoreSettings(mixture=mixture))
    for row, score in zip(rows, found, strict=True):
        prompt = chat_ids(tokenizer, [{"role": "user", "content": row.prompt}])
        weights = list(mixture.values()) if mixture else model.route([prompt]).weights[0].tolist()
        ids = [*prompt, *tokenizer(row.answer)["input_ids"], 2]
        logs = by_hand(model, torch.tensor(ids[:-1]), weights, combine).log_softmax(-1)
        expected = sum(logs[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
        assert score.log_prob == pytest.approx(expected, abs=2e-3)


def test_a_plain_call_routes_and_combines(model: RoutedModel) -> None:
    prompt = chat_ids(word_tokenizer(), [{"role": "user", "content": "two film plus plot"}])
    weights = torch.from_numpy(model.route([prompt]).weights)
    model.combine = "logits"
    with torch.no_grad():
        found = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(found, by_hand(model, torch.tensor(prompt), weights[0].tolist(), "logits"), atol=1e-5, rtol=1e-5)  # fmt: skip # noqa: E501


def test_members_come_first_of_all_rows_then_second_of_those_that_have_one() -> None:
    members = find_members(MIXED, "probabilities", "")
    assert members.owners.tolist() == [0, 1, 2, 3, 0, 3, 3]
    assert members.shares.tolist() == pytest.approx([0.25, 1, 1, 0.5, 0.75, 0.2, 0.3])
    assert members.weights.tolist() == [[1, 0], [1, 0], [0, 0], [1, 0], [0, 1], [0, 1], [0, 0]]
    assert find_members(torch.tensor([[0.3, 0.7], [1 / 3, 2 / 3]]), "logits", "").owners.tolist() == [0, 1, 0, 1]


def test_what_cannot_be_combined_is_refused(model: RoutedModel) -> None:
    model.combine = "probabilities"
    for weights in ({"a": -0.5, "b": 1.5}, {"a": 0.9, "b": 0.9}):
        with model.mixing(weights), pytest.raises(BundleError, match="no shares of probability"):
            model(IDS)
    with model.mixing({"a": 0.5, "b": 0.5}), pytest.raises(BundleError, match="the loss of combined outputs"):
        model(IDS, labels=IDS)
    with pytest.raises(BundleError, match="2 beams cannot be followed while experts run apart"):
        model.generate(IDS, mixture="a", num_beams=2, max_new_tokens=2)
    model.combine = "logits"
    with torch.no_grad(), model.mixing({"a": -0.5, "b": 1.5}):
        assert model(IDS).logits.shape == (4, 6, 20)


def test_an_error_inside_a_call_leaves_no_trace(model: RoutedModel) -> None:
    model.combine = "logits"
    with model.mixing({"a": 0.5, "b": 0.5}), pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([[99]]))
    assert not model.state.is_called
