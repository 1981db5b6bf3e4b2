"""`mediator train`: what it says, where, and what it refuses."""

import gc
import json
import shlex
from itertools import count
from types import SimpleNamespace

import pytest
from conftest import all_files
from safetensors.torch import load_file
from tiny_moe import tiny_moe
from tiny_tokens import FILMS, SUMS, task_prompts, word_tokenizer

from mediator_cli.moe.train.state import state_file

SHORT = ("--steps", 3, "--batch", 4, "--precision", "float32")
SHARES = ("--rows", "sums.train.jsonl", "--rows", "films=films.jsonl")


@pytest.fixture(autouse=True)
def _no_collecting(monkeypatch):
    """Accelerate looks for garbage among all that a test run holds, which takes longer than the training."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def moe(workshop):
    """A Mixtral in the workshop, and rows of two tasks."""
    folder = tiny_moe(workshop.folder / "moe", "mixtral", eos_token_id=2, bos_token_id=1)
    word_tokenizer().save_pretrained(folder)
    for file, words, answer in (("sums.train.jsonl", SUMS, "two"), ("films.jsonl", FILMS, "dull")):
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt in task_prompts(words)[:20]]
        (workshop.folder / file).write_text("\n".join(lines) + "\n")
    return folder


def test_it_tells_what_was_trained_and_where_it_is(moe, mediator):
    run = mediator("train", "moe", *SHARES, *SHORT, "-o", "out")
    assert (run.code, run.err) == (0, "")
    lines = run.out.splitlines()
    assert [line.split()[:3] for line in lines if line.split()[:1] in (["sums"], ["films"])] == [
        ["sums", "6", "2"],
        ["films", "6", "2"],
    ]
    assert any(line.startswith("trained 144 of") and "(gates) in 3 steps" in line for line in lines)
    assert lines[-1] == "written to out"
    assert load_file(moe / "model.safetensors").keys() == load_file(moe.parent / "out" / "model.safetensors").keys()


def test_json_has_the_curve_and_quiet_says_nothing(moe, mediator):
    run = mediator("train", "moe", *SHARES, *SHORT, "--in-place", "--json", "--load-balance", 0.01, "--share", "sums=2")
    told = json.loads(run.out)
    assert (told["folder"], len(told["losses"]), told["load_balance"]) == ("moe", 3, 0.01)
    assert {task: facts["drawn"] for task, facts in told["tasks"].items()} == {"sums": 8, "films": 4}
    run = mediator("train", "moe", *SHARES, *SHORT, "-o", "out", "-q")
    assert (run.code, run.out, run.err) == (0, "", "")


REFUSED = {
    "no place": (SHARES, "-o, --in-place", "nothing says where"),
    "two places": ((*SHARES, "-o", "out", "--in-place"), "-o, --in-place", "both are given"),
    "no rows": (("-o", "out"), "--rows", "nothing to train on"),
    "no file": (("--rows", "maths=gone.jsonl", "-o", "out"), "gone.jsonl", "cannot read"),
    "task twice": ((*SHARES, "--rows", "sums=films.jsonl", "-o", "out"), "--rows sums=films.jsonl", "a second task"),
    "unknown task": ((*SHARES, "--share", "summs=2", "-o", "out"), "shares", "no rows are given of 'summs'"),
    "no number": ((*SHARES, "--share", "sums=two", "-o", "out"), "--share sums=two", "is no share"),
    "no state": ((*SHARES, "-o", "out", "--resume"), "out", "no interrupted training"),
    "too short": ((*SHARES, "-o", "out", "--length", 2), "sums", "has 2 tokens or fewer"),
    "no such part": ((*SHARES, "-o", "out", "--what", "projectors"), "moe", "has no part 'projectors'"),
    "standing": ((*SHARES, "-o", "a"), "a", "exists"),
}


@pytest.mark.parametrize(("words", "place", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_told_before_anything_is(moe, refused, words, place, message):
    refused(place, message, "", "train", "moe", *words)


def test_a_dense_model_is_refused(moe, refused):
    refused("a", "is no Mixture of Experts", "kind: moe", "train", "a", *SHARES, "-o", "out")


def test_an_interrupt_leaves_what_goes_on(moe, mediator, monkeypatch):
    from mediator_cli.moe.train import trainer

    taken = []

    def stop(*arguments):
        taken.append(arguments)
        if len(taken) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    real = trainer.groups
    monkeypatch.setattr(trainer, "groups", stop)
    # A save is due after every step.
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=count(0, 1000).__next__))
    before = all_files(moe)
    run = mediator("train", "moe", *SHARES, *SHORT, "--in-place")
    assert run.code == 130
    command = shlex.join(["mediator", "train", "moe", *SHARES, *map(str, SHORT), "--in-place", "--resume"])
    assert run.err == f"interrupted; 1 of 3 steps are kept, go on with `{command}`\n"
    assert all_files(moe) == before
    assert state_file(moe).is_file()
    run = mediator("train", "moe", *SHARES, *SHORT, "--in-place", "--resume")
    assert run.code == 0
    assert not state_file(moe).exists()
