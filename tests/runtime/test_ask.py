"""Experts that are asked about a prompt: perplexities and cosines against plain transformers and plain torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop, add_prompts, make_workshop, write_checkpoint
from transformers import AutoModelForCausalLM

from mediator_cli import read_bundle
from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord
from mediator_cli.errors import BundleError
from mediator_cli.runtime.ask import asked_ids, asking_reader, perplexities, text_ids
from mediator_cli.runtime.features import FeatureSpec
from mediator_cli.runtime.gradients import cosines
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import load_tokenizer, prompt_reader
from mediator_cli.runtime.router import Router

PROMPTS = [[5, 7, 6], [10, 12, 3, 4, 16, 17, 8], [9], [11, 13, 5, 5]]


@pytest.fixture(scope="module")
def folder(routed_once: Path) -> Path:
    return routed_once


def opened(folder: Path, **options: Any) -> RoutedModel:
    return open_bundle(folder, dtype=torch.float32, **options)


def complete(folder: Path, expert: str | None) -> Any:
    """Load the dense expert, with one sparse expert added in float32."""
    bundle, model = read_bundle(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if expert is not None and name in bundle.experts[expert].tensors:
            parameter.data += bundle.delta(expert, name).flat().view(parameter.shape)
    return model


@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["in one pass", "one by one"])
def test_perplexities_are_those_of_each_expert_by_itself(folder: Path, budget: int) -> None:
    found = perplexities(opened(folder, cache_bytes=budget), PROMPTS)
    assert found[:, -1].tolist() == [2, 6, 0, 3]
    assert found[2].tolist() == [0, 0, 0]
    for at, expert in enumerate(("a", "b")):
        model = complete(folder, expert)
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            expected = model(ids, labels=ids).loss.item() if len(prompt) > 1 else 0.0
            assert found[row, at] == pytest.approx(expected, rel=1e-4)


def naive_cosines(folder: Path, prompt: list[int]) -> list[float]:
    bundle, model = read_bundle(folder), complete(folder, None)
    ids = torch.tensor([prompt])
    model(ids, labels=ids).loss.backward()
    found = []
    for expert in ("a", "b"):
        names = [name for name, _ in model.named_parameters() if name in bundle.experts[expert].tensors]
        step = torch.cat([-model.get_parameter(name).grad.double().flatten() for name in names])
        delta = torch.cat([bundle.delta(expert, name).flat().double() for name in names])
        found.append(torch.cosine_similarity(step, delta, dim=0).item())
    return found


@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["mixed matrices", "decoded"])
def test_cosines_are_those_of_the_whole_gradient_with_the_whole_delta(folder: Path, budget: int) -> None:
    found = cosines(opened(folder, cache_bytes=budget), PROMPTS)
    assert found[:, -1].tolist() == [2, 6, 0, 3]
    assert found[2].tolist() == [0, 0, 0]
    for row in (0, 1, 3):
        assert found[row, :2] == pytest.approx(naive_cosines(folder, PROMPTS[row]), abs=2e-5)
    assert np.abs(found[:, :2]).max() > 1e-3


def test_asking_leaves_the_model_as_it_was(folder: Path) -> None:
    model = opened(folder)
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad(), model.mixing("a"):
        before = model(ids).logits
    model.lm_head.weight.requires_grad_(requires_grad=False)
    with torch.inference_mode():
        cosines(model, PROMPTS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    with torch.no_grad(), model.mixing("a"):
        # The first time by products, now by the expert's own matrices: equal but for rounding.
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the base itself (a) and of one step that makes it predict PROMPTS[1] better (b)."""
    shop: Workshop = add_prompts(make_workshop(tmp_path_factory.mktemp("stepped")))
    model = AutoModelForCausalLM.from_pretrained(shop.folder / "base", dtype=torch.float32)
    ids = torch.tensor([PROMPTS[1]])
    model(ids, labels=ids).loss.backward()
    moved = {n: (p - 0.02 * p.grad).detach().bfloat16() for n, p in model.named_parameters() if n in shop.base}
    write_checkpoint(shop.folder / "b", moved)
    write_checkpoint(shop.folder / "a", shop.base)
    extract = {"dense": "base", "density": 1.0, "values": "bf16"}
    return shop.merge("out", assign={"rule": "all"}, extract=extract)


def test_the_expert_that_is_a_step_down_the_loss_is_the_one_that_fits(stepped: Path) -> None:
    found = cosines(opened(stepped), [PROMPTS[1]])
    assert found[0, 0] == 0.0, "an expert that changes nothing has no direction"
    assert found[0, 1] > 0.6


@pytest.mark.parametrize("reads", ["turn", "prompt"])
def test_a_text_and_the_prompt_made_of_it_are_asked_about_alike(folder: Path, reads: Any) -> None:
    reader, spec = prompt_reader(load_tokenizer(folder)), FeatureSpec("perplexity", reads=reads)
    ids = text_ids(reader, spec, "two plus apples")
    whole = text_ids(reader, FeatureSpec("perplexity", reads="prompt"), "two plus apples")
    assert asked_ids(reader, spec, whole) == ids
    assert len(ids) == (3 if reads == "turn" else 5)
    assert text_ids(reader, spec, " ") == asked_ids(reader, spec, [3, 4]) == []


def test_a_first_token_that_counts_is_predicted_from_the_beginning_of_text(folder: Path) -> None:
    model, reader = opened(folder), prompt_reader(load_tokenizer(folder))
    reader.tokenizer.bos_token = "<s>"
    counted = asking_reader(model, reader, FeatureSpec("perplexity", first_token="bos")).read([[9], [5, 7], [1, 5, 7]])
    assert counted[:, -1].tolist() == [1, 2, 2]
    assert (counted[:2] == perplexities(model, [[1, 9], [1, 5, 7]])).all()
    assert (counted[1] == counted[2]).all(), "a beginning of text that is there is not put there again"
    reader.tokenizer.bos_token = None
    with pytest.raises(BundleError, match="no beginning-of-text token"):
        asking_reader(model, reader, FeatureSpec("perplexity", first_token="bos"))


def router(**fields: Any) -> Router:
    facts = {
        "features": "perplexity",
        "form": "inverse",
        "classifier": "none",
        "experts": ("x", "y", "z"),
        "size": 3,
        "temperature": 1.0,
        "outside_above": None,
        "policy": PolicyRecord(rule="top_k", k=2),
        "report": None,
        "file": None,
    }
    return Router(RouterRecord.model_validate(facts | fields), None, None)


SAID = np.array([[math.log(3), math.log(6), math.log(12), 4], [0, 0, 0, 0]], np.float32)


def test_shares_are_softmax_of_the_largest_inverse_perplexities() -> None:
    found = router().route(SAID)
    first = 1 / (1 + math.exp(1 / 6 - 1 / 3))
    assert found.weights[0] == pytest.approx([first, 1 - first, 0])
    assert found.answers[0] == pytest.approx([3, 6, 12])
    assert found.score[0] == pytest.approx(math.log(3))


def test_the_posterior_is_that_of_the_whole_prompt() -> None:
    found = router(form="posterior", policy=PolicyRecord(rule="posterior")).route(SAID)
    odds = np.array([3.0**-4, 6.0**-4, 12.0**-4])
    assert found.weights[0] == pytest.approx(odds / odds.sum())


def test_cosines_are_divided_by_the_temperature() -> None:
    said = np.array([[0.002, 0.001, -0.001, 4]], np.float32)
    found = router(features="gradient", form=None, temperature=0.001, policy=PolicyRecord(rule="posterior")).route(said)
    odds = np.exp([2.0, 1.0, -1.0])
    assert found.probabilities[0] == pytest.approx(odds / odds.sum(), rel=1e-4)
    assert (found.answers[0], found.score[0]) == (pytest.approx(said[0, :3]), pytest.approx(-0.002))


def test_a_prompt_too_short_to_predict_is_left_to_the_dense_expert() -> None:
    found = router(policy=PolicyRecord(rule="top_k", k=2, outside="ignore")).route(SAID)
    assert found.is_silent.tolist() == found.is_outside.tolist() == [False, True]
    assert found.weights[1].tolist() == [0, 0, 0]
    assert found.probabilities[1] == pytest.approx([1 / 3] * 3)
    assert found.entropy[1] == pytest.approx(1)
    blind = router(policy=PolicyRecord(rule="uniform")).route(SAID)
    assert blind.weights[1] == pytest.approx([1 / 3] * 3)


def test_a_limit_that_was_measured_puts_strange_prompts_outside() -> None:
    assert router(outside_above=1.0).route(SAID).weights[0].tolist() == [0, 0, 0]
    assert router(outside_above=1.2).route(SAID).weights[0, 0] > 0.5
