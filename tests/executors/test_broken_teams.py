"""A team in which a process fails, vanishes, never comes, or sees something else."""

import json
import signal
import time

import pytest
from conftest import all_files
from shared_merge import MEASURED, OVER_MODEL, SHARDED, merge_at, merge_together, start_rank

from mediator_cli import MediatorError, Settings, load_recipe, make_plan, merge
from mediator_cli.engine.journal import Journal
from mediator_cli.executors.place import Place
from mediator_cli.executors.rank import share_merge

DEADLY = """
from mediator_cli.engine.journal import Journal
import os, signal
real, calls = Journal.write, []
def write(self, step, facts):
    calls.append(step)
    if len(calls) == {n}:
        {act}
    real(self, step, facts)
Journal.write = write
"""
KILL = DEADLY.format(n=2, act="os.kill(os.getpid(), signal.SIGKILL)")


def ends(runs):
    found = [run.communicate(timeout=120) for run in runs]
    return [(run.returncode, out, err) for run, (out, err) in zip(runs, found, strict=True)]


def together(folder, world, *words, programs=(), **environ):
    programs = dict(programs)
    return ends([start_rank(folder, n, world, *words, program=programs.get(n, ""), **environ) for n in range(world)])


@pytest.fixture
def expected(workshop):
    files = all_files(workshop.merge("recipe", **MEASURED, **SHARDED))
    (workshop.folder / "recipe").rename(workshop.folder / "expected")
    return files


def same_but_for_title(folder, expected):
    """The model card and the manifest have the name of the folder."""
    found = all_files(folder)
    different = {name for name in found | expected if found.get(name) != expected.get(name)}
    return different <= {"README.md", "routing_manifest.json"}


def test_programs_merge_together_and_tell_their_part(workshop, expected):
    first, second = together(workshop.folder, 2, "--json")
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert json.loads(second[1]) == {"bundle": str(workshop.folder / "out"), "rank": 1, "world": 2}
    assert json.loads(first[1])["bundle"] == str(workshop.folder / "out")
    assert same_but_for_title(workshop.folder / "out", expected)
    assert not list(workshop.folder.glob(".out*"))


@pytest.mark.parametrize(("dead", "later"), [(0, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_after_a_kill_another_number_of_processes_goes_on(workshop, expected, dead, later):
    found = together(workshop.folder, 2, programs={dead: KILL}, MEDIATOR_WAIT="2")
    assert found[dead][0] == -signal.SIGKILL
    assert found[1 - dead][0] == 2
    assert f"process {dead} has given no sign of life for 2 s" in found[1 - dead][2]
    assert not (workshop.folder / "out").exists()
    begun = [line for file in workshop.folder.glob(".out.journal/steps*") for line in file.read_text().splitlines()]
    again = together(workshop.folder, later, "--resume", MEDIATOR_RUN="again")
    assert [code for code, _, _ in again] == [0] * later, again
    assert len(begun) > 1
    assert same_but_for_title(workshop.folder / "out", expected)
    assert not list(workshop.folder.glob(".out*"))


def fail_at_second_step(monkeypatch, faulty):
    real, calls = Journal.write, []

    def write(self, step, facts):
        calls.extend([step] if self.member == faulty else [])
        if self.member == faulty and len(calls) == 2:
            raise RuntimeError("no more")
        real(self, step, facts)

    monkeypatch.setattr(Journal, "write", write)


@pytest.mark.parametrize("faulty", [0, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 2))])
def test_when_one_process_fails_all_stop_and_say_why(workshop, expected, monkeypatch, faulty):
    with monkeypatch.context() as patch:
        fail_at_second_step(patch, faulty)
        ends_ = merge_together(workshop.folder / "recipe.yaml", workshop.folder / "out", 3)
    assert isinstance(ends_.pop(faulty), RuntimeError)
    for end in ends_:
        assert f"process {faulty} failed: RuntimeError: no more" in str(end)
        assert "--resume" in str(end)
    assert merge_together(workshop.folder / "recipe.yaml", workshop.folder / "out", 2, resume=True) == [None, None]
    assert same_but_for_title(workshop.folder / "out", expected)


def test_a_plain_merge_refuses_what_a_team_left_and_a_local_one_goes_on(workshop, expected, mediator, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at_second_step(patch, 1)
        merge_together(workshop.folder / "recipe.yaml", workshop.folder / "out", 2)
    run = mediator("merge", "recipe.yaml", "-o", "out")
    assert (run.code, "an interrupted merge into this folder can go on" in run.err) == (2, True)
    assert mediator("merge", "recipe.yaml", "-o", "out", "--resume").code == 0
    assert same_but_for_title(workshop.folder / "out", expected)
    assert not list(workshop.folder.glob(".out*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_in_vain_says_for_whom(workshop, rank):
    workshop.recipe(**MEASURED)
    ((code, _, err),) = ends([start_rank(workshop.folder, rank, 2, MEDIATOR_WAIT="1")])
    assert code == 2
    assert ("of 2 processes did not come: 1" if rank == 0 else "process 0 of the run 'test' has not come") in err
    assert not (workshop.folder / "out").exists()
    assert not list(workshop.folder.glob(".out.partial"))


def test_a_process_with_another_recipe_stops_all(workshop):
    recipe, places = workshop.recipe(**OVER_MODEL, **SHARDED), [Place(rank, 2, "test") for rank in (0, 1)]
    for end in merge_at(places, recipe, workshop.folder / "out", changes={1: ("seed=7",)}):
        assert isinstance(end, MediatorError)
        assert "process 1 does not see what process 0 sees: the recipe differ" in str(end)
    assert not list(workshop.folder.glob(".out.partial"))


def test_processes_that_count_differently_stop(workshop):
    places = [Place(0, 2, "test"), Place(1, 3, "test")]
    for end in merge_at(places, workshop.recipe(**MEASURED), workshop.folder / "out"):
        assert isinstance(end, MediatorError)
        assert "process 0 counts 2 processes, this one 3" in str(end)


@pytest.mark.slow
def test_the_records_of_an_earlier_start_mislead_nobody(workshop, expected):
    together(workshop.folder, 3, programs={0: KILL}, MEDIATOR_WAIT="1")
    assert list(workshop.folder.glob(".out.team/process-*"))
    second = start_rank(workshop.folder, 1, 2, "--resume")
    time.sleep(2)
    found = ends([start_rank(workshop.folder, 0, 2, "--resume"), second])
    assert [code for code, _, _ in found] == [0, 0], found
    assert same_but_for_title(workshop.folder / "out", expected)


def test_an_old_bundle_is_replaced_as_a_whole(workshop, expected):
    old = all_files(workshop.merge("out", assign={"rule": "none"}))
    ends_ = merge_together(workshop.folder / "recipe.yaml", workshop.folder / "out", 2)
    assert all("give --overwrite" in str(end) for end in ends_)
    assert all_files(workshop.folder / "out") == old
    assert merge_together(workshop.folder / "recipe.yaml", workshop.folder / "out", 2, overwrite=True) == [None, None]
    assert same_but_for_title(workshop.folder / "out", expected)


def test_one_process_that_is_alone_in_its_world_needs_nobody(workshop, expected):
    plan = make_plan(load_recipe(workshop.folder / "recipe.yaml"))
    merge(plan, workshop.folder / "out", settings=share_merge(plan, Settings(workers=2), Place(0, 1, "test")))
    assert same_but_for_title(workshop.folder / "out", expected)
