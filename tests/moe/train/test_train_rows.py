"""Which tensors are trained, which rows come when, and how they lie in a pass."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny_moe import KINDS, tiny_moe
from tiny_tokens import CHATML, byte_tokenizer, word_tokenizer

from mediator_cli.checkpoint.header import read_json, read_tensors
from mediator_cli.errors import CheckpointError, MediatorError
from mediator_cli.moe.train.lines import grid_of, grid_tokens, groups, line_of, line_tokens, opening
from mediator_cli.moe.train.rows import Encoder, Example, digest, end_token, fitting, schedule, split
from mediator_cli.moe.train.select import choices, trainable
from mediator_cli.moe.train.settings import TrainSettings, check_settings, rate


def row(prompt, answer):
    return SimpleNamespace(prompt=prompt, answer=answer)


GATES = {
    "mixtral": [f"model.layers.{n}.block_sparse_moe.gate.weight" for n in (0, 1, 2)],
    "qwen2_moe": [f"model.layers.{n}.mlp.gate.weight" for n in (0, 2)],
    "qwen3_moe": [f"model.layers.{n}.mlp.gate.weight" for n in (1, 2)],
    "granitemoeshared": [f"model.layers.{n}.block_sparse_moe.router.layer.weight" for n in (0, 1, 2)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_gates_attention_and_all_are_found_in_every_format(tmp_path, kind):
    folder = tiny_moe(tmp_path / kind, kind)
    config, names = read_json(folder / "config.json"), list(read_tensors(folder))
    chosen = {what: trainable("m", config, names, what) for what in choices(config)}
    assert sorted(chosen["gates"]) == GATES[kind]
    attention = {name for name in names if ".self_attn." in name}
    assert {"q_proj", "o_proj"} <= {name.split(".")[-2] for name in attention}
    assert set(chosen["attention"]) == {*GATES[kind], *attention}
    assert set(chosen["all"]) == set(names)
    with pytest.raises(CheckpointError, match=r"no part 'projectors' to train\n.*choose one of gates, attention, all"):
        trainable("m", config, names, "projectors")


def test_experts_of_different_architectures_have_projectors():
    names = ["embed.weight", "router.weight", "router.bias"]
    names += [f"experts.0.{part}" for part in ("proj_in.layers.0.weight", "proj_out.layers.0.bias", "body.norm.weight")]
    config = {"model_type": "mediator_heterogeneous_moe"}
    assert choices(config) == ("gates", "projectors", "all")
    assert trainable("m", config, names, "gates") == ("router.weight", "router.bias")
    assert trainable("m", config, names, "projectors") == tuple(names[1:5])
    assert trainable("m", config, names, "all") == tuple(names)
    with pytest.raises(CheckpointError, match="choose one of gates, projectors, all"):
        trainable("m", config, names, "attention")


def test_a_row_reads_as_it_is_asked_and_ends_with_the_token_that_the_template_writes(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 4]}')
    end = end_token(tmp_path, tokenizer)
    assert tokenizer.decode([end]) == "<|im_end|>"
    (found,) = Encoder(tokenizer, end).encode("t", [row("how many", "box")])
    chat = [{"role": "user", "content": "how many"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(found.ids) == f"{prompt}box<|im_end|>"
    assert tokenizer.decode(found.ids[found.first :]) == "box<|im_end|>"
    (text,) = Encoder(tokenizer, end, "text").encode("t", [row("how many", "box")])
    assert (text.ids, text.first) == (found.ids, 1)


@pytest.mark.parametrize(("said", "end"), [('{"eos_token_id": 1}', 1), ("{}", 2)])
def test_without_a_word_of_the_template_the_config_says_the_end(tmp_path, said, end):
    (tmp_path / "config.json").write_text(said)
    assert end_token(tmp_path, word_tokenizer()) == end


def examples(task, n, size=3):
    return tuple(Example(task, (*[9] * size, at), size) for at in range(n))


def test_tasks_come_by_their_shares_at_every_step_and_each_row_once_a_round():
    tasks = {"a": examples("a", 5), "b": examples("b", 50), "c": examples("c", 50)}
    settings = TrainSettings(steps=20, batch=4, shares={"b": 2.0})
    steps = schedule(tasks, settings)
    assert [len(step) for step in steps] == [4] * 20
    for n in range(1, 21):
        counts = Counter(row.task for step in steps[:n] for row in step)
        assert all(abs(counts[task] - 4 * n * share) < 1 for task, share in (("a", 0.25), ("b", 0.5), ("c", 0.25)))
    order = [row for step in steps for row in step if row.task == "a"]
    rounds = [[row.ids[-1] for row in order[at : at + 5]] for at in range(0, 20, 5)]
    assert all(sorted(numbers) == list(range(5)) for numbers in rounds)
    assert len({tuple(numbers) for numbers in rounds}) > 1
    assert schedule(tasks, settings) == steps
    assert schedule(tasks, TrainSettings(steps=20, batch=4, shares={"b": 2.0}, seed=1)) != steps


def test_rows_are_held_out_by_the_seed_and_never_trained_on():
    tasks = {"a": examples("a", 100), "b": examples("b", 40), "c": examples("c", 3)}
    rest, held = split(tasks, 8, 0)
    assert {task: len(rows) for task, rows in held.items()} == {"a": 8, "b": 4, "c": 0}
    assert all(sorted([*rest[task], *held[task]], key=lambda e: e.ids) == list(tasks[task]) for task in tasks)
    assert split(tasks, 8, 0) == (rest, held)
    assert split(tasks, 8, 1)[1] != held


def test_long_rows_are_left_out_and_told():
    tasks = {"a": (*examples("a", 2), *examples("a", 1, 9)), "b": examples("b", 1)}
    kept, notices = fitting(tasks, 4)
    assert {task: len(rows) for task, rows in kept.items()} == {"a": 2, "b": 1}
    assert notices == ["1 of 3 rows of a are longer than 4 tokens and are left out"]
    with pytest.raises(CheckpointError, match=r"b: none of its 1 rows has 3 tokens or fewer\n.*the shortest has 4"):
        fitting(tasks, 3)


def test_a_digest_tells_rows_apart_whatever_file_they_came_from():
    rows = [row("a", "b"), row("c", "d")]
    assert digest(rows) == digest([row("a", "b"), row("c", "d")])
    assert len({digest(rows), digest(rows[::-1]), digest([row("ab", ""), row("c", "d")])}) == 3


def test_the_learning_rate_rises_and_falls():
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:6] == pytest.approx([(n + 1) / 6 for n in range(6)])
    assert max(rates) == 1
    assert rates[53] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 47 / 94)) / 2)
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rate(0, 1) == 1


def test_all_that_is_wrong_with_settings_is_told_at_once():
    wrong = TrainSettings(steps=0, batch=0, learning_rate=-1.0, load_balance=math.nan, shares={"mats": 1, "b": 0})
    with pytest.raises(MediatorError) as error:
        check_settings(wrong, ["maths", "b"])
    places = [problem.place for problem in error.value.problems]
    assert places == ["steps", "batch", "learning_rate", "load_balance", "shares", "shares"]
    assert "did you mean 'maths'" in str(error.value)


ROWS = [
    Example("a", (1, 2, 3, 4, 5, 6), 4),
    Example("b", (1, 2, 3, 7, 8), 4),
    Example("a", (1, 2, 9, 4), 3),
]


def test_a_line_holds_the_opening_once_and_each_row_sees_itself():
    line = line_of(ROWS[:2], torch.float32)
    assert opening(ROWS[:2]) == 3
    assert line.ids.tolist() == [[1, 2, 3, 4, 5, 7]]
    assert line.positions.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert line.targets.tolist() == [5, 6, 8]
    assert line.predicting.tolist() == [3, 4, 5]
    assert line.owners.tolist() == [0, 0, 1]
    seen = (line.mask[0, 0] == 0).int().tolist()
    assert seen[4] == [1, 1, 1, 1, 1, 0]
    assert seen[5] == [1, 1, 1, 0, 0, 1]
    assert seen[1] == [1, 1, 0, 0, 0, 0]


def test_nothing_that_predicts_is_in_the_opening():
    alike = [Example("a", (1, 2, 3, 4), 3), Example("a", (1, 2, 3, 4), 3)]
    assert opening(alike) == 2
    assert opening([Example("a", (1, 2, 3), 1)] * 2) == 0
    assert opening([Example("a", (1, 2, 3, 4), 3)]) == 2
    assert line_of(alike, torch.float32).targets.tolist() == [4, 4]


def test_rows_of_a_grid_are_padded_behind_and_labels_are_the_targets():
    grid = grid_of(ROWS, 0)
    assert grid.ids.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 0], [1, 2, 9, 4, 0, 0]]
    assert grid.mask.sum(dim=1).tolist() == [6, 5, 4]
    assert grid.targets.tolist() == [5, 6, 8, 4]
    assert grid.owners.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(("count", "width"), [(line_tokens, 7), (line_tokens, 1), (grid_tokens, 11)])
def test_passes_hold_every_row_once_and_are_no_wider_than_asked(count, width):
    found = groups(ROWS, width, count)
    assert sorted(row.ids for group in found for row in group) == sorted(row.ids for row in ROWS)
    assert all(count(group) <= width or len(group) == 1 for group in found)
    assert len(found) == (3 if width == 1 else 2)
