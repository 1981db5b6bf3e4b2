"""A bundle that is changed and killed at any moment is the old one or the new one; the next change cleans up."""

import random
import shutil
import signal

import pytest
from conftest import all_files
from crashes import run_forked
from growing import RIDGE, growing_workshop, merged

from mediator_cli import verify_bundle
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.pipeline.change.newcomer import Newcomer
from mediator_cli.pipeline.change.run import add_expert, remove_expert
from mediator_cli.pipeline.settings import Settings
from mediator_cli.runtime.router import read_router

ADD = ("add-expert", "out", "--name", "c", "--model", "c", "--prompts", "c.jsonl", "-q", "--workers", "1")
ADD_ALONE = (*ADD, "--no-router")
REMOVE = ("remove-expert", "out", "--name", "b", "-q")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return growing_workshop(tmp_path_factory.mktemp("crashes"))


@pytest.fixture(scope="module")
def before(shop):
    """The bundle before, kept aside."""
    # What is imported and loaded here once need not be loaded by every forked process.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.folder)
        warm = merged(shop, "warm", "a", "b", router=RIDGE)
        kept = shutil.copytree(warm, shop.folder / "kept")
        add_expert(warm, Newcomer("c", "c"), {"c": shop.folder / "c.jsonl"}, run=Settings(workers=1))
        remove_expert(warm, "a")
    return kept


def begin(shop, before):
    shutil.rmtree(shop.folder / "out", ignore_errors=True)
    return shutil.copytree(before, shop.folder / "out")


def named(bundle):
    """All files that the manifest names, and those that it does not name without the folder of the change."""
    found = verify_bundle(bundle)
    assert found.problems == ()
    return found.unknown


def check_whole(bundle, old, new):
    """Expect the old bundle or the new one in all that answers, with nothing of the other named."""
    manifest = read_manifest(bundle)
    experts = [source.name for source in manifest.experts]
    assert experts in ([source.name for source in old.experts], [source.name for source in new.experts])
    like = old if len(experts) == len(old.experts) else new
    assert (manifest.digest, manifest.router, manifest.sparse) == (like.digest, like.router, like.sparse)
    named(bundle)
    assert (read_router(bundle, manifest) is None) == (like.router is None)
    return like is new


SLOW = pytest.mark.slow
CASES = [(ADD_ALONE, 2), pytest.param(ADD_ALONE, 60, marks=SLOW), pytest.param(ADD, 25, marks=SLOW)]
CASES += [pytest.param(REMOVE, 25, marks=SLOW)]


@pytest.mark.parametrize(("words", "n_moments"), CASES)
def test_a_killed_change_leaves_the_old_bundle_or_the_new_one(shop, before, words, n_moments):
    out = begin(shop, before)
    run = run_forked(shop.folder, words)
    assert run.code == 0, run.err
    files, old, new = all_files(out), read_manifest(before), read_manifest(out)
    assert named(out) == ()
    # Around the moment of change, and anywhere.
    moments = {run.n_calls - 4, run.n_calls - 20}
    moments |= {*random.Random(0).sample(range(1, run.n_calls + 1), min(n_moments, run.n_calls))}
    outcomes = set()
    for number in sorted(moments):
        out = begin(shop, before)
        assert run_forked(shop.folder, words, number).code == -signal.SIGKILL
        outcomes.add(check_whole(out, old, new))
        again = run_forked(shop.folder, words)
        if outcomes and read_manifest(out).digest == new.digest and again.code == 2:
            # It was done already; another change cleans up what that one left.
            assert "c is its last" not in again.err
            assert check_whole(out, old, new)
        else:
            assert again.code == 0, again.err
            assert all_files(out) == files
    assert outcomes == {True, False}


def test_what_a_killed_change_left_goes_with_the_next(shop, before):
    out = begin(shop, before)
    # The second rename of a file of the bundle puts the manifest in place, the first one the expert.
    assert run_forked(shop.folder, ADD_ALONE, 3, names=["replace"]).code == -signal.SIGKILL
    assert "experts/c.safetensors" in named(out)
    assert read_manifest(out) == read_manifest(before)
    assert run_forked(shop.folder, ("remove-expert", "out", "--name", "b", "-q", "--no-router")).code == 0
    assert named(out) == ()
    assert not (out / "experts" / "c.safetensors").exists()


def test_a_full_disk_leaves_the_old_bundle(shop, before):
    def fail():
        raise OSError(28, "No space left on device")

    out = begin(shop, before)
    run = run_forked(shop.folder, ADD_ALONE, 1, act=fail, names=["posix_fallocate"])
    assert run.code == 2, run.err
    assert "no space left on device" in run.err.lower()
    assert all_files(out) == all_files(before)
