"""Scores of a bundle: each row as under its own mixture, which its prompt alone decides."""

import pytest
import torch
from tiny_bundles import PLAIN_EXPERTS, make_rows, routed
from tiny_tokens import word_tokenizer

from mediator_cli.errors import BundleError
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.tokens import prompt_tokens


@torch.no_grad()
def by_hand(model, prompt, answer, mixture):
    """Sum the log-probabilities of an answer and the end under one mixture, by one pass over one sequence."""
    ids = [*prompt, *answer, 2]
    with model.mixing(mixture):
        scores = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return sum(scores[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))


@pytest.mark.parametrize(
    "policy", [{"rule": "posterior", "outside": "ignore"}, {"rule": "argmax"}, {"rule": "uncertainty", "sure": 0.5}]
)
def test_every_row_is_answered_by_its_own_mixture(shop, policy):
    model, tokenizer = open_bundle(routed(shop, **policy), dtype=torch.float32), word_tokenizer()
    rows = make_rows(60)
    prompts = [prompt.ids for prompt in prompt_tokens(tokenizer, [row.prompt for row in rows])]
    weights = torch.from_numpy(model.route(prompts).weights)
    n_different = len(weights.unique(dim=0))
    assert n_different > 20 if policy["rule"] == "posterior" else 2 <= n_different <= 40
    found = score_rows(model, tokenizer, rows)
    for row, prompt, weight, score in zip(rows, prompts, weights, found, strict=True):
        sums = {
            text: by_hand(model, prompt, tokenizer(text)["input_ids"], weight[None])
            for text in row.choices or [row.answer]
        }
        assert score.log_prob == pytest.approx(sums[row.answer], abs=1e-3)
        assert score.chosen_right in (None, max(sums, key=sums.get) == row.answer)
        assert (score.chosen_right is None) == (row.choices is None)


def test_prompts_are_routed_once_and_without_answers(shop, monkeypatch):
    model, tokenizer = open_bundle(routed(shop), dtype=torch.float32), word_tokenizer()
    asked = []
    route = model.route
    monkeypatch.setattr(model, "route", lambda prompts: asked.append(prompts) or route(prompts))
    rows = make_rows(8)
    score_rows(model, tokenizer, rows)
    assert asked == [[list(prompt.ids) for prompt in prompt_tokens(tokenizer, [row.prompt for row in rows])]]


@pytest.mark.parametrize("mixture", ["a", "dense", {"a": 0.25, "b": 0.5}])
def test_a_mixture_by_hand_answers_all_rows(shop, mixture):
    model, tokenizer = open_bundle(routed(shop), dtype=torch.float32), word_tokenizer()
    rows = make_rows(6)
    found = score_rows(model, tokenizer, rows, ScoreSettings(mixture=mixture))
    prompts = prompt_tokens(tokenizer, [row.prompt for row in rows])
    for row, prompt, score in zip(rows, prompts, found, strict=True):
        assert score.log_prob == pytest.approx(
            by_hand(model, prompt.ids, tokenizer(row.answer)["input_ids"], mixture), abs=1e-3
        )


def test_a_bundle_without_router_needs_a_mixture(shop):
    model = open_bundle(shop.merge("out", experts=PLAIN_EXPERTS, assign={"rule": "all"}))
    with pytest.raises(BundleError, match="no router"):
        score_rows(model, word_tokenizer(), make_rows(2))


def test_a_static_merge_needs_none(shop):
    folder = shop.merge("out", experts=PLAIN_EXPERTS, assign={"rule": "none"})
    model, tokenizer = open_bundle(folder, dtype=torch.float32), word_tokenizer()
    rows = make_rows(4)
    assert score_rows(model, tokenizer, rows) == score_rows(model, tokenizer, rows, ScoreSettings(mixture="dense"))
