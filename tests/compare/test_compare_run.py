"""Comparisons: answers as scored by hand, no row scored twice, nothing left behind."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROUTE_ALL, edit_tensors, fine_tune, with_prompts
from safetensors.torch import load_file
from tiny_bundles import make_rows
from tiny_tokens import word_tokenizer

from mediator_cli import Settings
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.compare import ablate, run
from mediator_cli.compare.run import Comparison, compare
from mediator_cli.compare.store import row_key
from mediator_cli.compare.variants import Variant, policies, references, routed, static_merges
from mediator_cli.errors import CheckpointError, MediatorError
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.evaluate.tasks import Task
from mediator_cli.runtime.open import load_dense, open_bundle
from mediator_cli.runtime.policy import mix
from mediator_cli.runtime.tokens import prompt_tokens

TASKS = (Task("a", tuple(make_rows(4, 1))), Task("b", tuple(make_rows(4, 2))))
VARIANTS = [*references(["a", "b"], crossed=True), *static_merges({"plain": ()}), *routed(), *policies(2)]


@pytest.fixture
def job(shop, monkeypatch):
    # Tiny models need no collection, which takes longer than all else.
    monkeypatch.setattr(run, "gc", SimpleNamespace(collect=lambda: 0))
    recipe = shop.recipe(experts=with_prompts(), **ROUTE_ALL)
    return Comparison(recipe, TASKS, shop.folder / "work", settings=Settings(workers=1))


@pytest.fixture
def asked(monkeypatch):
    """Note each row that is scored, with the model's class and the mixture; stop after some calls when told."""
    seen = Asked()

    def noted(model, tokenizer, rows, settings):
        if len(seen.calls) == seen.stop_after:
            raise KeyboardInterrupt
        seen.calls.append([(model.config.name_or_path, str(settings.mixture), row_key(row)) for row in rows])
        return score_rows(model, tokenizer, rows, settings)

    monkeypatch.setattr(run, "score_rows", noted)
    return seen


class Asked:
    def __init__(self):
        self.calls, self.stop_after = [], None

    @property
    def rows(self):
        return [row for call in self.calls for row in call]


def by_hand(model, mixture=None):
    settings = ScoreSettings(mixture=mixture)
    return {task.name: tuple(score_rows(model, word_tokenizer(), task.rows, settings)) for task in TASKS}


def log_probs(scores):
    return [score.log_prob for rows in scores.values() for score in rows]


def test_every_answer_is_that_of_its_model_and_mixture(shop, job):
    found = {outcome.variant.name: outcome.scores for outcome in compare(job, VARIANTS)}
    assert set(found) == {variant.name for variant in VARIANTS}
    experts = {name: by_hand(load_dense(shop.folder / name)) for name in ("a", "b")}
    bundle = open_bundle(shop.merge("direct", experts=with_prompts(), **ROUTE_ALL))
    static = load_dense(shop.merge("static", assign={"rule": "none"}))
    parts = {name: by_hand(bundle, name) for name in ("a", "b")}
    expected = {
        "base": by_hand(load_dense(shop.folder / "base")),
        "expert a": experts["a"],
        "oracle experts": {name: experts[name][name] for name in ("a", "b")},
        "static plain": by_hand(static),
        "Mediator, oracle routing": {name: parts[name][name] for name in ("a", "b")},
        "Mediator, dense expert alone": by_hand(bundle, "dense"),
    }
    for name, scores in expected.items():
        # Rows that the router left to the dense expert were scored in another batch.
        assert log_probs(found[name]) == pytest.approx(log_probs(scores), rel=0.02)
        assert {task: [s.chosen_right for s in rows] for task, rows in found[name].items()} == {
            task: [s.chosen_right for s in rows] for task, rows in scores.items()
        }
    # A static merge is the dense expert, all others differ.
    assert len({tuple(log_probs(scores)) for scores in expected.values()}) == len(expected) - 1


def test_routed_answers_have_the_mixture_of_their_policy(shop, job):
    found = {outcome.variant.name: outcome.scores for outcome in compare(job, [*routed(), *policies(2)])}
    model, tokenizer = open_bundle(shop.merge("direct", experts=with_prompts(), **ROUTE_ALL)), word_tokenizer()
    for name, policy in {
        "Mediator, router": model.opened.manifest.router.policy,
        "policy posterior": PolicyRecord(rule="posterior", outside="ignore"),
        "policy uniform": PolicyRecord(rule="uniform"),
    }.items():
        for task in TASKS:
            routing = model.route(
                [prompt.ids for prompt in prompt_tokens(tokenizer, [row.prompt for row in task.rows])]
            )
            weights = mix(routing.probabilities, routing.is_outside, policy, routing.experts)
            for row, weight, score in zip(task.rows, weights, found[name][task.name], strict=True):
                mixture = dict(zip("ab", weight.tolist(), strict=True))
                (alone,) = score_rows(model, tokenizer, [row], ScoreSettings(mixture=mixture))
                assert score.log_prob == pytest.approx(alone.log_prob, rel=0.02)
    assert found["policy uniform"] != found["policy argmax"]


def test_a_comparison_that_was_stopped_scores_no_row_twice(job, asked):
    variants = [*references([], crossed=True), *routed(), *policies(2)]
    asked.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        list(compare(job, variants))
    asked.stop_after = None
    resumed = list(compare(job, variants))
    own_work = {(name.rpartition("/")[2], mixture, row) for name, mixture, row in asked.rows}
    assert len(asked.rows) == len(own_work) > 30
    n_calls = len(asked.calls)
    again = list(compare(job, variants))
    assert (again, len(asked.calls)) == (resumed, n_calls)
    # A model that has answered before may mix by its kept matrices, which round otherwise.
    for outcome, other in zip(compare(replace(job, work=job.work / "fresh"), variants), resumed, strict=True):
        assert log_probs(outcome.scores) == pytest.approx(log_probs(other.scores), rel=0.02)


def test_equal_rows_are_scored_once(job, asked):
    rows = TASKS[0].rows
    twice = replace(job, tasks=(Task("a", (*rows, *(row.model_copy() for row in rows))), Task("b", rows)))
    (outcome,) = compare(twice, [Variant("x", "base", "base", answer="dense")])
    assert len(asked.rows) == 4
    assert outcome.scores["a"] == outcome.scores["b"] * 2


def test_bundles_go_when_they_are_done_with_and_what_a_killed_run_left_is_not_trusted(job, asked):
    folders = []
    for outcome in compare(job, list(routed())):
        folders += [] if outcome.variant.answer == "dense" else list((job.work / "bundles").iterdir())
    assert len(set(folders)) == 1
    assert not any((job.work / "bundles").iterdir())
    (folders[0] / "experts").mkdir(parents=True)
    (folders[0] / "config.json").write_text("{}")
    n_calls = len(asked.calls)
    assert len(list(compare(job, list(routed())))) == 3
    assert len(asked.calls) == n_calls
    assert not any((job.work / "bundles").iterdir())
    asked.stop_after = n_calls
    with pytest.raises(KeyboardInterrupt):
        list(compare(replace(job, changes=("seed=1",)), list(routed())))
    assert not any((job.work / "bundles").iterdir())


def test_sizes_are_those_of_what_answers(shop, job):
    lora = {"name": "l", "model": "./lora"}
    direct = read_manifest(shop.merge("direct", **ROUTE_ALL)).sizes
    job = replace(job, recipe=shop.recipe("three.yaml", experts=[*with_prompts(), lora]))
    variants = [*references(["a", "b", "l"], crossed=True)]
    found = {outcome.variant.name: outcome.n_bytes for outcome in compare(job, variants)}
    full = sum(tensor.nbytes for tensor in shop.base.values())
    lora = sum(tensor.nbytes for tensor in load_file(shop.folder / "lora" / "adapter_model.safetensors").values())
    assert found == {
        "base": full, "oracle experts": 3 * full + lora, "expert a": full, "expert b": full, "expert l": full + lora,
    }  # fmt: skip
    two = replace(job, recipe=shop.recipe("two.yaml", **ROUTE_ALL))
    (outcome,) = compare(two, [Variant("x", "oracle")])
    assert outcome.n_bytes == direct.dense + direct.sparse


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant("x", "oracle routing"), "no expert is named like the task 'c'"),
        (Variant("x", "oracle experts", "experts"), "no expert is named like the task 'c'"),
        (Variant("x", "odd", changes=("extract.density=2",), answer="dense"), "less than or equal to 1"),
        (Variant("x", "static", changes=("assign.rule=none",), answer="router"), "the recipe fits no router"),
    ],
)
def test_what_cannot_be_made_or_answered_is_told_before_anything_is_merged(job, monkeypatch, variant, message):
    monkeypatch.setattr(run, "merge", None)
    monkeypatch.setattr(run, "score_rows", None)
    foreign = replace(job, tasks=(*TASKS, Task("c", TASKS[0].rows)))
    with pytest.raises(CheckpointError, match=message):
        list(compare(foreign, [Variant("x", "base", "base", answer="dense"), variant]))


def test_foreign_tasks_are_answered_where_nobody_needs_their_expert(job):
    foreign = replace(job, tasks=(Task("c", TASKS[0].rows),))
    outcomes = list(compare(foreign, [Variant("x", "router", answer="router"), Variant("x", "dense", answer="dense")]))
    assert [list(outcome.scores) for outcome in outcomes] == [["c"], ["c"]]


def test_conflict_is_measured_once_for_the_same_sources(shop, job, monkeypatch):
    told = []
    measure = ablate.analyze_conflicts
    monkeypatch.setattr(ablate, "analyze_conflicts", lambda *given: told.append(given) or measure(*given))
    first, plan = ablate.prepare(job)
    again, _ = ablate.prepare(job)
    assert (again.conflicts, len(told)) == (first.conflicts, 1)
    scores = ablate.conflict_scores(first, plan)
    assert scores == read_manifest(shop.merge("direct", assign={"rule": "mean_std"})).conflict.scores
    assert list(compare(first, [Variant("x", "top", changes=("assign.rule=top_k", "assign.k=1"))]))
    assert len(told) == 1
    assert ablate.prepare(replace(job, conflicts=first.conflicts)) == (first, plan)
    moved = fine_tune(shop.base, 9)
    edit_tensors(shop.folder / "a" / "model.safetensors", lambda tensors: tensors.update(moved))
    changed, plan = ablate.prepare(job)
    assert len(told) == 2
    assert ablate.conflict_scores(changed, plan) != scores


@pytest.mark.parametrize(
    ("fields", "tasks", "message"),
    [
        ({}, (), "there is nothing to answer"),
        ({}, (*TASKS, Task("c", TASKS[0].rows)), "no expert is named like the task 'c'"),
        ({"assign": {"rule": "none"}}, TASKS, "the recipe routes nothing"),
        ({"assign": {"rule": "top_k", "k": 0}}, TASKS, "the recipe routes no unit"),
        ({"experts": with_prompts("a")}, TASKS[:1], "there is one expert"),
    ],
)
def test_what_cannot_be_ablated_is_told_before_anything_is_merged(shop, job, fields, tasks, message):
    recipe = shop.recipe(**{"experts": with_prompts(), **ROUTE_ALL, **fields})
    with pytest.raises(MediatorError, match=message):
        ablate.prepare(replace(job, recipe=recipe, tasks=tasks))


def test_each_variant_is_told_of(job):
    told = []
    list(compare(replace(job, say=told.append), [*references([]), *static_merges({"plain": ()})]))
    assert told == ["1 of 3: reference: base", "2 of 3: reference: oracle experts", "3 of 3: static: static plain"]
