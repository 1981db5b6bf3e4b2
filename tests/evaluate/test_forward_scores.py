"""Scores of batches against scores of single sequences, for every type of model that takes trees."""

from random import Random

import pytest
import torch
from tiny_models import make_model

from mediator_cli.evaluate import forward
from mediator_cli.evaluate.forward import TREE_MODELS, Limits, make_job, score_alike
from mediator_cli.evaluate.layout import Query

ENDS = (2, 3)
SMALL = Limits(n_pass=256, n_bin=48)
# gemma2 caps attention scores, which torch's fused attention cannot.
EAGER = {"gemma2"}
SIZES = {"gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2}}


@pytest.fixture
def model():
    return make_model()


def draw_queries(n, opening=10, seed=0):
    rng = Random(seed)
    first = [rng.randrange(6, 66) for _ in range(opening)]
    queries = []
    for _ in range(n):
        prompt = (*first, rng.randrange(6, 10), *(rng.randrange(6, 66) for _ in range(rng.randrange(1, 12))))
        for _ in range(rng.randrange(1, 4)):
            answer = tuple(rng.randrange(6, 66) for _ in range(rng.randrange(1, 4)))
            queries.append(Query(prompt, answer, rng.random() < 0.7))
    return queries


@torch.no_grad()
def alone(model, query):
    """Score one query by one pass over its own sequence."""
    scores = model(input_ids=torch.tensor([[*query.prompt, *query.answer]])).logits[0].log_softmax(-1)
    total, greedy = 0.0, True
    for at, token in enumerate(query.answer, len(query.prompt) - 1):
        total += scores[at, token].item()
        greedy &= scores[at].argmax().item() == token
    if query.ends:
        total += scores[-1, list(ENDS)].logsumexp(-1).item()
        greedy &= scores[-1].argmax().item() in ENDS
    return greedy, total


def assert_as_alone(model, queries, found):
    for index, query in enumerate(queries):
        greedy, total = alone(model, query)
        assert found[index].log_prob == pytest.approx(total, abs=2e-4)
        assert found[index].greedy == greedy


SOME_TREE_MODELS = [
    pytest.param(kind, marks=[pytest.mark.slow] if kind in ("seed_oss", "smollm3") else [])
    for kind in sorted(TREE_MODELS)
]


@pytest.mark.parametrize("kind", SOME_TREE_MODELS)
def test_trees_score_as_single_sequences(kind):
    model = make_model(kind, **SIZES.get(kind, {}))
    model.set_attn_implementation("eager" if kind in EAGER else "sdpa")
    queries = draw_queries(12)
    job = make_job(model, queries, ENDS, SMALL)
    assert job.is_tree
    assert_as_alone(model, queries, dict(score_alike(job, range(len(queries)))))


@pytest.mark.parametrize("kind", ["bloom", "opt", "mamba"])
def test_other_models_get_padded_sequences(kind):
    model = make_model(kind)
    queries = draw_queries(8)
    job = make_job(model, queries, ENDS, SMALL)
    assert not job.is_tree
    assert_as_alone(model, queries, dict(score_alike(job, range(len(queries)))))


@pytest.mark.parametrize("opening", [0, 3, 20])
def test_a_shared_opening_changes_no_score(model, opening, monkeypatch):
    queries = draw_queries(12, opening)
    job = make_job(model, queries, ENDS, SMALL)
    with_cache = dict(score_alike(job, range(len(queries))))
    monkeypatch.setattr(forward, "_LEAST_OPENING", 1000)
    without = dict(score_alike(job, range(len(queries))))
    for index, scored in with_cache.items():
        assert scored.log_prob == pytest.approx(without[index].log_prob, abs=1e-4)
        assert scored.greedy == without[index].greedy


def test_the_opening_is_computed_once(model):
    queries = draw_queries(40, opening=30)
    widths = []
    model.register_forward_pre_hook(lambda m, a, k: widths.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    list(score_alike(make_job(model, queries, ENDS, SMALL), range(len(queries))))
    longest = max(len(query.fed) for query in queries)
    assert widths[0] == (1, 30)
    assert sum(rows * width for rows, width in widths[1:]) < len(queries) * (longest - 30)


def test_a_sequence_longer_than_the_window_is_not_packed():
    model = make_model("mistral", sliding_window=16)
    queries = draw_queries(6, opening=10)
    job = make_job(model, queries, ENDS, SMALL)
    assert not job.is_tree
    assert_as_alone(model, queries, dict(score_alike(job, range(len(queries)))))
    short = [Query(query.prompt[:8], query.answer) for query in queries]
    assert make_job(model, short, ENDS).is_tree


def test_many_logits_are_read_in_parts(model, monkeypatch):
    queries = draw_queries(20)
    whole = dict(score_alike(make_job(model, queries, ENDS), range(len(queries))))
    monkeypatch.setattr(forward, "_LOGIT_ROWS", 3)
    parts = dict(score_alike(make_job(model, queries, ENDS), range(len(queries))))
    assert {i: s.log_prob for i, s in parts.items()} == pytest.approx({i: s.log_prob for i, s in whole.items()})
