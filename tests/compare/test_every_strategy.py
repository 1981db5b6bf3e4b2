"""Every strategy there is, with its defaults, on a tiny library: it fits, answers, is written, and answers the same."""

import pytest
from tiny_contest import write_contest

from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.compare.contest_job import prepare_contest
from mediator_cli.compare.strategies_run import fit, hold_contest
from mediator_cli.compare.write import write_strategy
from mediator_cli.errors import OutputError
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.recipe.compare import load_compare
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import load_tokenizer
from mediator_cli.strategies.registry import strategies

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_compare(write_contest(tmp_path_factory.mktemp("every"), n_rows=12, strategies=None))


@pytest.fixture(scope="module")
def contest(loaded):
    made, notices = prepare_contest(loaded, Access(offline=True))
    assert notices == ()
    assert [entry.label for entry in made.entries] == list(strategies())
    return made


@pytest.mark.parametrize("name", list(strategies()))
def test_a_bundle_of_it_answers_with_the_scores_of_the_table(name, contest, loaded, tmp_path):
    entry = next(entry for entry in contest.entries if entry.label == name)
    contest.wanted, before = frozenset([name]), contest.entries
    contest.entries = (entry,)
    (outcome,) = hold_contest(contest)
    contest.entries = before
    assert outcome.answered is not None, outcome.problems
    if name == "oracle":
        with pytest.raises(OutputError):
            write_strategy(contest, loaded, entry, fit(contest, entry), tmp_path / "out")
        return
    folder = write_strategy(contest, loaded, entry, fit(contest, entry), tmp_path / "out")
    assert verify_bundle(folder).problems == ()
    model, tokenizer = open_bundle(folder), load_tokenizer(folder)
    is_mixed = model.opened.router is not None or model.gating is not None
    settings = ScoreSettings(mixture=None if is_mixed else "dense")
    for task in contest.tasks:
        found = score_rows(model, tokenizer, list(task.test), settings)
        wanted = outcome.answered.scores[task.name]
        assert [score.log_prob for score in found] == pytest.approx([score.log_prob for score in wanted], abs=1e-4)
        assert [score.exact for score in found] == [score.exact for score in wanted]
