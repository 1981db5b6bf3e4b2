"""Models in lm-evaluation-harness: as its own model class answers, with one mixture for each question."""

import json

import pytest
import torch
from tiny_bundles import make_rows, routed, write_rows
from tiny_tokens import word_tokenizer

from mediator_cli.errors import CheckpointError
from mediator_cli.runtime.open import load_dense, open_bundle
from mediator_cli.runtime.tokens import prompt_tokens

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mediator_cli.evaluate.harness import TASK_FOLDER, HarnessModel, run_harness

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def shop(shop, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(shop.folder / "cache"))
    return shop


def requests(kind, *arguments):
    return [Instance(kind, {}, given, at) for at, given in enumerate(arguments)]


PAIRS = [("two plus three", " film"), ("two plus three", " two left"), ("dull film is", " a"), ("", "plot of the")]


def test_a_plain_model_answers_as_in_the_harness(shop):
    model, tokenizer = load_dense(shop.folder / "base", torch.float32), word_tokenizer()
    ours, theirs = HarnessModel(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer)
    asked = requests("loglikelihood", *PAIRS)
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (ours, theirs))
    assert [log_prob for log_prob, _ in found] == pytest.approx([log_prob for log_prob, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    rolling = requests("loglikelihood_rolling", ("two plus three is dull",), ("film",))
    assert ours.loglikelihood_rolling(rolling, True) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, True), abs=1e-3
    )


@torch.no_grad()
def by_hand(model, tokenizer, context, continuation, mixture):
    prompt, answer = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    with model.mixing(mixture):
        scores = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(scores[at, token].item() for at, token in enumerate(answer, len(prompt) - 1))


def test_all_choices_of_a_question_have_the_mixture_of_its_context(shop):
    folder = routed(shop, rule="posterior", outside="ignore")
    model, tokenizer = open_bundle(folder, dtype=torch.float32), word_tokenizer()
    found = HarnessModel(model, tokenizer).loglikelihood(requests("loglikelihood", *PAIRS[:3]), disable_tqdm=True)
    weights = torch.from_numpy(model.route([tokenizer(context)["input_ids"] for context, _ in PAIRS[:3]]).weights)
    assert not torch.equal(weights[0], weights[2])
    for (context, continuation), weight, (log_prob, _) in zip(PAIRS[:3], weights, found, strict=True):
        assert log_prob == pytest.approx(by_hand(model, tokenizer, context, continuation, weight[None]), abs=1e-3)


def test_text_without_context_is_left_to_the_dense_expert(shop):
    model, tokenizer = open_bundle(routed(shop), dtype=torch.float32), word_tokenizer()
    ((found, _),) = HarnessModel(model, tokenizer).loglikelihood(requests("loglikelihood", PAIRS[3]), True)
    assert found == pytest.approx(by_hand(model, tokenizer, "<s>", PAIRS[3][1], "dense"), abs=1e-3)


@pytest.mark.parametrize("mixture", [None, "b"])
def test_generation_is_that_of_the_bundle(shop, mixture):
    model, tokenizer = open_bundle(routed(shop, rule="argmax"), dtype=torch.float32), word_tokenizer()
    contexts = ["two plus three", "dull film is", "two"]
    options = {"max_gen_toks": 4, "until": ["of"], "do_sample": False}
    asked = requests("generate_until", *((context, options) for context in contexts))
    found = HarnessModel(model, tokenizer, mixture).generate_until(asked, disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = torch.tensor([tokenizer(context)["input_ids"]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), mixture=mixture, max_new_tokens=4, do_sample=False
        )
        made = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split("of")[0]
        assert text.split() == made.split()


def test_local_tasks_choose_by_the_mixture_of_the_prompt(shop):
    model, tokenizer = open_bundle(routed(shop), dtype=torch.float32), word_tokenizer()
    rows = [row for row in make_rows(40) if row.choices]
    file = write_rows(shop.folder / "words.test.jsonl", rows)
    found = run_harness(HarnessModel(model, tokenizer), ["mediator_choice"], [file], limit=15)
    right = 0
    for row, prompt in zip(rows[:15], prompt_tokens(tokenizer, [row.prompt for row in rows[:15]]), strict=True):
        weights = torch.from_numpy(model.route([prompt.ids]).weights)
        sums = {text: by_hand(model, tokenizer, prompt.text, text, weights) for text in row.choices}
        right += max(sums, key=sums.get) == row.answer
    assert found["words_choice"]["acc,none"] == pytest.approx(right / 15)
    assert 0 < right < 15
    assert json.dumps(found["words_choice"], default=float)


def test_unknown_tasks_get_a_suggestion(shop):
    model = HarnessModel(load_dense(shop.folder / "base"), word_tokenizer())
    with pytest.raises(CheckpointError, match="did you mean 'mediator_exact'"):
        run_harness(model, ["mediator_exat"])
    with pytest.raises(CheckpointError, match="mediator_exact has no rows"):
        run_harness(model, ["mediator_exact"])


def test_the_shipped_tasks_are_those_documented():
    assert sorted(file.stem for file in TASK_FOLDER.iterdir()) == ["mediator_choice", "mediator_exact"]
