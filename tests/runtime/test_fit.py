"""Fitting a router: which prompts are used for what, that the report is true, and what cannot be fitted."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokens import FILMS, SUMS, task_prompts, word_tokenizer

from mediator_cli.bundle.record import FileRecord
from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.errors import BundleError
from mediator_cli.runtime.classify import Classifier, logits
from mediator_cli.runtime.features import FeatureReader, FeatureSpec, text_reader
from mediator_cli.runtime.fit import FEWEST_PROMPTS, FitSettings, choose_prompts, fit_router
from mediator_cli.runtime.outside import OutsideModel, outside_score
from mediator_cli.runtime.prompts import prompt_reader

TASKS = {"sums": task_prompts(SUMS), "films": task_prompts(FILMS)}
TOKENIZER = word_tokenizer()
ENCODE = prompt_reader(TOKENIZER).encode


def bag(prompts):
    """Count the twenty words of each prompt: features small enough to check by hand."""
    return np.stack([np.bincount(prompt, minlength=20) for prompt in prompts]).astype(np.float32)


BAG = FeatureReader(FeatureSpec("embedding_mean"), bag)


def fit(tasks=TASKS, reader=BAG, **fields):
    return fit_router(reader, ENCODE, tasks, FitSettings(**fields))


def parts(fitted, kind):
    arrays = {k.split(".")[1]: v.astype(float) for k, v in fitted.arrays.items() if k.startswith(f"{kind}.")}
    return Classifier(**arrays) if kind == "classifier" else OutsideModel(**arrays)


texts = st.lists(st.text("abc", min_size=1, max_size=6), min_size=20, max_size=40, unique=True)


@given(first=texts, share=st.floats(0.05, 0.9), most=st.integers(8, 30))
def test_prompts_are_shared_out_without_overlap(first, share, most):
    tasks = {"x": first, "y": [f"{text} d" for text in first]}
    chosen = choose_prompts(tasks, FitSettings(held_out=share, max_prompts=most))
    for name, given_texts in tasks.items():
        fitted, held_out = chosen.fitted[name], chosen.held_out[name]
        assert not set(fitted) & set(held_out)
        assert set(fitted) | set(held_out) <= set(given_texts)
        used = min(most, len(given_texts))
        assert len(fitted) + len(held_out) == used
        assert len(held_out) == min(max(2, round(share * used)), used - 2)


def test_the_order_of_prompts_and_repetitions_change_nothing():
    mixed = {name: Random(0).sample(prompts * 2, 2 * len(prompts)) for name, prompts in TASKS.items()}
    assert choose_prompts(mixed, FitSettings()) == choose_prompts(TASKS, FitSettings())
    one, other = fit(), fit(mixed)
    assert one.report == other.report
    assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_more_prompts_move_no_prompt_between_the_parts():
    few = choose_prompts({name: prompts[:50] for name, prompts in TASKS.items()}, FitSettings(max_prompts=1000))
    many = choose_prompts(TASKS, FitSettings(max_prompts=1000))
    moved = set(few.fitted["sums"]) & set(many.held_out["sums"])
    assert len(moved) <= 1 + round(0.2 * 10)


def test_tasks_with_their_own_words_are_told_apart():
    fitted = fit()
    assert fitted.report.accuracy == 1
    assert fitted.report.n_fitted == 96
    assert fitted.report.n_held_out == 12
    assert fitted.report.confusion == ((6, 0), (0, 6))
    assert fitted.experts == ("sums", "films")
    assert (fitted.size, fitted.notices) == (20, ())
    assert not any(name.startswith("ridge.") for name in fitted.arrays)


@pytest.mark.parametrize("classifier", ["logistic", "gaussian", "ridge", "prototype"])
def test_every_classifier_learns_the_tasks(classifier):
    fitted = fit(classifier=classifier)
    assert fitted.report.accuracy == 1
    assert ("ridge.gram" in fitted.arrays) == (classifier == "ridge")


def test_the_report_is_what_the_stored_arrays_give_on_the_other_half_of_what_was_held_out():
    overlapping = {"sums": task_prompts((*SUMS[:2], *FILMS[:3])), "films": task_prompts((*SUMS[1:3], *FILMS))}
    fitted = fit(overlapping)
    chosen = choose_prompts(overlapping, FitSettings())
    test_rows = [(text, n) for n, name in enumerate(overlapping) for text in chosen.held_out[name][1::2]]
    scores = logits(parts(fitted, "classifier"), bag([ENCODE(text) for text, _ in test_rows])) / fitted.temperature
    labels = np.array([n for _, n in test_rows])
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    hits = probabilities.argmax(axis=1) == labels
    assert fitted.report.accuracy == pytest.approx(hits.mean())
    assert fitted.report.log_loss == pytest.approx(-np.log(probabilities[np.arange(len(labels)), labels]).mean())
    assert sum(map(sum, fitted.report.confusion)) == fitted.report.n_held_out == len(test_rows)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
def test_the_outside_threshold_is_a_quantile_of_held_out_scores(quantile):
    fitted, chosen = fit(outside_quantile=quantile), choose_prompts(TASKS, FitSettings())
    held_out = [ENCODE(text) for name in TASKS for text in chosen.held_out[name]]
    scores = outside_score(parts(fitted, "outside"), bag(held_out))
    assert fitted.outside_above == pytest.approx(np.quantile(scores, quantile), rel=1e-5)


def test_without_calibration_the_temperature_is_one():
    assert fit(calibrate="none").temperature == 1
    assert fit(calibrate="temperature").temperature != 1


def test_the_record_says_all_that_was_asked():
    policy = PolicyRecord(rule="top_k", k=2)
    fitted = fit(reader=text_reader(TOKENIZER), features=FeatureSpec("text"), classifier="prototype", policy=policy)
    record = fitted.record(FileRecord(name="router.safetensors", bytes=1, sha256="0"))
    assert (record.features, record.layer, record.classifier, record.size) == ("text", None, "prototype", 4096)
    assert (record.policy, record.experts, record.report) == (policy, ("sums", "films"), fitted.report)


def refused(tasks, message, **fields):
    with pytest.raises(BundleError) as raised:
        fit(tasks, **fields)
    found = [problem.message for problem in raised.value.problems]
    assert any(message in text for text in found), found
    return found


def test_one_task_alone_is_refused():
    refused({"sums": TASKS["sums"]}, "a router needs two experts")


def test_two_identical_tasks_are_refused():
    refused({"sums": TASKS["sums"], "films": TASKS["sums"]}, "sums and films share 60 of 60 prompts")


def test_an_expert_without_prompts_is_refused_with_all_others():
    found = refused({"sums": [], "films": TASKS["films"], "more": ["  ", "\n"]}, "sums has 0 usable prompts")
    assert len(found) == 2
    assert found[1].startswith(f"more has 0 usable prompts of its own, a router needs {FEWEST_PROMPTS}")


def test_a_few_prompts_are_enough_and_fewer_are_refused():
    enough = {name: prompts[:FEWEST_PROMPTS] for name, prompts in TASKS.items()}
    assert fit(enough).report.n_held_out == 2
    refused({**enough, "sums": enough["sums"][:-1]}, "sums has 7 usable prompts")


def test_prompts_of_several_experts_are_left_out_and_said():
    both = FILMS[0]
    fitted = fit({"sums": [*TASKS["sums"], both], "films": [*TASKS["films"], f" {both}\n"]})
    assert fitted.notices == ("1 prompts of more than one expert are left out of the router",)
    assert fitted.report.n_fitted == fit().report.n_fitted


def test_long_prompts_are_left_out_of_a_fit_and_said():
    reader = FeatureReader(FeatureSpec("embedding_mean"), bag, limit=3)
    long = {"sums": [*TASKS["sums"], "two plus three apples"], "films": TASKS["films"]}
    fitted = fit(long, reader)
    assert fitted.notices == ("1 prompts without tokens or of more than 3 are left out",)
    assert fitted.report == fit().report


def test_too_many_long_prompts_are_refused():
    reader = FeatureReader(FeatureSpec("embedding_mean"), bag, limit=2)
    refused(TASKS, "sums has 0 usable prompts", reader=reader)


def test_a_router_that_guesses_is_told_of():
    words = task_prompts((*SUMS, *FILMS), 200)
    fitted = fit({"sums": words[::2], "films": words[1::2]})
    assert fitted.report.accuracy < 0.8
    assert fitted.notices == (f"the router is right on only {fitted.report.accuracy:.0%} of 20 held-out prompts",)
