"""A merge that is interrupted or fails: what is finished is kept, said, and gone on with; nothing else changes."""

import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from conftest import all_files, edit_json
from crashes import run_forked
from test_kill import CASES, MERGE, clear, small_batches, undisturbed  # noqa: F401 - a fixture

RESUME = (*MERGE, "--resume")
GO_ON = "go on with `mediator merge recipe.yaml -o out --resume`"


def full():
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def begun(workshop):
    """A merge of several shards that was killed in the middle, and the files of an undisturbed one."""
    workshop.recipe(**CASES["routed, several shards"])
    files, n_calls = undisturbed(workshop)
    assert run_forked(workshop.folder, MERGE, n_calls // 2).code == -signal.SIGKILL
    return files


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fdatasync"])
@pytest.mark.parametrize(
    ("case", "share"),
    [
        ("routed, several shards", 0.3),
        ("over the model", 0.9),
        pytest.param("routed, several shards", 0.9, marks=pytest.mark.slow),
        pytest.param("over the model", 0.3, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_keeps_what_is_finished(workshop, case, call, share):
    workshop.recipe(**CASES[case])
    files, _ = undisturbed(workshop)
    n_calls = run_forked(workshop.folder, MERGE, names=[call]).n_calls
    clear(workshop)
    run = run_forked(workshop.folder, MERGE, max(2, int(share * n_calls)), full, [call])
    assert run.code == 2
    assert "cannot write: no space left on device" in run.err
    assert "Traceback" not in run.err
    assert f"steps are finished, {GO_ON}" in run.err
    assert not (workshop.folder / "out").exists()
    run = run_forked(workshop.folder, RESUME)
    assert run.code == 0, run.err
    assert all_files(workshop.folder / "out") == files


def test_resume_does_not_do_again_what_is_finished(workshop, begun):
    whole = run_forked(workshop.folder, (*MERGE, "-o", "other"), names=["pwrite"]).n_calls
    rest = run_forked(workshop.folder, RESUME, names=["pwrite"])
    assert rest.code == 0, rest.err
    assert 0 < rest.n_calls < 0.75 * whole
    assert all_files(workshop.folder / "out") == begun


CHANGES = {
    "time": lambda file: os.utime(file, ns=(0, 0)),
    "size": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "content": lambda file: file.write_bytes(file.read_bytes()[:-2] + b"\1\1"),
}


@pytest.mark.parametrize("change", ["time", "content"])
def test_resume_refuses_when_a_source_changed(workshop, begun, change):
    file = workshop.folder / "b" / "model.safetensors"
    CHANGES[change](file)
    before = all_files(workshop.folder)
    run = run_forked(workshop.folder, RESUME)
    assert run.code == 2
    assert f"the file {file} changed since it began" in run.err
    assert "start anew with --overwrite" in run.err
    assert all_files(workshop.folder) == before
    run = run_forked(workshop.folder, (*MERGE, "--overwrite"))
    assert run.code == 0, run.err
    assert not list(workshop.folder.glob(".out*"))
    same = {name for name, data in all_files(workshop.folder / "out").items() if data == begun[name]}
    assert ("routing_manifest.json" in same) == (change == "time")


def test_a_source_that_was_cut_is_told_as_such(workshop, begun):
    file = workshop.folder / "b" / "model.safetensors"
    CHANGES["size"](file)
    run = run_forked(workshop.folder, RESUME)
    assert (run.code, f"{file}: truncated" in run.err) == (2, True)


def test_resume_refuses_another_recipe(workshop, begun):
    workshop.recipe(**CASES["static ties"])
    run = run_forked(workshop.folder, RESUME)
    assert run.code == 2
    assert "cannot go on: the recipe changed since it began" in run.err


def test_resume_takes_other_workers_and_memory(workshop, begun):
    run = run_forked(workshop.folder, (*RESUME, "--workers", "5", "--memory", "1GiB"))
    assert run.code == 0, run.err
    assert all_files(workshop.folder / "out") == begun


def test_resume_without_anything_to_go_on_with_merges(workshop):
    workshop.recipe(**CASES["static ties"])
    files, _ = undisturbed(workshop)
    assert run_forked(workshop.folder, RESUME).code == 0
    assert all_files(workshop.folder / "out") == files


def test_a_finished_bundle_is_not_merged_again_by_resume(workshop):
    workshop.recipe(**CASES["static ties"])
    assert run_forked(workshop.folder, MERGE).code == 0
    before = all_files(workshop.folder)
    run = run_forked(workshop.folder, RESUME)
    assert (run.code, "out: exists" in run.err) == (2, True)
    assert all_files(workshop.folder) == before


@pytest.mark.parametrize("damage", [b"not JSON\n", b'["batch 0.0"]\n', b"\0\0\0\n", b"17\n"])
def test_a_damaged_journal_is_refused_and_kept(workshop, begun, damage):
    with (workshop.folder / ".out.journal" / "steps-00000.jsonl").open("ab") as stream:
        stream.write(damage)
    before = all_files(workshop.folder)
    run = run_forked(workshop.folder, RESUME)
    assert run.code == 2, run.err
    assert "start anew with --overwrite" in run.err
    assert all_files(workshop.folder) == before


def test_sources_are_never_written_to(workshop):
    workshop.recipe(**CASES["routed, several shards"])
    sources = [workshop.folder / name for name in ("base", "a", "b")]
    before = [all_files(folder) for folder in sources]
    times = {path: path.stat().st_mtime_ns for folder in sources for path in [folder, *folder.rglob("*")]}
    for path in times:
        path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))
    run = run_forked(workshop.folder, MERGE)
    for path in times:
        path.chmod(0o755)
    assert run.code == 0, run.err
    assert [all_files(folder) for folder in sources] == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


SLOW = """
import signal, sys, time
from mediator_cli.cli.app import main
# A shell that started the tests in the background may have had SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from mediator_cli.engine import batches
from mediator_cli.pipeline import {module} as module
batches._ROW_ELEMENTS = 800
real, calls = module.{name}, []

def slow(*args, **kwargs):
    calls.append(1)
    if len(calls) == {n}:
        print("waits", flush=True)
        time.sleep(60)
    return real(*args, **kwargs)

module.{name} = slow
main()
"""


def note_what_can_be_routed(workshop):
    """Spare a process of its own to load torch and transformers, which takes seconds."""
    assert run_forked(workshop.folder, ("plan", "recipe.yaml", "--no-calibrate")).code == 0


def signalled(workshop, number, module="write", name="_average", n=3):
    """Send a signal to a merge that hangs before a batch; give its exit code, what it told, and the seconds it took."""
    program = SLOW.format(module=module, name=name, n=n)
    run = subprocess.Popen(
        [sys.executable, "-c", program, *MERGE], cwd=workshop.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert run.stdout.readline() == b"waits\n"
    began = time.monotonic()
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    return run.returncode, err.decode(), time.monotonic() - began


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_merge_says_how_to_go_on(workshop, number, code):
    workshop.recipe(**CASES["routed, several shards"])
    files, _ = undisturbed(workshop)
    note_what_can_be_routed(workshop)
    before = all_files(workshop.folder)
    ended, told, seconds = signalled(workshop, number)
    assert ended == code, told
    assert re.fullmatch(rf"interrupted; 2 of \d+ steps are finished, {re.escape(GO_ON)}", told.splitlines()[-1])
    assert "Traceback" not in told
    # It would have slept for a minute.
    assert seconds < 30
    assert not (workshop.folder / "out").exists()
    assert run_forked(workshop.folder, RESUME).code == 0
    assert all_files(workshop.folder / "out") == files
    shutil.rmtree(workshop.folder / "out")
    assert set(all_files(workshop.folder)) == set(before)


def test_an_interrupt_before_anything_is_finished_leaves_nothing(workshop):
    workshop.recipe(**CASES["routed, several shards"])
    note_what_can_be_routed(workshop)
    before = all_files(workshop.folder)
    ended, told, _ = signalled(workshop, signal.SIGINT, "merge", "take_survey", 1)
    assert (ended, told.splitlines()[-1]) == (130, "interrupted; nothing was written")
    assert all_files(workshop.folder) == before


def test_two_merges_into_one_folder_at_once_are_one_too_many(workshop):
    workshop.recipe(**CASES["static ties"])
    files, _ = undisturbed(workshop)
    program = SLOW.format(module="write", name="_average", n=1)
    first = subprocess.Popen([sys.executable, "-c", program, *MERGE], cwd=workshop.folder, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"waits\n"
    for more in ((), ("--overwrite",), ("--resume",)):
        before = all_files(workshop.folder)
        run = run_forked(workshop.folder, (*MERGE, *more))
        assert run.code == 2
        assert "another merge is writing this output" in run.err or "an interrupted merge into this folder" in run.err
        assert all_files(workshop.folder) == before
    first.kill()
    first.communicate()
    assert run_forked(workshop.folder, RESUME).code == 0
    assert all_files(workshop.folder / "out") == files


@pytest.mark.parametrize("words", [("inspect", "base", "--json"), pytest.param(("methods",), marks=pytest.mark.slow)])
def test_a_reader_that_goes_away_ends_a_command_quietly(workshop, words):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "mediator_cli", *words]
    run = subprocess.run(words, cwd=workshop.folder, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")


def test_an_output_that_is_full_is_told(workshop):
    with open("/dev/full", "w") as stream:  # noqa: PTH123
        words = [sys.executable, "-m", "mediator_cli", "inspect", "base", "--json"]
        run = subprocess.run(words, cwd=workshop.folder, stdout=stream, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2
    assert run.stderr == "error: cannot write the output: no space left on device\n"


def test_side_files_that_changed_in_between_are_those_of_now(workshop, begun):
    edit_json(workshop.folder / "base" / "generation_config.json", do_sample=True)
    assert run_forked(workshop.folder, RESUME).code == 0
    now = all_files(workshop.folder / "out")
    changed = {name for name in now if now[name] != begun[name]}
    assert changed == {"generation_config.json", "routing_manifest.json"}
