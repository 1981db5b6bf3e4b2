"""A Mixture of Experts is trained as plain torch would, goes on after a kill, and is written anew."""

import gc
import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import all_files, edit_json, edit_tensors, put
from safetensors.torch import load_file
from tiny_moe import KINDS, tiny_moe
from tiny_tokens import FILMS, SUMS, task_prompts, word_tokenizer
from transformers import AutoModelForCausalLM

from mediator_cli.checkpoint.header import read_json
from mediator_cli.errors import CheckpointError, MediatorError, OutputError
from mediator_cli.moe.train.loss import balance_loss, cross_entropy
from mediator_cli.moe.train.model import open_source, open_student
from mediator_cli.moe.train.rows import Encoder, schedule, split
from mediator_cli.moe.train.run import train
from mediator_cli.moe.train.select import trainable
from mediator_cli.moe.train.settings import TrainSettings, rate
from mediator_cli.moe.train.state import state_file

EXACT = {"precision": "float32", "save_seconds": 0.0}


@pytest.fixture(autouse=True)
def _no_collecting(monkeypatch):
    """Accelerate looks for garbage among all that a test run holds, which takes longer than the training."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


def row(prompt, answer):
    return SimpleNamespace(prompt=prompt, answer=answer)


ROWS = {
    "sums": [row(prompt, "two plus") for prompt in task_prompts(SUMS)],
    "films": [row(prompt, "dull") for prompt in task_prompts(FILMS)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each format, with a tokenizer; by kind."""
    place = tmp_path_factory.mktemp("models")
    made = {kind: tiny_moe(place / kind, kind, eos_token_id=2, bos_token_id=1) for kind in KINDS}
    for folder in made.values():
        word_tokenizer().save_pretrained(folder)
    return made


@pytest.fixture
def mixtral(folders, tmp_path):
    return shutil.copytree(folders["mixtral"], tmp_path / "moe")


def tensors(folder):
    return load_file(folder / "model.safetensors")


def student_of(folder, **settings):
    chosen = TrainSettings(precision="float32", **settings)
    source = open_source(folder)
    return open_student(source, trainable("m", source.config, list(source.places), chosen.what), chosen, 64)


def encoded(rows=ROWS, loss_on="answer"):
    return {task: Encoder(word_tokenizer(), 2, loss_on).encode(task, some) for task, some in rows.items()}


def alone(model, example):
    """The summed cross-entropy of one row by itself, as transformers computes it."""
    labels = torch.tensor([[-100] * example.first + list(example.ids[example.first :])])
    found = model(input_ids=torch.tensor([example.ids]), labels=labels)
    return found.loss * (len(example.ids) - example.first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_on", ["answer", "text"])
def test_rows_in_one_line_get_the_loss_and_gradient_that_they_get_alone(folders, kind, loss_on):
    student = student_of(folders[kind])
    rows = [row for some in encoded(loss_on=loss_on).values() for row in some[:3]]
    found = student.passes(student.model)(rows)
    cross_entropy(found).backward()
    plain = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32)
    expected = sum(alone(plain, row) for row in rows)
    expected.backward()
    assert cross_entropy(found).item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in student.parameters.items():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    assert sum(parameter.requires_grad for parameter in student.model.parameters()) == len(student.parameters)


def test_training_takes_the_steps_that_plain_torch_takes(mixtral, tmp_path):
    settings = TrainSettings(what="attention", steps=5, batch=6, learning_rate=0.01, width=30, held_out=0, **EXACT)
    report = train(mixtral, ROWS, tmp_path / "out", settings)
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    trained = [p for name, p in model.named_parameters() if ".self_attn." in name or name.endswith("mlp.gate.weight")]
    optimizer = torch.optim.AdamW(trained, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step, rows in enumerate(schedule(split(encoded(), 0, 0)[0], settings)):
        optimizer.param_groups[0]["lr"] = 0.01 * rate(step, 5)
        loss = sum(alone(model, row) for row in rows) / sum(len(row.ids) - row.first for row in rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    assert report.losses == pytest.approx(losses, rel=1e-4)
    model.save_pretrained(tmp_path / "plain")
    expected, found = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "what"), [("qwen2_moe", "gates"), ("qwen3_moe", "all"), ("granitemoeshared", "all")])
def test_what_is_trained_changes_and_nothing_else_does(folders, tmp_path, kind, what):
    before = tensors(folders[kind])
    settings = TrainSettings(what=what, steps=6, batch=4, learning_rate=0.02, load_balance=0.01, **EXACT)
    report = train(folders[kind], ROWS, tmp_path / "out", settings)
    after = tensors(tmp_path / "out")
    names = trainable("m", read_json(folders[kind] / "config.json"), list(before), what)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(names)
    assert report.after["sums"].loss < report.before["sums"].loss
    assert (report.n_tensors, report.before.keys()) == (len(names), {"sums", "films"})
    assert report.n_trained == sum(before[name].numel() for name in names)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    held = split(encoded(), 32, 0)[1]["sums"]
    mean = sum(alone(model, row).item() for row in held) / sum(len(row.ids) - row.first for row in held)
    assert report.after["sums"].loss == pytest.approx(mean, rel=1e-4)


def test_half_precision_trains_gates_in_float32_and_writes_the_stored_dtype(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["mixtral"], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    word_tokenizer().save_pretrained(tmp_path / "half")
    source = open_source(tmp_path / "half")
    student = open_student(source, source.layout.routers, TrainSettings(), 64)
    dtypes = {name: parameter.dtype for name, parameter in student.model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == set(student.parameters)
    report = train(tmp_path / "half", ROWS, tmp_path / "out", TrainSettings(steps=8, batch=4, learning_rate=0.03))
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert report.after["films"].loss < report.before["films"].loss


@pytest.fixture
def _one_thread():
    """Sums of several threads may differ in their last bits from those of the killed process, which has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KILLED = TrainSettings(steps=7, batch=4, learning_rate=0.01, load_balance=0.02, **EXACT)


def killed_at(step, *arguments):
    """Train in a process that dies once a number of steps are done."""
    child = os.fork()
    if child == 0:
        try:
            # Threads do not live on in a forked process, and one that waits for them dies in another way.
            torch.set_num_threads(1)
            die = lambda beat: os.kill(os.getpid(), signal.SIGKILL) if beat.loss and beat.done == step else None  # noqa: E731
            train(*arguments, hear=die)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("inside", "step"), [(True, 4), (False, 4), (True, 7)])
def test_a_killed_training_goes_on_to_the_same_bytes(mixtral, tmp_path, inside, step):
    # Dropout draws random numbers in every step.
    edit_json(mixtral / "config.json", attention_dropout=0.2)
    whole = train(mixtral, ROWS, tmp_path / "whole", KILLED)
    target = mixtral if inside else tmp_path / "out"
    before = all_files(mixtral)
    killed_at(step, mixtral, ROWS, target, KILLED)
    assert all_files(mixtral) == before
    assert inside or not target.exists()
    with pytest.raises(OutputError, match=r"can go on\n.*give --resume, or --overwrite"):
        train(mixtral, ROWS, target, KILLED)
    if step == 7:
        # All but the folder is done, which a kill may have left in the middle of its change.
        os.utime(mixtral / "model.safetensors")
    again = train(mixtral, ROWS, target, KILLED, mode="resume")
    assert (again.losses, again.before, again.after) == (whole.losses, whole.before, whole.after)
    assert all_files(target) == all_files(tmp_path / "whole")
    assert not state_file(target).exists()


def test_another_training_does_not_go_on_with_it_and_overwrite_throws_it_away(mixtral, tmp_path):
    killed_at(2, mixtral, ROWS, tmp_path / "out", KILLED)
    other = TrainSettings(steps=7, batch=4, learning_rate=0.02, **EXACT)
    with pytest.raises(OutputError, match="was another one: learning_rate, load_balance differ"):
        train(mixtral, ROWS, tmp_path / "out", other, mode="resume")
    with pytest.raises(OutputError, match="was another one: rows differ"):
        train(mixtral, ROWS | {"sums": ROWS["sums"][1:]}, tmp_path / "out", KILLED, mode="resume")
    os.utime(mixtral / "model.safetensors")
    with pytest.raises(OutputError, match="was another one: files differ"):
        train(mixtral, ROWS, tmp_path / "out", KILLED, mode="resume")
    state_file(tmp_path / "out").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        train(mixtral, ROWS, tmp_path / "out", KILLED, mode="resume")
    report = train(mixtral, ROWS, tmp_path / "out", KILLED, mode="overwrite")
    assert len(report.losses) == 7
    with pytest.raises(OutputError, match="no interrupted training"):
        train(mixtral, ROWS, tmp_path / "other", KILLED, mode="resume")


def test_a_loss_that_is_not_finite_stops_and_leaves_nothing(mixtral, tmp_path):
    before = all_files(tmp_path)
    settings = TrainSettings(what="all", steps=9, batch=4, learning_rate=1e30, **EXACT)
    with pytest.raises(MediatorError, match=r"step \d: the (loss|gradient) is not finite\n.*lower --learning-rate"):
        train(mixtral, ROWS, mixtral, settings)
    assert all_files(tmp_path) == before


def refused(folder, target, message, rows=ROWS, error=MediatorError, **settings):
    before = all_files(folder.parent)
    with pytest.raises(error, match=message):
        train(folder, rows, target, TrainSettings(steps=2, **settings), hear=lambda beat: pytest.fail("it began"))
    assert all_files(folder.parent) == before


def test_all_that_is_wrong_is_told_before_the_first_step(mixtral, tmp_path):
    out = tmp_path / "out"
    refused(mixtral, out, "nothing to train on", rows={})
    refused(mixtral, out, "films: has no rows", rows=ROWS | {"films": []})
    refused(mixtral, out, "sums: none of its", error=CheckpointError, length=3)
    refused(mixtral, out, "no rows are given of 'sum'", shares={"sum": 1.0})
    refused(mixtral, out, "no part 'projectors'", error=CheckpointError, what="projectors")
    refused(mixtral, tmp_path, "moe: lies in|exists", error=OutputError)
    refused(mixtral, mixtral / "in", "lies in", error=OutputError)
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    edit_tensors(mixtral / "model.safetensors", put(gate, torch.full((3, 16), torch.nan)))
    refused(mixtral, out, f"{gate}: holds NaN", error=CheckpointError)
    edit_tensors(mixtral / "model.safetensors", lambda all_: all_.pop("model.norm.weight"))
    refused(mixtral, out, "lacks model.norm.weight", error=CheckpointError)
    edit_tensors(mixtral / "model.safetensors", lambda all_: all_.pop(gate))
    refused(mixtral, out, f"lacks {gate}", error=CheckpointError)
    edit_json(mixtral / "config.json", model_type="llama")
    refused(mixtral, out, "is no Mixture of Experts", error=CheckpointError)


def test_the_folder_tells_what_was_done(mixtral, tmp_path):
    (mixtral / "README.md").write_text("# mine\n")
    settings = TrainSettings(steps=3, batch=4, held_out=0, shares={"sums": 3.0}, **EXACT)
    train(mixtral, ROWS, tmp_path / "out", settings, held_out={"films": ROWS["films"][:5]})
    card, told = (
        (tmp_path / "out" / "README.md").read_text(),
        json.loads((tmp_path / "out" / "training.json").read_text()),
    )
    assert card.startswith("# mine\n")
    assert "Trained: gates (144 of" in card
    assert told["tasks"]["sums"]["drawn"] == 9
    assert (told["what"], len(told["losses"]), told["after"]["films"]["rows"]) == ("gates", 3, 5)
    assert "sums" not in told["after"]
    again = train(tmp_path / "out", ROWS, tmp_path / "out", settings, held_out={"films": ROWS["films"][:5]})
    assert again.before["films"].loss == pytest.approx(told["after"]["films"]["loss"], rel=1e-6)
    assert (tmp_path / "out" / "README.md").read_text().count("## Training") == 1


def test_checkpointing_changes_memory_and_not_the_result(mixtral, tmp_path):
    plain = TrainSettings(steps=3, batch=4, load_balance=0.1, **EXACT)
    kept = train(mixtral, ROWS, tmp_path / "a", plain)
    again = train(mixtral, ROWS, tmp_path / "b", replace(plain, checkpointing=True))
    assert again.losses == pytest.approx(kept.losses, rel=1e-6)
    for name, tensor in tensors(tmp_path / "a").items():
        torch.testing.assert_close(tensors(tmp_path / "b")[name], tensor, rtol=1e-4, atol=1e-6)


def naive_balance(logits, top_k):
    n_tokens, n = logits.shape
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    counts = np.zeros(n)
    for token in range(n_tokens):
        for expert in np.argsort(-odds[token])[:top_k]:
            counts[expert] += 1
    return n * sum(counts[i] / (n_tokens * top_k) * odds[:, i].mean() for i in range(n))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_load_balance_loss_is_that_of_switch(top_k):
    logits = np.random.default_rng(top_k).normal(size=(40, 5))
    assert balance_loss(torch.tensor(logits), top_k).item() == pytest.approx(naive_balance(logits, top_k), rel=1e-5)
    one = torch.zeros(8, 4)
    one[:, 2] = 50.0
    assert balance_loss(one, 1).item() == pytest.approx(4.0)
    each = 50.0 * torch.eye(4).repeat(2, 1)
    assert balance_loss(each, 1).item() == pytest.approx(1.0)


def test_load_balance_spreads_the_tokens(mixtral, tmp_path):
    def balance(folder):
        student = student_of(folder)
        return student.passes(student.model)(encoded()["sums"]).balance.item()

    settings = {"steps": 8, "batch": 6, "learning_rate": 0.02, **EXACT}
    train(mixtral, ROWS, tmp_path / "free", TrainSettings(**settings))
    train(mixtral, ROWS, tmp_path / "even", TrainSettings(load_balance=9.0, **settings))
    assert balance(tmp_path / "even") < balance(tmp_path / "free") - 0.05
