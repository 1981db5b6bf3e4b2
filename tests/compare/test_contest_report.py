"""The numbers of a contest's report: means, paired differences, marks, conclusions, tables."""

import math

import numpy as np
import pytest

from mediator_cli.compare.contest import Answered, Cost
from mediator_cli.compare.contest_report import Conditions, as_json, report_of
from mediator_cli.compare.contest_table import cells, markdown, notes, selection_cells
from mediator_cli.compare.paired import Mean, difference_of, mean_of
from mediator_cli.compare.result import Kept, NotKept
from mediator_cli.compare.strategies_run import Outcome
from mediator_cli.errors import Problem
from mediator_cli.evaluate.score import RowScore
from mediator_cli.strategies.bench import TaskRows


class Entry:
    """What the report reads of an entry."""

    def __init__(self, name, group):
        self.label, self.parameters = name, {"scale": 1.0}
        self.strategy = type("Strategy", (), {"name": name, "group": group, "reference": "https://x"})


def rows(right, n=100, log_prob=-1.0):
    """The first rows right, the others wrong."""
    return tuple(RowScore(at < right, None, log_prob, 3) for at in range(n))


def outcome(name, group, a, b, held_out=10, valid=None, passes=1.0, n_bytes=0):
    valid = (a if valid is None else valid) // 10
    scores = {"a": rows(a), "b": rows(b), "new": rows(held_out)}
    own = {"a": rows(valid, 10), "b": rows(valid, 10)}
    return Outcome(Entry(name, group), Answered(scores, own, Cost(passes, n_bytes, 1.0, 0.02, 3_000_000)))


CONDITIONS = Conditions("1", "base", ("x", "y"), {"a": 100, "b": 100}, {"new": 100}, 2, 30, 270_000_000, 0)
TASKS = (TaskRows("a", expert="x"), TaskRows("b", expert="y"), TaskRows("new"))
OUTCOMES = (
    outcome("base", "reference", 20, 20, held_out=30),
    outcome("oracle", "reference", 99, 99, held_out=30),
    outcome("ensemble_uniform", "ensemble", 60, 60, held_out=60, passes=2),
    outcome("ensemble_learned", "ensemble", 80, 80, held_out=31, passes=2, n_bytes=5),
    outcome("merge_uniform", "merge", 50, 50),
    outcome("merge_ties", "merge", 51, 50, valid=60),
    outcome("route_arrow", "route", 80, 79, passes=1.5),
    Outcome(Entry("merge_lost", "merge"), None, (Problem("rows", "are too few"),)),
)


@pytest.fixture(scope="module")
def report():
    kept = (
        Kept("mbc", "medoid", "merge", 1, ("x",), Mean(0.5, 0.1, 1.0, 2), None, 1.0, 3),
        Kept("mbc", "medoid", "merge", 2, ("x", "y"), Mean(0.625, 0.125, 1.0, 2), None, 1.0, 6),
        Kept("random", None, "route", 2, ("x", "y"), Mean(0.25, None, 1.0, 2), None, 1.0, 6),
        NotKept("greedy, 2 kept", (Problem("prompts", "x has 3 usable prompts"),)),
    )
    return report_of(OUTCOMES, TASKS, CONDITIONS, ("a notice",), kept)


def test_means_are_over_tasks_with_their_error():
    found = mean_of({"a": rows(80), "b": rows(20, 40, -3.0)}, ["a", "b"])
    assert found.accuracy == pytest.approx((0.8 + 0.5) / 2)
    assert found.standard_error == pytest.approx(math.sqrt(0.16 / 99 + 0.25 / 39) / 2)
    assert (found.loss, found.n_tasks) == (2.0, 2)
    assert mean_of({"a": rows(1)}, ["a", "b"]) is None
    assert mean_of({"a": rows(1)}, []) is None


@pytest.mark.parametrize("tasks", [["a"], ["a", "b"]])
def test_paired_differences_are_those_of_a_plain_bootstrap(tasks):
    rng = np.random.default_rng(5)
    one, other = (
        {task: tuple(RowScore(bool(x), None, -1, 1) for x in rng.random(60) < share) for task in tasks}
        for share in (0.7, 0.5)
    )
    found = difference_of(one, other, tasks, name="x")
    gains = [np.array([a.exact - b.exact for a, b in zip(one[t], other[t], strict=True)], float) for t in tasks]
    assert found.difference == pytest.approx(np.mean([gain.mean() for gain in gains]))
    draws = np.mean([rng.choice(gain, (20000, len(gain))).mean(1) for gain in gains], axis=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert found.model == "x"


def test_the_best_and_those_that_cannot_be_told_from_it_are_marked(report):
    by_name = {each.name: each for each in report.results}
    assert (report.best, report.winner) == ("ensemble_learned", "route_arrow")
    assert by_name["ensemble_learned"].behind is None
    assert by_name["route_arrow"].is_level
    assert not by_name["merge_uniform"].is_level
    assert by_name["merge_uniform"].behind.difference == pytest.approx(-0.3)


def test_the_cheapest_of_equals_on_validation_rows_wins():
    two = (
        outcome("b", "merge", 50, 50, passes=1.5),
        outcome("a", "merge", 10, 10, valid=50),
        outcome("c", "merge", 5, 5, valid=50, n_bytes=1),
    )
    assert report_of(two, TASKS, CONDITIONS).winner == "a"


def test_the_questions_are_answered_from_the_numbers(report):
    said = {each.question: each for each in report.conclusions}
    assert list(said) == [
        "Does non-uniform beat uniform ensembling?",
        "Does non-uniform beat uniform merging?",
        "Does routing beat ensembling?",
        "Does routing beat merging?",
        "What is the cheapest within one point of the best?",
        "Does the best ensemble help on held-out tasks?",
        "Does the best merge help on held-out tasks?",
        "Does the best route help on held-out tasks?",
    ]
    first = said["Does non-uniform beat uniform ensembling?"]
    assert (first.one, first.other, first.difference.difference) == (
        "ensemble_learned",
        "ensemble_uniform",
        pytest.approx(0.2),
    )
    assert first.answer.startswith("yes: ensemble_learned against ensemble_uniform +20.0 points, 95 % interval +")
    # merge_ties speaks for the others by its validation rows, and one test row more is no difference.
    assert said["Does non-uniform beat uniform merging?"].answer.startswith("not told apart by these rows: merge_ties")
    assert said["Does routing beat merging?"].answer.startswith("yes: route_arrow against merge_ties")
    cheap = said["What is the cheapest within one point of the best?"]
    assert cheap.answer == ("route_arrow: 79.5 % (best 80.0 %, ensemble_learned), 1.50 passes, 0.0 MB beside the base")
    assert said["Does the best merge help on held-out tasks?"].answer.startswith(
        "no, worse: merge_ties against base -20.0"
    )
    assert said["Does the best ensemble help on held-out tasks?"].difference.difference == pytest.approx(0.01)


def test_nothing_is_concluded_where_nothing_can_be_compared():
    assert report_of(OUTCOMES[:2], TASKS, CONDITIONS).conclusions == ()
    assert report_of(OUTCOMES[:2], TASKS, CONDITIONS).best is None
    only = report_of([OUTCOMES[4], OUTCOMES[5]], TASKS[:2], CONDITIONS)
    assert [each.question for each in only.conclusions] == [
        "Does non-uniform beat uniform merging?",
        "What is the cheapest within one point of the best?",
    ]


def test_the_table_has_a_row_for_each_with_numbers_in_per_cent(report):
    columns, table = cells(report)
    assert columns[:5] == ("strategy", "group", "", "seen#", "held out#")
    assert table[0] == ("base", "reference", "", "20.0 ± 2.8", "30.0 ± 4.6", "1.00", "1.00", "0.0", "20", "3", "1.0 s")
    assert [row[2] for row in table] == ["", "", "", "★", "", "", "≈"]
    assert "merge_lost has no result: rows: are too few" in list(notes(report))
    assert cells(report_of(OUTCOMES, TASKS[:2], replace_held_out()))[0][4] == "-ln p#"


def replace_held_out():
    return Conditions(**{**vars(CONDITIONS), "held_out": {}})


def test_selections_are_a_table_of_their_own(report):
    columns, table = selection_cells(report)
    assert columns == ("kept by", "answer as", "1 kept#", "2 kept#")
    assert table == [("mbc (medoid)", "merge", "50.0 ± 10.0", "62.5 ± 12.5"), ("random", "route", "–", "25.0")]


def test_markdown_and_json_hold_the_same(report):
    text = markdown(report)
    assert "| ensemble_learned | ensemble | ★ | 80.0 ± 2.8 |" in text
    assert "| mbc (medoid) | merge | 50.0 ± 10.0 | 62.5 ± 12.5 |" in text
    assert "- Does routing beat merging? yes: route_arrow" in text
    data = as_json(report)
    assert data["results"][3]["seen"]["accuracy"] == 0.8
    assert data["results"][6]["is_level_with_best"] is True
    assert data["selection"][1]["experts"] == ("x", "y")
    no_routes = ("greedy, 2 kept", "prompts: x has 3 usable prompts")
    assert data["failed"] == (("merge_lost", "rows: are too few"), no_routes)
