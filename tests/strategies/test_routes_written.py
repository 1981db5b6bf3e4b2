"""Routers of strategies in a bundle: they answer there as they did on the bench."""

import pytest
from tiny_contest import write_contest

from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.compare.contest_job import prepare_contest
from mediator_cli.compare.entries import Entry
from mediator_cli.compare.write import write_strategy
from mediator_cli.evaluate.score import score_rows
from mediator_cli.recipe.compare import load_compare
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import load_tokenizer
from mediator_cli.strategies.fitting import run
from mediator_cli.strategies.registry import get_strategy

CHOSEN = {
    "route_smile": {"rank": 2, "gate_rank": 2},
    "route_e_wemoe": {"steps": 2},
    "route_twin_merging": {"rank": 2},
    "mediator": {"features": "text"},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_compare(write_contest(tmp_path_factory.mktemp("contest"), n_rows=8))


@pytest.fixture(scope="module")
def contest(loaded):
    return prepare_contest(loaded, Access(offline=True))[0]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_bundle_of_a_router_answers_as_on_the_bench(name, contest, loaded, tmp_path):
    entry = Entry(name, get_strategy(name, "test"), CHOSEN[name])
    fitted = run(entry.strategy, contest.bench, CHOSEN[name])
    folder = write_strategy(contest, loaded, entry, fitted, tmp_path / "out")
    assert verify_bundle(folder).problems == ()
    model, tokenizer = open_bundle(folder), load_tokenizer(folder)
    for task in contest.bench.tasks:
        rows = list(task.test)
        found = [score.log_prob for score in score_rows(model, tokenizer, rows)]
        wanted = [score.log_prob for score in contest.bench.score(fitted, task, rows)]
        assert found == pytest.approx(wanted, abs=1e-4)
