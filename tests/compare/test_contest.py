"""A contest on a tiny library: what it measures, keeps and writes; bundles answer with the table's scores."""

from dataclasses import replace
from typing import Annotated

import pytest
import torch
from pydantic import Field
from tiny_contest import write_contest, write_recipe

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.compare import costs
from mediator_cli.compare.contest import Answered, Cost, load_answered, save_answered
from mediator_cli.compare.contest_job import prepare_contest, report_contest
from mediator_cli.compare.costs import cost_of
from mediator_cli.compare.entries import Entry
from mediator_cli.compare.strategies_run import fit, forget, hold_contest
from mediator_cli.compare.write import write_strategy
from mediator_cli.errors import CheckpointError, OutputError, Problem
from mediator_cli.evaluate.score import RowScore, ScoreSettings, score_rows
from mediator_cli.pipeline.router import route_texts
from mediator_cli.recipe.compare import load_compare
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.runtime.gating import gate_sizes
from mediator_cli.runtime.open import open_bundle
from mediator_cli.runtime.prompts import load_tokenizer
from mediator_cli.strategies.library import summed
from mediator_cli.strategies.strategy import ByTask, Fitted, Fixed, strategy

OFFLINE = Access(offline=True)
URL = "https://arxiv.org/abs/2603.03535"


@strategy(group="reference", reference=URL)
def plain(bench):
    """Let the base answer."""
    return Fitted()


@strategy(group="reference", reference=URL)
def told(bench):
    """Let the expert of the task answer."""
    return Fitted(bench.library.experts, decision=ByTask({task.name: {task.expert: 1.0} for task in bench.seen}))


@strategy(group="merge", reference=URL)
def folded_half(bench, *, scale: Annotated[float, Field(gt=0, description="Factor.")] = 0.5):
    """Fold all experts in."""
    return Fitted(
        folded=(summed([(change, scale) for change in bench.library.experts.values()]),), facts={"scale": scale}
    )


@strategy(group="merge", reference=URL)
def weighed(bench):
    """Mix parameters with weights that are no shares, one of them none."""
    return Fitted(bench.library.experts, decision=Fixed({"alpha": 0.75, "beta": -0.5, "gamma": 0.0}))


@strategy(group="ensemble", reference=URL)
def voted(bench):
    """Average probabilities of two experts."""
    return Fitted(bench.library.experts, decision=Fixed({"alpha": 0.25, "gamma": 0.75}), combine="probabilities")


def gates_of(bench, rule):
    generator = torch.Generator().manual_seed(7)
    names = tuple(bench.library.experts)
    sizes = gate_sizes(bench.model) if rule.at == "module" else {f"model.layers.{n}": 16 for n in range(2)}
    gates = {
        name: Gate(torch.randn(len(names), 1, width, generator=generator), torch.zeros(len(names)))
        for name, width in sizes.items()
    }
    return Gates("random", rule, names, gates)


@strategy(group="route", reference=URL)
def gated(bench):
    """Let gates choose two experts for each token, beside what is folded in."""
    shared = summed([(change, 0.3) for change in bench.library.experts.values()])
    return Fitted(bench.library.experts, (shared,), gates_of(bench, GateRule(top_k=2)))


@strategy(group="route", reference=URL)
def gated_by_sequence(bench):
    """Let gates of layers choose for each sequence."""
    return Fitted(bench.library.experts, decision=gates_of(bench, GateRule(at="layer", per="sequence")))


@strategy(group="merge", reference=URL)
def broken(bench):
    """Fail, as a strategy does that cannot work with these rows."""
    raise CheckpointError(Problem("rows", "are too few"))


ALL = (plain, told, folded_half, weighed, voted, gated, gated_by_sequence, broken)


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Look for garbage and repeat measurements where that is the point alone: both take long here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "resident_bytes", lambda: None)
        patch.setattr(costs, "_TURNS", 1)
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_compare(write_contest(tmp_path_factory.mktemp("contest"), n_rows=4))


@pytest.fixture(scope="module")
def contest(loaded):
    """A contest of this file's own strategies; the model is loaded once."""
    made, _ = prepare_contest(loaded, OFFLINE)
    return replace_entries(made, ALL)


def replace_entries(contest, chosen, **parameters):
    contest.entries = tuple(
        Entry(each.name, each, each.schema().model_dump() | parameters.get(each.name, {})) for each in chosen
    )
    return contest


@pytest.fixture(scope="module")
def outcomes(contest):
    return {outcome.entry.label: outcome for outcome in hold_contest(contest)}


@pytest.fixture(scope="module")
def report(contest, outcomes, loaded):
    return report_contest(contest, loaded)


def rows_of(contest):
    return {task.name: list(task.test) for task in contest.tasks}


def logs(scores):
    return [score.log_prob for score in scores]


def test_a_folded_merge_answers_like_the_model_with_dense_deltas_added(contest, outcomes):
    task = contest.tasks[0]
    model = contest.bench.model
    before = {}
    for mixer, module in zip(model.opened.mixers, model.opened.modules, strict=True):
        weight = module.weight
        before[mixer.name] = weight.detach().clone()
        deltas = [change[mixer.name] for change in contest.bench.library.experts.values() if mixer.name in change]
        with torch.no_grad():
            weight += sum(0.5 * delta.b.double() @ delta.a.double() for delta in deltas).float()
    dense = score_rows(model, contest.bench.tokenizer, list(task.test), ScoreSettings(mixture="dense"))
    for mixer, module in zip(model.opened.mixers, model.opened.modules, strict=True):
        with torch.no_grad():
            module.weight.copy_(before[mixer.name])
    assert logs(outcomes["folded_half"].answered.scores["alpha"]) == pytest.approx(logs(dense), abs=1e-4)


def test_every_task_is_answered_but_those_that_a_reference_does_not_know(outcomes):
    assert list(outcomes["plain"].answered.scores) == ["alpha", "beta", "delta", "gamma"]
    assert list(outcomes["plain"].answered.valid) == ["alpha", "beta", "gamma"]
    assert list(outcomes["told"].answered.scores) == ["alpha", "beta", "gamma"]
    assert outcomes["folded_half"].answered.facts == {"scale": 0.5}


def test_a_strategy_that_cannot_work_is_told_and_the_others_go_on(outcomes, report):
    assert outcomes["broken"].answered is None
    assert report.failed == (("broken", "rows: are too few"),)
    assert [each.name for each in report.results] == [each.name for each in ALL[:-1]]


def test_passes_and_bytes_are_those_counted_by_hand(contest, outcomes):
    whole = sum(parameter.numel() for parameter in contest.bench.model.parameters())
    size = {
        name: sum(delta.a.numel() + delta.b.numel() for delta in change.values())
        for name, change in contest.bench.library.experts.items()
    }
    cost = {name: outcome.answered.cost for name, outcome in outcomes.items() if outcome.answered}
    assert cost["plain"].passes == cost["folded_half"].passes == 1
    assert cost["plain"].n_bytes == cost["folded_half"].n_bytes == 0
    assert cost["weighed"].passes == pytest.approx(1 + (size["alpha"] + size["beta"]) / whole)
    assert cost["voted"].passes == pytest.approx(2 + (size["alpha"] + size["gamma"]) / whole)
    assert cost["told"].passes == pytest.approx(1 + sum(size.values()) / 3 / whole)
    gates = 3 * sum(gate_sizes(contest.bench.model).values())
    assert cost["gated"].passes == pytest.approx(1 + (2 / 3 * sum(size.values()) + gates) / whole)
    assert cost["gated"].n_bytes == 4 * (sum(size.values()) + gates + 3 * len(gate_sizes(contest.bench.model)))
    assert cost["voted"].n_bytes == 4 * sum(size.values())


@pytest.mark.parametrize("name", ["folded_half", "weighed", "voted", "gated", "gated_by_sequence"])
def test_a_written_strategy_answers_with_the_scores_of_the_table(name, contest, outcomes, loaded, tmp_path):
    entry = outcomes[name].entry
    folder = write_strategy(contest, loaded, entry, fit(contest, entry), tmp_path / "out", told="Seen: 1 %.")
    found = verify_bundle(folder)
    assert (found.problems, found.unknown) == ((), ())
    model, tokenizer = open_bundle(folder), load_tokenizer(folder)
    mixture = "dense" if name == "folded_half" else None
    for task, rows in rows_of(contest).items():
        scores = score_rows(model, tokenizer, rows, ScoreSettings(mixture=mixture))
        wanted = outcomes[name].answered.scores[task]
        assert logs(scores) == pytest.approx(logs(wanted), abs=1e-5)
        assert [score.exact for score in scores] == [score.exact for score in wanted]
    card = (folder / "README.md").read_text()
    assert f"`{name}`" in card
    assert "Seen: 1 %." in card


def test_the_manifest_says_what_was_made_of_what(contest, outcomes, loaded, tmp_path):
    def written(name):
        entry = outcomes[name].entry
        return read_manifest(write_strategy(contest, loaded, entry, fit(contest, entry), tmp_path / name))

    dense, mixed, gated_ = written("folded_half"), written("weighed"), written("gated")
    assert (dense.schema_version, dense.sparse, dense.router) == (2, (), None)
    assert [source.name for source in dense.experts] == ["alpha", "beta", "gamma"]
    assert set(dense.assignment.values()) == {"average"}
    assert (dense.methods[0].method, dense.methods[0].parameters) == ("folded_half", {"scale": 0.5})
    # Who has no weight is left out.
    assert [source.name for source in mixed.experts] == ["alpha", "beta"]
    assert mixed.schema_version == 5
    assert mixed.router.policy.weights == {"alpha": 0.75, "beta": -0.5}
    assert (mixed.router.features, mixed.router.policy.rule, mixed.extract.mode) == ("none", "fixed", "factors")
    assert mixed.assignment["model.layers.0"] == "route"
    assert mixed.assignment["model.embed_tokens"] == "average"
    assert (gated_.gates.method, gated_.gates.rule.top_k, gated_.router) == ("random", 2, None)
    assert gated_.extract.dense == "average"
    assert mixed.recipe.text == loaded.text
    assert mixed.base.files[0].digest
    assert mixed.experts[0].files[0].digest


def test_stored_factors_are_those_of_the_adapter(contest, outcomes, loaded, tmp_path):
    entry = outcomes["weighed"].entry
    folder = write_strategy(contest, loaded, entry, fit(contest, entry), tmp_path / "out")
    model = open_bundle(folder)
    name = next(iter(contest.bench.library.experts["alpha"]))
    stored = next(
        mixer.matrix.deltas.bundle.delta("alpha", name) for mixer in model.opened.mixers if mixer.name == name
    )
    own = contest.bench.library.experts["alpha"][name]
    assert torch.equal(stored.a, own.a)
    assert torch.equal(stored.b, own.b)


def test_gates_and_fixed_mixtures_are_shown_by_route(contest, outcomes, loaded, tmp_path):
    for name in ("gated", "weighed"):
        entry = outcomes[name].entry
        write_strategy(contest, loaded, entry, fit(contest, entry), tmp_path / name)
    record, routing = route_texts(tmp_path / "gated", ["alpha1 alpha2", "beta1"])
    assert record is None
    assert routing.weights.shape == (2, 3)
    assert routing.weights.sum(axis=1) == pytest.approx([1, 1])
    record, routing = route_texts(tmp_path / "weighed", ["alpha1", "beta1"])
    assert record.features == "none"
    assert routing.weights.tolist() == [[0.75, -0.5]] * 2


def test_what_only_a_task_tells_cannot_be_written(contest, outcomes, loaded, tmp_path):
    entry = outcomes["told"].entry
    with pytest.raises(OutputError, match="which no user does"):
        write_strategy(contest, loaded, entry, fit(contest, entry), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(contest, outcomes, loaded, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mediator_cli.compare.write.write_gates", fail)
    entry = outcomes["gated"].entry
    with pytest.raises(OutputError, match="no space left"):
        write_strategy(contest, loaded, entry, fit(contest, entry), tmp_path / "out")
    assert not any(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="exists"):
        write_strategy(contest, loaded, entry, fit(contest, entry), tmp_path / "out")


def test_what_was_found_is_not_computed_again(contest, outcomes, loaded, monkeypatch):
    again, _ = prepare_contest(loaded, OFFLINE)
    replace_entries(again, ALL[:3])
    monkeypatch.setattr("mediator_cli.compare.strategies_run.open_bench", lambda *_: pytest.fail("loads the base"))
    found = {outcome.entry.label: outcome for outcome in hold_contest(again)}
    assert {name: outcome.answered for name, outcome in found.items()} == {
        name: outcomes[name].answered for name in ("plain", "told", "folded_half")
    }
    # Another parameter is another strategy.
    replace_entries(again, (folded_half,), folded_half={"scale": 0.25})
    assert not again.file_of(again.entries[0]).exists()
    again.seed = 5
    replace_entries(again, (folded_half,))
    assert not again.file_of(again.entries[0]).exists()


def test_the_key_of_results_follows_rows_and_factors(contest, loaded, tmp_path):
    entry = contest.entries[0]
    base = contest.file_of(entry)
    fewer = replace(contest, tasks=contest.tasks[:-1])
    assert fewer.file_of(entry) != base
    other = replace(contest, sources=replace(contest.sources, digest="0"))
    assert other.file_of(entry) != base
    assert replace(contest).file_of(entry) == base
    copy = replace(contest, folder=tmp_path)
    save_answered(copy.file_of(entry), Answered({}, {}, Cost(1, 0, 0)))
    forget(copy)
    assert load_answered(copy.file_of(entry)) is None


def test_results_come_back_from_disk_as_they_were(tmp_path):
    rows = (RowScore(True, None, -0.5, 7), RowScore(False, True, -2.25, 3))
    kept = Answered({"a": rows}, {"a": rows[:1]}, Cost(1.5, 10, 0.25, 0.5, None), {"weights": {"x": 0.1}})
    save_answered(tmp_path / "x.json", kept)
    assert load_answered(tmp_path / "x.json") == kept
    (tmp_path / "x.json").write_text('{"scores": 3}')
    with pytest.raises(CheckpointError, match="holds no results"):
        load_answered(tmp_path / "x.json")


def test_costs_are_measured_on_the_same_rows_of_all_tasks(contest, outcomes, monkeypatch):
    monkeypatch.setattr(costs, "_TURNS", 2)
    asked = []
    bench = contest.bench
    task_rows = bench.score

    def score(fitted, task, rows, *more):
        asked.append((task.name, len(rows)))
        return task_rows(fitted, task, rows, *more)

    counted = replace_score(bench, score)
    cost_of(counted, Fitted(), counted.tasks, 1.0)
    assert asked == [("alpha", 4), ("beta", 4), ("delta", 4), ("gamma", 4)] * 2


def replace_score(bench, score):
    made = replace(bench)
    made.score = score
    return made


def test_the_winner_is_chosen_on_validation_rows_among_what_can_be_written(report):
    by_name = {each.name: each for each in report.results}
    assert report.winner in {"folded_half", "weighed", "voted", "gated", "gated_by_sequence"}
    assert by_name[report.winner].valid.accuracy == max(
        each.valid.accuracy for each in report.results if not each.is_reference
    )
    assert by_name["told"].held_out is None
    assert by_name["told"].seen is not None


def test_a_recipe_with_other_rows_finds_other_results(loaded, tmp_path):
    folder = loaded.path.parent
    fewer = load_compare(write_recipe(folder, rows={"test": 2}))
    made, _ = prepare_contest(fewer, OFFLINE)
    assert {len(task.test) for task in made.tasks} == {2}
    write_recipe(folder)
