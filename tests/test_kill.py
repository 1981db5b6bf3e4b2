"""A merge killed at any moment: `--resume` ends with the same bytes; an old bundle stays until the new one stands."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import all_files
from crashes import run_forked

from mediator_cli import load_recipe, make_plan, merge, verify_bundle
from mediator_cli.engine import batches

SHARDS = {"output": {"shard_size": "1500B"}}
CASES = {
    "static ties": {"assign": {"rule": "none"}, "average": {"method": "ties", "density": 0.3}},
    "routed, several shards": {
        "assign": {"rule": "all"},
        "average": {"method": "dare_ties", "density": 0.5},
        "extract": {"density": 0.3, "values": "int8"},
        **SHARDS,
    },
    "over the model": {"assign": {"rule": "all"}, "extract": {"density": 0.2, "over": "model"}, **SHARDS},
    "conflict measured": {"extract": {"density": 1, "values": "bf16"}},
}
MERGE = ("merge", "recipe.yaml", "-o", "out")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch, tmp_path):
    """Many batches, and no digests that other tests noted."""
    monkeypatch.setattr(batches, "_ROW_ELEMENTS", 800)
    monkeypatch.setenv("MEDIATOR_CACHE", str(beside(tmp_path, "cache")))


def beside(folder, what):
    """Give a place of its own for a test, outside of its folder."""
    return folder.parent / f"{folder.name}.{what}"


def forget(workshop):
    shutil.rmtree(beside(workshop.folder, "cache"), ignore_errors=True)


def undisturbed(workshop, words=MERGE):
    """Merge once; give the bundle's files, and how many calls it took to write them."""
    # What is imported and loaded here once need not be loaded by every forked process.
    merge(make_plan(load_recipe(workshop.folder / "recipe.yaml")), workshop.folder / "loaded")
    shutil.rmtree(workshop.folder / "loaded")
    forget(workshop)
    run = run_forked(workshop.folder, words)
    assert run.code == 0, run.err
    files = all_files(workshop.folder / "out")
    shutil.rmtree(workshop.folder / "out")
    forget(workshop)
    return files, run.n_calls


def go_on(workshop, words, files):
    """Resume, if the killed one had not finished, and expect the undisturbed bundle and nothing beside it."""
    out = workshop.folder / "out"
    if not (out.exists() and all_files(out) == files):
        is_begun = (workshop.folder / ".out.journal" / "key.json").exists()
        run = run_forked(workshop.folder, (*words, "--resume") if is_begun else words)
        assert run.code == 0, run.err
    assert all_files(out) == files


def kill_and_go_on(workshop, words, files, number, old=None):
    """Kill before one call; old or new bundle is whole at that moment; then resume."""
    run = run_forked(workshop.folder, words, number)
    assert run.code == -signal.SIGKILL, run.err
    out, aside = workshop.folder / "out", workshop.folder / ".out.old"
    standing = out if out.exists() else aside
    if old is None:
        assert not out.exists() or all_files(out) == files
    elif standing.exists():
        assert all_files(standing) in (old, files) or all_files(out) == files
    else:
        pytest.fail("neither the old bundle nor the new one is there")
    go_on(workshop, words, files)


def clear(workshop):
    for path in [*workshop.folder.glob(".out*"), workshop.folder / "out"]:
        shutil.rmtree(path, ignore_errors=True)
    forget(workshop)


def moments(n_calls, n, seed):
    """Choose calls at random, the first and the last among them."""
    chosen = random.Random(seed).sample(range(2, n_calls), min(n, n_calls - 1) - 2)
    return [1, *sorted(chosen), n_calls]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_merge_goes_on_to_the_same_bytes(workshop, case):
    workshop.recipe(**CASES[case])
    files, n_calls = undisturbed(workshop)
    for number in moments(n_calls, 3, case):
        kill_and_go_on(workshop, MERGE, files, number)
        assert verify_bundle(workshop.folder / "out").problems == ()
        clear(workshop)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_merge_that_is_killed_at_many_moments_goes_on_to_the_same_bytes(workshop, case):
    workshop.recipe(**CASES[case])
    files, n_calls = undisturbed(workshop)
    for number in moments(n_calls, 25, f"{case} again"):
        kill_and_go_on(workshop, MERGE, files, number)
        clear(workshop)


def test_a_merge_that_is_killed_again_and_again_goes_on_to_the_same_bytes(workshop):
    workshop.recipe(**CASES["over the model"])
    files, n_calls = undisturbed(workshop)
    for n_kills in range(200):
        number = random.Random(n_kills).randint(n_calls // 6, n_calls // 3)
        run = run_forked(workshop.folder, (*MERGE, "--resume"), number)
        if run.code == 0:
            break
        assert run.code == -signal.SIGKILL, run.err
    assert n_kills >= 3
    assert all_files(workshop.folder / "out") == files


def test_a_killed_merge_is_not_thrown_away_unasked(workshop):
    workshop.recipe(**CASES["routed, several shards"])
    files, n_calls = undisturbed(workshop)
    assert run_forked(workshop.folder, MERGE, n_calls // 2).code == -signal.SIGKILL
    before = all_files(workshop.folder)
    run = run_forked(workshop.folder, MERGE)
    assert run.code == 2
    assert "an interrupted merge into this folder can go on" in run.err
    assert "give --resume, or --overwrite to throw its work away" in run.err
    assert all_files(workshop.folder) == before
    assert run_forked(workshop.folder, (*MERGE, "--overwrite")).code == 0
    assert all_files(workshop.folder / "out") == files
    assert not list(workshop.folder.glob(".out*"))


@pytest.mark.parametrize("n_moments", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_a_kill_while_overwriting_keeps_the_old_bundle_until_the_new_one_stands(workshop, n_moments):
    old = all_files(workshop.merge("out"))
    kept = shutil.copytree(workshop.folder / "out", beside(workshop.folder, "kept"))
    workshop.recipe(**CASES["routed, several shards"])
    words = (*MERGE, "--overwrite")
    files, n_calls = undisturbed(workshop, words)
    for number in moments(n_calls, n_moments, "overwrite"):
        shutil.copytree(kept, workshop.folder / "out")
        kill_and_go_on(workshop, words, files, number, old)
        clear(workshop)


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_at_the_renames_loses_neither_bundle(workshop, number):
    old = all_files(workshop.merge("out"))
    workshop.recipe(**CASES["routed, several shards"])
    run = run_forked(workshop.folder, (*MERGE, "--overwrite"), number, names=["rename"])
    assert run.code == -signal.SIGKILL
    assert all_files(workshop.folder / (".out.old" if number == 2 else "out")) == old
    assert run_forked(workshop.folder, (*MERGE, "--overwrite")).code == 0
    assert verify_bundle(workshop.folder / "out").problems == ()
    assert not list(workshop.folder.glob(".out*"))


def test_a_merge_that_fails_after_a_kill_between_the_renames_gives_the_old_bundle_back(workshop, mediator):
    before = all_files(workshop.merge("out"))
    (workshop.folder / "out").rename(workshop.folder / ".out.old")
    workshop.recipe(average={"method": "task_arithmetic", "lambda": 1e9}, output={"dtype": "float16"})
    run = mediator("merge", "recipe.yaml", "-o", "out", "--overwrite")
    assert run.code == 2
    assert all_files(workshop.folder / "out") == before
    assert not (workshop.folder / ".out.old").exists()


def test_a_merge_without_overwrite_gives_the_old_bundle_back_and_refuses(workshop, mediator):
    before = all_files(workshop.merge("out"))
    (workshop.folder / "out").rename(workshop.folder / ".out.old")
    workshop.recipe(**CASES["static ties"])
    run = mediator("merge", "recipe.yaml", "-o", "out")
    assert (run.code, "or give --overwrite" in run.err) == (2, True)
    assert all_files(workshop.folder / "out") == before


PROGRAM = """
import sys
from mediator_cli.cli.app import main
from mediator_cli.engine import batches
batches._ROW_ELEMENTS = 800
print("begins", flush=True)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_merge_killed_from_outside_at_any_time_goes_on_to_the_same_bytes(workshop, case):
    workshop.recipe(**CASES[case])
    files, _ = undisturbed(workshop)

    def start(*more):
        words = [sys.executable, "-c", PROGRAM, *MERGE, "-q", *more]
        run = subprocess.Popen(words, cwd=workshop.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        run.stdout.readline()
        return run

    began = time.monotonic()
    whole = start()
    whole.communicate()
    assert whole.returncode == 0
    length = time.monotonic() - began
    for number in range(5):
        clear(workshop)
        run = start()
        time.sleep(length * random.Random(f"{case}{number}").random())
        run.kill()
        run.communicate()
        go_on(workshop, MERGE, files)
