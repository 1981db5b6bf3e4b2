"""A merge that is killed: no bundle appears, an old one stays, and the next merge is as if nothing had happened."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import all_files

from mediator_cli import read_bundle, verify_bundle

KILLED = """
import os, signal, sys
from importlib import import_module
owner = {module!r}.split(":")
module = import_module(owner[0])
module = getattr(module, owner[1]) if owner[1:] else module
real, calls = getattr(module, {name!r}), []

def deadly(*args, **kwargs):
    calls.append(1)
    if len(calls) == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(module, {name!r}, deadly)
from mediator_cli.cli.app import main
sys.argv = ["mediator", "merge", "recipe.yaml", "-o", "out", *{more!r}]
main()
"""
ALL = {"assign": {"rule": "all"}, "extract": {"density": 0.5}}
POINTS = {
    "between two tensors": ("os", "pwrite", 12),
    "before the manifest": ("mediator_cli.pipeline.merge", "make_manifest", 1),
    "before the rename": ("mediator_cli.engine.publish", "_swap", 1),
}


def kill_merge(workshop, point, *more):
    module, name, n = point
    program = KILLED.format(module=module, name=name, n=n, more=more)
    run = subprocess.run([sys.executable, "-c", program], cwd=workshop.folder, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def bundle_bytes(folder):
    """The bytes of a bundle but for the recipe's file name, which its manifest notes."""
    return {name: data for name, data in all_files(folder).items() if name != "routing_manifest.json"}


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_a_killed_merge_leaves_no_bundle_and_the_next_one_is_the_same(workshop, mediator, point):
    expected = read_bundle(workshop.merge("undisturbed", **ALL)).manifest.digest
    workshop.recipe(**ALL)
    kill_merge(workshop, point)
    assert not (workshop.folder / "out").exists()
    run = mediator("merge", "recipe.yaml", "-o", "out", "--json")
    assert json.loads(run.out)["digest"] == expected
    assert verify_bundle(workshop.folder / "out").problems == ()
    assert verify_bundle(workshop.folder / "out").unknown == ()
    assert not list(workshop.folder.glob(".out*"))


@pytest.mark.parametrize("point", list(POINTS.values())[1:], ids=list(POINTS)[1:])
def test_a_kill_while_overwriting_keeps_the_old_bundle_byte_for_byte(workshop, mediator, point):
    before = all_files(workshop.merge("out"))
    workshop.recipe(**ALL)
    kill_merge(workshop, point, "--overwrite")
    assert all_files(workshop.folder / "out") == before
    assert mediator("merge", "recipe.yaml", "-o", "out", "--overwrite").code == 0
    assert bundle_bytes(workshop.folder / "out") == bundle_bytes(workshop.merge("fresh", **ALL)) | {
        "README.md": (workshop.folder / "out" / "README.md").read_bytes()
    }


def test_a_kill_between_the_two_renames_keeps_the_old_bundle_aside(workshop, mediator):
    before = all_files(workshop.merge("out"))
    workshop.recipe(**ALL)
    kill_merge(workshop, ("pathlib:Path", "rename", 2), "--overwrite")
    assert all_files(workshop.folder / ".out.old") == before
    assert mediator("merge", "recipe.yaml", "-o", "out", "--overwrite").code == 0
    assert verify_bundle(workshop.folder / "out").problems == ()
    assert not list(workshop.folder.glob(".out*"))


def test_a_merge_that_fails_after_a_kill_between_the_renames_gives_the_old_bundle_back(workshop, mediator):
    before = all_files(workshop.merge("out"))
    (workshop.folder / "out").rename(workshop.folder / ".out.old")
    workshop.recipe(average={"method": "task_arithmetic", "lambda": 1e9}, output={"dtype": "float16"})
    run = mediator("merge", "recipe.yaml", "-o", "out", "--overwrite")
    assert run.code == 2
    assert all_files(workshop.folder / "out") == before
    assert not list(workshop.folder.glob(".out*"))


def test_a_merge_without_overwrite_gives_the_old_bundle_back_and_refuses(workshop, mediator):
    before = all_files(workshop.merge("out"))
    (workshop.folder / "out").rename(workshop.folder / ".out.old")
    workshop.recipe(**ALL)
    run = mediator("merge", "recipe.yaml", "-o", "out")
    assert (run.code, "or give --overwrite" in run.err) == (2, True)
    assert all_files(workshop.folder / "out") == before
