"""The bad-input table, outputs: what stands in the way, full disks and failing writes; the old bundle stays whole."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import all_files, edit_json

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.streams import Budget, peak_bytes
from mediator_cli.pipeline import merge as merging

ROUTED = {"assign": {"rule": "all"}, "extract": {"density": 0.5}}
NO_SPACE = "free some space or choose another output folder"


def test_a_memory_that_is_no_size_is_refused(workshop, refused):
    workshop.recipe()
    refused(
        "--memory", "'lots' is not a size", "--memory 2GiB", "merge", "recipe.yaml", "-o", "out", "--memory", "lots"
    )


@pytest.mark.parametrize("command", ["merge", "plan", "analyze-conflicts"])
def test_too_little_memory_is_refused_with_what_is_enough(workshop, refused, command):
    workshop.recipe()
    message = "10 MiB are too little for 2 experts"
    hint = f"give at least {-(-peak_bytes(2, Budget(1, BLOCK)) >> 20)} MiB"
    refused("--memory", message, hint, command, "recipe.yaml", "-o", "out", "--memory", "10MiB")


def test_an_output_that_is_a_file_is_refused(workshop, refused):
    workshop.recipe()
    (workshop.folder / "out").write_text("mine")
    refused(f"{workshop.folder}/out", "exists and is not a folder", "choose another output")


def test_an_output_that_is_a_link_is_refused_even_to_nowhere(workshop, refused):
    workshop.recipe()
    (workshop.folder / "out").symlink_to("nowhere")
    refused(f"{workshop.folder}/out", "exists and is not a folder", "choose another output")


def test_an_output_folder_that_holds_something_is_refused(workshop, refused):
    workshop.recipe()
    refused(f"{workshop.folder}/base", "exists", "or give --overwrite", "merge", "recipe.yaml", "-o", "base")


def test_overwrite_spares_a_folder_that_is_no_bundle(workshop, refused):
    workshop.recipe()
    message = "exists and is not a bundle, so it is not overwritten"
    words = ("merge", "recipe.yaml", "-o", "base", "--overwrite")
    refused(f"{workshop.folder}/base", message, "remove it by hand", *words)


def test_a_bundle_is_not_replaced_without_overwrite(workshop, refused):
    workshop.merge("out")
    workshop.recipe()
    refused(f"{workshop.folder}/out", "exists", "choose another output with -o, or give --overwrite")


def test_an_output_below_a_file_is_refused(workshop, refused):
    workshop.recipe()
    place = f"{workshop.folder}/recipe.yaml/.out.partial"
    refused(place, "cannot write: ", NO_SPACE, "merge", "recipe.yaml", "-o", "recipe.yaml/out")


@pytest.mark.parametrize(
    ("command", "name"),
    [("merge", "x" * 250), ("merge", "x" * 300), ("merge", "x" * 300 + "/out"), ("plan", "x" * 300 + "/out")],
)
def test_an_output_name_that_no_disk_can_hold_is_refused(workshop, mediator, command, name):
    workshop.recipe()
    before = all_files(workshop.folder)
    run = mediator(command, "recipe.yaml", "-o", name)
    assert run.code == 2
    assert "cannot write: file name too long" in run.err
    assert all_files(workshop.folder) == before


def test_an_output_that_another_merge_is_writing_is_refused_and_left_alone(workshop, refused):
    workshop.recipe()
    building, journal = workshop.folder / ".out.partial", workshop.folder / ".out.journal"
    building.mkdir()
    journal.mkdir()
    (building / "half.safetensors").write_bytes(b"half")
    lock = os.open(journal, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    refused(str(building), "another merge is writing this output", "wait for it or choose another output")
    os.close(lock)


def test_a_disk_without_room_is_refused_before_anything_is_read(workshop, refused, monkeypatch):
    workshop.recipe()
    full = type(shutil.disk_usage("/"))(10**9, 10**9, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    refused(f"{workshop.folder}/out", "the disk has 0.00 GB free", "free some space")


def fail_at(n, error=errno.EIO, real=None):
    """Return a function that calls `real` until its n-th call, which fails."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) >= n:
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    return failing


@pytest.fixture
def stopped(workshop, mediator, monkeypatch):
    """Merge until a write fails; expect one error, an output as it was before, and that `--resume` ends the merge."""

    def check(place, message, *more):
        before = all_files(workshop.folder / "out")
        run = mediator("merge", "recipe.yaml", "-o", "out", *more)
        assert run.code == 2
        assert "Traceback" not in run.err
        lines = run.err.splitlines()
        (at,) = (n for n, line in enumerate(lines) if line.startswith(f"error: {place}: {message}"))
        assert lines[at + 1] == f"  hint: {NO_SPACE}"
        assert all_files(workshop.folder / "out") == before
        monkeypatch.undo()
        monkeypatch.chdir(workshop.folder)
        run = mediator("merge", "recipe.yaml", "-o", "out", "--resume", "-q")
        assert run.code == 0, run.err
        found = all_files(workshop.folder / "out")
        assert not list(workshop.folder.glob(".out*"))
        shutil.rmtree(workshop.folder / "out")
        assert mediator("merge", "recipe.yaml", "-o", "out", "-q").code == 0
        assert all_files(workshop.folder / "out") == found

    return check


def test_a_disk_that_fills_up_when_files_are_sized_is_told(workshop, stopped, monkeypatch):
    workshop.recipe()
    monkeypatch.setattr(os, "posix_fallocate", fail_at(1, errno.ENOSPC))
    stopped(f"{workshop.folder}/.out.partial/model.safetensors", "cannot write: no space left on device")


@pytest.mark.parametrize("n", [1, 2, 17, 29])
def test_a_failing_write_of_a_tensor_is_told(workshop, stopped, monkeypatch, n):
    workshop.recipe(**ROUTED)
    monkeypatch.setattr(os, "pwrite", fail_at(n, real=os.pwrite))
    stopped(f"{workshop.folder}/.out.partial/model.safetensors", "cannot write: input/output error")


def test_a_failing_write_in_a_later_shard_is_told(workshop, stopped, monkeypatch):
    workshop.recipe(assign={"rule": "none"}, output={"shard_size": 1000})
    monkeypatch.setattr(os, "posix_fallocate", fail_at(3, errno.ENOSPC, os.posix_fallocate))
    place = f"{workshop.folder}/.out.partial/model-00003-of-00004.safetensors"
    stopped(place, "cannot write: no space left on device")


def test_a_disk_that_fills_up_below_a_sparse_expert_is_told(workshop, stopped, monkeypatch):
    workshop.recipe(**ROUTED)
    # The first call makes room for the dense tensors.
    monkeypatch.setattr(os, "posix_fallocate", fail_at(2, errno.ENOSPC, os.posix_fallocate))
    place = f"{workshop.folder}/.out.partial/experts/a.safetensors"
    stopped(place, "cannot write: no space left on device")


LATE = {
    "copy of a tokenizer file": ((shutil, "copyfile"), 2),
    "manifest": ((Path, "write_text"), 5),
    "flush to disk": ((os, "fsync"), 9),
    "rename": ((Path, "rename"), 1),
}


@pytest.mark.parametrize("row", LATE.values(), ids=LATE)
def test_a_late_failure_keeps_what_is_finished(workshop, stopped, monkeypatch, row):
    (owner, name), n = row
    workshop.recipe(**ROUTED)
    monkeypatch.setattr(owner, name, fail_at(n, real=getattr(owner, name)))
    stopped(f"{workshop.folder}/.out.partial", "cannot write: input/output error")


@pytest.mark.parametrize("row", [*LATE.values(), ((Path, "rename"), 2)], ids=[*LATE, "second rename"])
def test_a_late_failure_keeps_the_old_bundle_byte_for_byte(workshop, stopped, monkeypatch, row):
    (owner, name), n = row
    workshop.merge("out")
    workshop.recipe(**ROUTED)
    real, calls = getattr(owner, name), []

    def failing_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing_once)
    stopped(f"{workshop.folder}/.out.partial", "cannot write: input/output error", "--overwrite")


def test_an_interrupt_before_anything_is_finished_leaves_nothing_and_gives_130(workshop, mediator, monkeypatch):
    workshop.recipe()
    before = all_files(workshop.folder)
    monkeypatch.setattr(merging, "take_survey", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    assert mediator("merge", "recipe.yaml", "-o", "out").code == 130
    assert all_files(workshop.folder) == before


def test_a_defect_before_anything_is_finished_leaves_nothing_and_gives_1(workshop, mediator, monkeypatch):
    workshop.recipe()
    before = all_files(workshop.folder)
    monkeypatch.setattr(merging, "take_survey", lambda plan: None)
    run = mediator("merge", "recipe.yaml", "-o", "out")
    assert run.code == 1
    assert "Traceback" in run.err
    assert "this is a defect of mediator" in run.err
    assert all_files(workshop.folder) == before


LIMITED = """
import resource, signal, sys
from mediator_cli.cli.app import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
sys.argv = ["mediator", "merge", "recipe.yaml", "-o", "out"]
main()
"""


def test_a_real_limit_on_file_sizes_leaves_nothing(workshop):
    workshop.recipe(assign={"rule": "none"})
    before = all_files(workshop.folder)
    run = subprocess.run([sys.executable, "-c", LIMITED], cwd=workshop.folder, capture_output=True, text=True)
    assert run.returncode == 2
    assert "model.safetensors: cannot write: file too large" in run.stderr
    assert NO_SPACE in run.stderr
    assert all_files(workshop.folder) == before


@pytest.mark.parametrize(
    ("plot", "message", "hint"),
    [
        ("heat.gif", "'.gif' is not a picture format", "use .png, .svg, .pdf or .html"),
        ("no/heat.png", "no such folder", "create it"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_measuring(workshop, refused, plot, message, hint):
    workshop.recipe()
    refused(plot, message, hint, "analyze-conflicts", "recipe.yaml", "--plot", plot)


def test_a_report_that_cannot_be_written_is_told(workshop, refused):
    workshop.recipe()
    words = ("analyze-conflicts", "recipe.yaml", "-o", "no/conflicts.json")
    refused("no/conflicts.json", "cannot write: no such file", "choose another place with -o", *words)


def reuse(refused, workshop, message, hint="measure again with `mediator analyze-conflicts`", place=""):
    words = ("merge", "recipe.yaml", "-o", "out", "--conflicts", "report.json")
    refused(f"report.json{place}", message, hint, *words)


@pytest.fixture
def report(workshop, mediator):
    workshop.recipe()
    assert mediator("analyze-conflicts", "recipe.yaml", "-o", "report.json").code == 0
    return workshop.folder / "report.json"


def test_a_report_on_other_weights_is_refused(workshop, refused, report):
    shutil.copyfile(workshop.folder / "b" / "model.safetensors", workshop.folder / "a" / "model.safetensors")
    reuse(refused, workshop, "was measured on other weights of a")


def test_a_report_with_other_denoising_is_refused(workshop, refused, report):
    workshop.recipe(conflict={"denoise": "none"})
    reuse(refused, workshop, "was denoised by keep_above_std 1.0, the recipe says none")


def test_a_report_about_other_experts_is_refused(workshop, refused, report):
    workshop.recipe(experts=[{"name": n, "model": f"./{n}"} for n in ("b", "a")])
    reuse(refused, workshop, "is about experts a, b")


def test_a_report_about_other_tensors_is_refused(workshop, refused, report):
    text = report.read_text().replace("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gone.weight")
    report.write_text(text)
    reuse(refused, workshop, "is about other tensors")


def test_a_report_that_is_broken_json_is_refused(workshop, refused, report):
    report.write_text(report.read_text()[:100])
    reuse(refused, workshop, "broken JSON", "the file is damaged")


def test_a_report_with_a_field_missing_is_refused(workshop, refused, report):
    edit_json(report, unit=None)
    reuse(refused, workshop, "not a conflict report: input should be a valid string", "damaged", " unit")


def test_a_report_that_is_missing_is_refused(workshop, refused):
    workshop.recipe()
    reuse(refused, workshop, "cannot read: no such file or directory", "check the disk and the file's rights")
