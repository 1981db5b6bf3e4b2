"""Scores of rows: exact against generate, choices against sums by hand, prompts against the chat template."""

from random import Random

import pytest
import torch
from tiny_models import N_WORDS, make_model, make_tokenizer

from mediator_cli.errors import BundleError, CheckpointError
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.evaluate.tasks import Row
from mediator_cli.runtime.tokens import answer_tokens, end_tokens, prompt_tokens


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def words(rng, most):
    return " ".join(f"w{rng.randrange(N_WORDS)}" for _ in range(rng.randrange(1, most)))


def greedy_answer(model, tokenizer, prompt, ends):
    """Generate until an end token; None when the answer would be empty or does not end."""
    ids = torch.tensor([prompt.ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=ends, pad_token_id=0
    )
    made = output[0, ids.shape[1] :].tolist()
    return tokenizer.decode(made[:-1]) if made[-1] in ends and len(made) > 1 else None


@pytest.mark.parametrize("raw", [False, True])
def test_exact_is_what_greedy_generation_gives(raw):
    model, tokenizer = make_model(), make_tokenizer(bos=True)
    rng = Random(1)
    ends = sorted({2, *(rng.randrange(6, 66) for _ in range(16))})
    model.generation_config.eos_token_id = ends
    rows, expected = [], []
    for prompt in prompt_tokens(tokenizer, [words(rng, 9) for _ in range(150)], raw=raw):
        text = prompt.text if raw else prompt.text.split("<user> ")[1].split(" <end>")[0]
        generated = greedy_answer(model, tokenizer, prompt, ends)
        for answer in {generated, words(rng, 4), f"{generated} w1"} - {None}:
            rows.append(Row(prompt=text, answer=answer))
            expected.append(answer == generated)
    assert sum(expected) > 40
    assert [score.exact for score in score_rows(model, tokenizer, rows, ScoreSettings(raw=raw))] == expected


@torch.no_grad()
def by_hand(model, prompt, answer):
    scores = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    rows = scores[len(prompt) - 1 :]
    return sum(rows[at, token].item() for at, token in enumerate([*answer, 2]))


def test_choices_are_compared_by_their_sums(model, tokenizer):
    rng = Random(2)
    rows, expected = [], []
    for _ in range(30):
        choices = [words(rng, 4) for _ in range(3)]
        rows.append(Row(prompt=words(rng, 8), answer=choices[rng.randrange(3)], choices=choices))
    for row, prompt in zip(rows, prompt_tokens(tokenizer, [row.prompt for row in rows]), strict=True):
        sums = {text: by_hand(model, prompt.ids, tokenizer(text)["input_ids"]) for text in row.choices}
        expected.append((max(sums, key=sums.get) == row.answer, sums[row.answer], len(prompt.ids)))
    found = score_rows(model, tokenizer, rows)
    assert [(s.chosen_right, s.n_prompt_tokens) for s in found] == [(right, n) for right, _, n in expected]
    assert [s.log_prob for s in found] == pytest.approx([total for _, total, _ in expected], abs=1e-4)
    assert {right for right, _, _ in expected} == {True, False}


def test_rows_without_choices_have_no_choice(model, tokenizer):
    done = []
    (score,) = score_rows(model, tokenizer, [Row(prompt="w1", answer="w2")], advance=done.append)
    assert score.chosen_right is None
    assert done == [1]


def test_no_rows_give_no_scores(model, tokenizer):
    assert score_rows(model, tokenizer, []) == []


def test_prompts_go_through_the_chat_template():
    (prompt,) = prompt_tokens(make_tokenizer(bos=True), ["w1 w2"])
    assert prompt.ids == (3, 7, 8, 2, 4)


def test_raw_prompts_begin_as_the_tokenizer_begins_texts():
    assert prompt_tokens(make_tokenizer(bos=True), ["w1 w2"], raw=True)[0].ids == (1, 7, 8)
    assert prompt_tokens(make_tokenizer(chat=False), ["w1 w2"])[0].ids == (7, 8)


def test_an_answer_that_would_melt_into_its_prompt_stands_alone():
    tokenizer = make_tokenizer(chat=False, bos=True)
    prompts = prompt_tokens(tokenizer, ["w1 w2", "w1 w2"])
    assert answer_tokens(tokenizer, prompts, ["w3", " w3 w4"]) == [(9,), (9, 10)]


def test_ends_are_those_of_generation(model, tokenizer):
    assert end_tokens(model, tokenizer) == (2,)
    model.generation_config.eos_token_id = [2, 5]
    assert end_tokens(model, tokenizer) == (2, 5)
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == (2,)


def test_rows_longer_than_the_model_reads_are_named(tokenizer):
    model = make_model(max_position_embeddings=12)
    rows = [Row(prompt="w1", answer="w2"), Row(prompt="w1 " * 9, answer="w2"), Row(prompt="w1 " * 8, answer="w2")]
    with pytest.raises(CheckpointError) as caught:
        score_rows(model, tokenizer, rows)
    assert str(caught.value).startswith("row 2: has 13 tokens, the model reads 12\n")
    assert len(caught.value.problems) == 1


def test_a_plain_model_takes_no_mixture(model, tokenizer):
    with pytest.raises(BundleError, match="only a bundle mixes experts"):
        score_rows(model, tokenizer, [Row(prompt="w1", answer="w2")], ScoreSettings(mixture="maths"))
