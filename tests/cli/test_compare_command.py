"""`mediator compare` as people call it: table, JSON, files, bundles, what is refused, and that it goes on."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
from conftest import all_files
from tiny_contest import write_contest, write_recipe

from mediator_cli.cli.scatter import Axis, linear_axis, log_axis, on_front, place_labels
from mediator_cli.compare import costs, strategies_run
from mediator_cli.errors import CheckpointError, Problem

STRATEGIES = ["base", "ensemble_uniform", "merge_uniform"]


@pytest.fixture
def contest(workshop, tmp_path, monkeypatch):
    """A tiny contest in the folder that commands run in; looking for garbage takes long here."""
    monkeypatch.setattr(costs, "resident_bytes", lambda: None)
    monkeypatch.setattr(costs, "_TURNS", 1)
    for file in ("base", "a", "b", "lora"):
        (tmp_path / file).rename(tmp_path / f"other-{file}")
    write_contest(tmp_path, n_experts=2, n_rows=3, strategies=STRATEGIES)
    return tmp_path


def test_it_compares_writes_and_goes_on(mediator, contest):
    run = mediator(
        "compare", "recipe.yaml", "--markdown", "t.md", "--plot", "p.html", "--write-best", "best",
        "--write", "ensemble_uniform", "ens",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "1 of 3: base" in run.err
    for name in STRATEGIES:
        assert re.search(rf"^ {name} .* ± ", run.out, flags=re.MULTILINE), run.out
    assert "Best on validation rows, which is what --write-best writes: merge_uniform." in run.out
    assert "Next: mediator generate best" in run.out
    assert "| merge_uniform | merge |" in (contest / "t.md").read_text()
    page = (contest / "p.html").read_text()
    assert "<script" not in page
    assert "default-src 'none'" in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(svg)
    assert page.count(">merge_uniform</text>") == 2
    again = mediator("compare", "recipe.yaml", "--json")
    assert again.err == ""
    data = json.loads(again.out)
    assert [each["name"] for each in data["results"]] == STRATEGIES
    assert data["conditions"]["held_out"] == {"gamma": 3}
    assert mediator("verify", "best").code == mediator("verify", "ens").code == 0
    shown = mediator("inspect", "ens").out
    assert "nothing: every prompt gets the same mixture" in shown
    assert "alpha 0.5 + beta 0.5" in shown
    assert "for every prompt" in mediator("route", "ens", "alpha1").out
    said = json.loads(mediator("generate", "ens", "alpha1", "--json", "--max-new-tokens", "1").out)
    assert said["answers"][0]["mixture"] == {"alpha": 0.5, "beta": 0.5}
    fresh = mediator("compare", "recipe.yaml", "--fresh", "--set", "strategies=[base]")
    assert "1 of 1: base" in fresh.err
    assert len(list((contest / "results" / "strategies").iterdir())) == 1


def test_gates_are_shown_where_they_choose(mediator, contest, monkeypatch):
    run = mediator(
        "compare", "recipe.yaml", "-q", "--set", "strategies=[{name: route_arrow, top_k: 1}]", "--write-best", "out"
    )
    assert run.code == 0, run.err
    assert "gates choose inside the model" in mediator("route", "out", "alpha1 alpha2").out
    facts = json.loads(mediator("route", "out", "alpha1", "--json").out)["prompts"][0]
    assert sum(facts["gates"].values()) == pytest.approx(1)
    assert "gates         arrow: the best 1 of 2 experts for each token" in mediator("inspect", "out").out
    said = mediator("generate", "out", "alpha1", "--max-new-tokens", "1")
    assert "gates choose for every token; over the prompt on average" in said.err
    assert mediator("evaluate", "out", "--tasks", "data/alpha.test.jsonl").code == 0
    assert "--pin: gates choose for every token" in mediator("chat", "out", "--pin").err
    monkeypatch.setattr("builtins.input", iter(["alpha1", "/quit"]).__next__)
    monkeypatch.setattr("mediator_cli.cli.chat._read_line", iter(["alpha1", "beta1", "/quit"]).__next__)
    talk = mediator("chat", "out", "--max-new-tokens", "1")
    assert talk.code == 0, talk.err
    assert talk.err.count("gates choose for every token") == 2


@pytest.mark.parametrize(
    ("words", "place", "message"),
    [
        (("--write", "merge_best", "x"), "--write", "'merge_best' takes no part"),
        (("--write-best", "base"), "/base", "exists"),
        (
            ("--write-best", "x", "--set", "tasks={alpha: {test: data/alpha.test.jsonl}}"),
            "--write-best",
            "the best is chosen on validation rows",
        ),
        (("--write-best", "x", "--write", "base", "x"), "--write", "names the folder of --write-best"),
        (("--plot", "x.docx"), "x.docx", "is not a picture format"),
        (("--set", "strategies=[bass]"), "strategies", "no strategy 'bass'"),
        (("--set", "selection={k: [9]}"), "selection.k", "9 cannot be kept"),
        (("--set", "rows.test=x"), "rows.test", "input should be a valid integer"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(mediator, contest, words, place, message):
    before = all_files(contest)
    run = mediator("compare", "recipe.yaml", *words)
    assert run.code == 2
    assert place in run.err
    assert message in run.err
    assert "Traceback" not in run.err
    assert all_files(contest) == before


def test_a_named_strategy_without_a_result_ends_with_its_reason_after_the_table(mediator, contest, monkeypatch):
    def fail(strategy, bench, parameters):
        if strategy.name == "merge_uniform":
            raise CheckpointError(Problem("alpha", "has too few rows", "give more"))
        return real(strategy, bench, parameters)

    real = strategies_run.run
    monkeypatch.setattr(strategies_run, "run", fail)
    write_recipe(contest, strategies=["base", "merge_uniform"])
    run = mediator("compare", "recipe.yaml")
    assert run.code == 2
    assert "\n base " in run.out
    assert re.search(r"recipe.yaml:\d+ strategies\[1\]: merge_uniform: alpha: has too few rows", run.err), run.err


def test_an_interrupted_run_says_what_is_kept(mediator, contest, monkeypatch):
    def interrupt(strategy, bench, parameters):
        if strategy.name == "merge_uniform":
            raise KeyboardInterrupt
        return real(strategy, bench, parameters)

    real = strategies_run.run
    monkeypatch.setattr(strategies_run, "run", interrupt)
    write_recipe(contest, strategies=["base", "merge_uniform"])
    run = mediator("compare", "recipe.yaml")
    assert run.code == 130
    assert "interrupted; results of 1 of 2 strategies are kept, the same command goes on" in run.err


def test_other_commands_send_such_a_recipe_here(mediator, contest):
    for command in ("merge", "validate", "plan"):
        run = mediator(command, "recipe.yaml")
        assert run.code == 2
        assert "only `mediator compare` takes" in run.err


def test_all_strategies_are_listed_and_the_schema_is_printed(mediator):
    listed = mediator("compare", "--list")
    assert listed.code == 0
    assert "merge_uniform" in listed.out
    assert json.loads(mediator("schema", "compare").out)["title"] == "recipe of kind compare"


def test_the_front_is_what_nothing_beats_on_both():
    assert on_front([(1, 1), (2, 3), (3, 2), (2, 2), (2, 3)]) == [True, True, False, False, True]


def test_axes_hold_all_values_with_round_ticks():
    axis = linear_axis([31.0, 75.0])
    assert axis == Axis(20, 80, (20, 40, 60, 80))
    assert axis.share(50) == 0.5
    times = log_axis([3.0, 48.0])
    assert times.ticks == (5, 10, 20, 50)
    assert 0 < times.share(3.0) < times.share(48.0) < 1


def test_labels_cover_neither_each_other_nor_points():
    points = [(200 + 3 * (n % 5), 150 + 4 * (n // 5)) for n in range(20)]
    names = [f"strategy_{n}" for n in range(20)]
    labels = place_labels(names, points, 800, 400)
    boxes = [(label.x, label.y, 6.3 * len(name) / 2) for label, name in zip(labels, names, strict=True)]
    for at, (x, y, half) in enumerate(boxes):
        assert half <= x <= 800 - half
        assert all(abs(x - a) >= half + other - 1e-9 or abs(y - b) >= 13 - 1e-9 for a, b, other in boxes[:at])
