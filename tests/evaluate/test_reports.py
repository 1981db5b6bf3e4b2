"""Numbers of a report by hand, and intervals against a bootstrap that draws rows."""

import numpy as np
import pytest

from mediator_cli.evaluate.report import (
    Difference,
    ModelResult,
    Report,
    TaskResult,
    compare,
    markdown,
    mean_over_tasks,
    task_result,
    with_short_names,
)
from mediator_cli.evaluate.score import RowScore


def test_a_task_is_summed_up():
    scores = [RowScore(True, True, -1.0, 9), RowScore(False, True, -2.0, 9), RowScore(True, False, -3.0, 9)]
    assert task_result("t", scores) == TaskResult(
        "t", 3, pytest.approx(2 / 3), pytest.approx(1 / 3), pytest.approx(2 / 3), pytest.approx(-2.0)
    )
    exact = np.array([1.0, 0.0, 1.0])
    assert task_result("t", scores).standard_error == pytest.approx(exact.std(ddof=1) / np.sqrt(3))


def test_one_row_has_no_error_and_mixed_rows_no_choice_accuracy():
    assert task_result("t", [RowScore(True, None, -1.0, 9)]).standard_error is None
    mixed = [RowScore(True, None, -1.0, 9), RowScore(True, True, -1.0, 9)]
    assert task_result("t", mixed).choice_accuracy is None


def test_the_mean_weighs_tasks_alike():
    tasks = [TaskResult("a", 10, 0.5, 0.03, None, 0.0), TaskResult("b", 90, 0.9, 0.04, None, 0.0)]
    assert mean_over_tasks(tasks) == (pytest.approx(0.7), pytest.approx(0.025))
    assert mean_over_tasks([*tasks, TaskResult("c", 1, 1.0, None, None, 0.0)])[1] is None


def test_intervals_are_those_of_drawn_rows():
    rng = np.random.default_rng(5)
    first = {task: (rng.random(80) < 0.5).tolist() for task in ("a", "b")}
    other = {task: (rng.random(80) < 0.65).tolist() for task in ("a", "b")}
    a, b, mean = compare({"first": first, "other": other})
    drawn = {}
    for task, found in (("a", a), ("b", b)):
        gains = np.array(other[task], float) - np.array(first[task], float)
        drawn[task] = gains[rng.integers(0, 80, (10_000, 80))].mean(1)
        assert (found.model, found.task, found.difference) == ("other", task, pytest.approx(gains.mean()))
        assert (found.low, found.high) == pytest.approx(np.quantile(drawn[task], [0.025, 0.975]), abs=0.015)
    both = (drawn["a"] + drawn["b"]) / 2
    assert mean.task is None
    assert (mean.low, mean.high) == pytest.approx(np.quantile(both, [0.025, 0.975]), abs=0.015)


def test_tasks_that_differ_by_opposite_rows_do_not_cancel():
    up, down = [True] * 10 + [False] * 90, [False] * 90 + [True] * 10
    first = {"a": [False] * 100, "b": [True] * 100}
    other = {"a": up, "b": [not right for right in down]}
    mean = compare({"first": first, "other": other})[-1]
    assert mean.difference == pytest.approx(0.0)
    assert mean.high - mean.low > 0.05


def test_the_same_answers_differ_by_nothing():
    right = {"t": [True, False, True]}
    assert compare({"x": right, "y": right}) == (Difference("y", "t", 0.0, 0.0, 0.0),)
    assert compare({"x": right}) == ()


def test_markdown():
    tasks = (TaskResult("sums", 200, 0.5, 0.0354, None, -1.0), TaskResult("films", 100, 0.75, 0.0433, 0.8, -1.0))
    first = ModelResult("a|b", tasks, 0.625, 0.028, 269_000_000, None, 0.0312)
    other = ModelResult("out", tasks, 0.625, 0.028, 333_400_000, 512_000_000, 0.05)
    differences = (Difference("out", "sums", 0.1, 0.0, 0.2), Difference("out", None, -0.012, -0.03, 0.001))
    assert markdown(Report((first, other), differences)) == (
        "| model | sums | films | mean | disk | memory | s/answer |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n"
        "| a\\|b | 50.0 ± 3.5 | 75.0 ± 4.3 (80.0) | 62.5 ± 2.8 | 269 MB |  | 0.031 |\n"
        "| out | 50.0 ± 3.5 | 75.0 ± 4.3 (80.0) | 62.5 ± 2.8 | 333 MB | 512 MB | 0.050 |\n"
        "\n"
        "Per cent of rows answered exactly, ± standard error; rows: sums 200, films 100.\n"
        "In brackets: per cent of rows whose answer is the most probable of the choices.\n"
        "out against a|b on the mean over tasks: -1.2 points, 95 % interval -3.0 to +0.1.\n"
    )


def test_names_are_shortened_where_they_stay_apart():
    def report(*names):
        models = tuple(ModelResult(name, (), 0.5, None, 1, None, 0.1) for name in names)
        return Report(models, (Difference(names[1], None, 0.0, 0.0, 0.0),))

    assert with_short_names(report("/x/out", "/x/out::a")) == report("out", "out::a")
    alike = report("/x/out", "/y/out")
    assert with_short_names(alike) == alike
