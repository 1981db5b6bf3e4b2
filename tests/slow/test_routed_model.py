"""The routed model on the real experts: exact mixing, routing, and what it is worth."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mediator_cli import load_recipe, make_plan, merge, read_bundle, verify_bundle
from mediator_cli.bundle.read import Bundle
from mediator_cli.evaluate.models import find_candidates
from mediator_cli.evaluate.run import EvaluateSettings, evaluate
from mediator_cli.evaluate.tasks import Task, load_tasks
from mediator_cli.runtime.calibrate import auroc
from mediator_cli.runtime.generate import Conversation, Sampling, answer, chat_ids, reply
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.runtime.open import open_bundle
from scripts.serving.load import ask_all, read_asks
from scripts.serving.targets import free_port, running

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
EXPERTS = ("maths", "language", "sarcasm", "sentiment")
MIXTURES = [[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0], [0.5, 0, 0.2, 0.3]]
ROWS = 60

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = make_plan(load_recipe(ROOT / "recipes/smollm2/mediator.yaml"))
    return merge(plan, tmp_path_factory.mktemp("routed") / "bundle")


@pytest.fixture(scope="module")
def model(folder: Path) -> RoutedModel:
    return open_bundle(folder)


def tasks(version: str = "test") -> tuple[Task, ...]:
    found = load_tasks([DEMO / f"data/{name}.{version}.jsonl" for name in EXPERTS])
    return tuple(Task(task.name, task.rows[:ROWS]) for task in found)


def complete(bundle: Bundle, weights: list[float]) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(bundle.path, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for expert, weight in zip(EXPERTS, weights, strict=True):
                if weight and name in bundle.experts[expert].tensors:
                    delta = bundle.experts[expert].read(name)
                    parameter.view(-1)[delta.positions] += delta.values * weight
    return model


@pytest.mark.parametrize("switch", [1, 10**9], ids=["matrices", "products"])
def test_a_mixed_batch_gives_the_logits_of_complete_checkpoints(folder: Path, switch: int) -> None:
    routed = open_bundle(folder, dtype=torch.float32, switch_tokens=switch)
    ids = torch.randint(100, 40_000, (len(MIXTURES), 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), routed.mixing(MIXTURES):
        found = routed(ids).logits
    bundle = read_bundle(folder)
    for row, weights in enumerate(MIXTURES):
        with torch.no_grad():
            expected = complete(bundle, weights)(ids[row : row + 1]).logits[0]
        scale = expected.abs().max().item()
        torch.testing.assert_close(found[row], expected, atol=1e-5 * scale, rtol=0)


def test_the_bundle_with_its_router_verifies(folder: Path) -> None:
    assert verify_bundle(folder).problems == ()
    assert read_bundle(folder).manifest.router is not None


def test_prompts_in_words_never_seen_go_to_their_expert(model: RoutedModel) -> None:
    tokenizer = model.opened.tokenizer
    for task in tasks():
        prompts = [chat_ids(tokenizer, [{"role": "user", "content": row.prompt}]) for row in task.rows]
        chosen = model.route(prompts).probabilities.argmax(axis=1)
        assert (chosen == EXPERTS.index(task.name)).mean() >= 0.95, task.name


def test_prompts_unlike_all_tasks_are_recognised(model: RoutedModel) -> None:
    from scripts.quality.data import foreign_tasks

    tokenizer = model.opened.tokenizer

    def scores(found: tuple[Task, ...]) -> np.ndarray:
        rows = [row for task in found for row in task.rows[:ROWS]]
        prompts = [chat_ids(tokenizer, [{"role": "user", "content": row.prompt}]) for row in rows]
        return model.route(prompts).score

    own, foreign = scores(tasks()), scores(foreign_tasks(0))
    labels = np.r_[np.zeros(len(own), bool), np.ones(len(foreign), bool)]
    assert auroc(np.r_[own, foreign], labels) >= 0.95


def test_the_bundle_beats_the_static_merge_and_comes_near_the_experts(folder: Path, tmp_path: Path) -> None:
    static = merge(make_plan(load_recipe(ROOT / "recipes/smollm2/static.yaml")), tmp_path / "static")
    own = tasks()
    report = evaluate(find_candidates([str(static), str(folder)], list(EXPERTS)), own)
    merged, bundle = (result.accuracy for result in report.models)
    settings = EvaluateSettings()
    experts = [
        evaluate(find_candidates([str(DEMO / "experts" / task.name)], [], DEMO / "base"), [task], settings).models[0]
        for task in own
    ]
    oracle = sum(result.accuracy for result in experts) / len(experts)
    assert bundle >= merged + 0.15
    assert bundle >= oracle - 0.06


def test_a_conversation_changes_its_expert_with_the_question(model: RoutedModel) -> None:
    tokenizer, short = model.opened.tokenizer, Sampling(max_new_tokens=8)
    rows = {task.name: task.rows[0] for task in tasks()}
    first = reply(model, tokenizer, Conversation(), rows["maths"].prompt, short)
    second = reply(model, tokenizer, first.conversation, rows["language"].prompt, short)
    assert first.conversation.weights.argmax() == EXPERTS.index("maths")
    assert second.conversation.weights.argmax() == EXPERTS.index("language")


def test_generated_answers_are_the_exact_ones_of_one_pass(model: RoutedModel) -> None:
    from mediator_cli.evaluate.score import ScoreSettings, score_rows

    tokenizer = model.opened.tokenizer
    task = next(task for task in tasks() if task.name == "maths")
    rows = task.rows[:20]
    scored = [score.exact for score in score_rows(model, tokenizer, rows, ScoreSettings(mixture="maths"))]
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": row.prompt}]) for row in rows]
    said = [answer(model, tokenizer, [prompt], "maths", Sampling(max_new_tokens=8))[0] for prompt in prompts]
    generated = [text == row.answer for text, row in zip(said, rows, strict=True)]
    assert sum(a != b for a, b in zip(scored, generated, strict=True)) <= 1


def test_the_harness_runs_a_real_task_on_the_bundle(folder: Path) -> None:
    from mediator_cli.evaluate.harness import harness_results

    (candidate,) = find_candidates([str(folder)], [])
    file = DEMO / "data/sentiment.test.jsonl"
    found = harness_results(candidate, ["mediator_choice"], [file], 30)
    (task,) = found.values()
    accuracy = next(value for name, value in task.items() if name.startswith("acc,"))
    assert accuracy >= 0.6, json.dumps(found, default=str)


def test_the_server_answers_many_clients_as_the_model_answers_one(folder: Path, model: RoutedModel) -> None:
    asks = read_asks(DEMO / "data", EXPERTS, 10)
    tokenizer, port = model.opened.tokenizer, free_port()
    assert tokenizer is not None
    url = f"http://127.0.0.1:{port}"
    with running([sys.executable, "-m", "mediator_cli", "serve", folder, "--port", str(port), "--quiet"], port, {}):
        told, _ = ask_all([replace(ask, url=url, model="auto") for ask in asks], 8, max_tokens=12)
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": one.ask.prompt}]) for one in told]
    alone = [answer(model, tokenizer, [prompt], None, Sampling(12))[0] for prompt in prompts]
    # In bfloat16 the company of other rows may turn an answer where two tokens are nearly equal.
    assert sum(one.text == text for one, text in zip(told, alone, strict=True)) >= 0.9 * len(told)
    for one, weights in zip(told, model.route(prompts).weights, strict=True):
        named = dict(part.split("=") for part in one.mixture.split(",") if "=" in part)
        expected = {name: weight for name, weight in zip(model.expert_names, weights.tolist(), strict=True) if weight}
        assert {name: float(weight) for name, weight in named.items()} == pytest.approx(expected, abs=1e-3)
    assert sum(one.is_right for one in told) >= 0.6 * len(told)
