"""Scores on disk: found again, never half written, and not taken for those of something else."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import edit_json, edit_tensors, put, with_prompts

from mediator_cli import load_recipe, make_plan
from mediator_cli.compare.key import conflict_key, model_key
from mediator_cli.compare.store import open_store, row_key
from mediator_cli.errors import CheckpointError, OutputError
from mediator_cli.evaluate.score import RowScore
from mediator_cli.evaluate.tasks import Row

NORM = "model.norm.weight"
ROWS = [Row(prompt="two", answer="x"), Row(prompt="two", answer="y"), Row(prompt="two", answer="x", choices=["x", "y"])]
FOUND = [RowScore(True, None, -0.5, 3), RowScore(False, None, -2.25, 3), RowScore(True, False, -0.125, 3)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "work" / "scores" / "m.json"


def test_scores_are_found_again_by_mixture_and_row(file):
    open_store(file).put("[]", ROWS[:2], FOUND[:2], 1.5)
    open_store(file).put("a", ROWS[2:], FOUND[2:], 0.5)
    store = open_store(file)
    assert [store.get("[]", row) for row in ROWS[:2]] == FOUND[:2]
    assert store.get("a", ROWS[2]) == FOUND[2]
    assert store.missing("[]", ROWS) == ROWS[2:]
    assert store.missing("b", ROWS) == ROWS
    assert (store.seconds, store.n_timed) == (2.0, 3)
    with pytest.raises(KeyError):
        store.get("a", ROWS[0])


def test_a_row_is_named_by_what_is_asked_expected_and_offered():
    assert len({row_key(row) for row in ROWS}) == 3
    assert row_key(ROWS[0]) == row_key(Row(prompt="two", answer="x", id=7))


def test_two_comparisons_lose_no_scores_of_each_other(file):
    one, two = open_store(file), open_store(file)
    one.put("[]", ROWS[:1], FOUND[:1], 1.0)
    two.put("[]", ROWS[1:2], FOUND[1:2], 2.0)
    store = open_store(file)
    assert not store.missing("[]", ROWS[:2])
    assert (store.seconds, store.n_timed) == (3.0, 2)


def test_the_file_is_whole_at_any_moment(file, monkeypatch):
    open_store(file).put("[]", ROWS[:1], FOUND[:1], 1.0)
    before = file.read_bytes()
    write = Path.write_text

    def half(path, text, **options):
        write(path, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OutputError, match="cannot write: no space left"):
        open_store(file).put("[]", ROWS[1:], FOUND[1:], 1.0)
    assert file.read_bytes() == before
    monkeypatch.undo()
    open_store(file).put("[]", ROWS[1:], FOUND[1:], 1.0)
    assert sorted(file.parent.iterdir()) == [file]
    assert not open_store(file).missing("[]", ROWS)


@pytest.mark.parametrize("text", ["", "{oops", "[]", "{}", json.dumps({"scores": {"[]": {"k": [1]}}})])
def test_a_damaged_file_is_named(file, text):
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_store(file)
    assert (caught.value.problems[0].place, caught.value.problems[0].message) == (str(file), "holds no scores")


def keys(shop, *changes, **fields):
    plan = make_plan(load_recipe(shop.recipe(**{"experts": with_prompts(), **fields}), changes))
    return model_key(plan, "bundle"), model_key(plan, "experts"), conflict_key(plan)


def test_what_changes_the_bundle_changes_its_name(shop):
    changes = [
        "extract.density=0.2", "extract.rescale=2", "output.dtype=float32", "seed=1", "assign.rule=all",
        "average.method=ties", "tokenizer=expert:a", "experts[0].weight=2",
        "overrides=[{match: '*', extract: {density: 1}}]",
    ]  # fmt: skip
    found = [keys(shop), *(keys(shop, change) for change in changes)]
    assert len({bundle for bundle, _, _ in found}) == len(found)
    assert len({rest for _, *rest in map(tuple, found) for rest in [tuple(rest)]}) == 1


def test_what_changes_no_score_of_a_given_mixture_keeps_the_name(shop):
    plain = [{"name": n, "model": f"./{n}"} for n in "ab"]
    assert keys(shop) == keys(shop, experts=plain) == keys(shop, "output.path=x", "router={features: text}")


def test_conflict_is_measured_anew_with_other_denoising(shop):
    assert keys(shop)[2] != keys(shop, "conflict.denoise=none")[2]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit_tensors(folder / "a" / "model.safetensors", put(NORM, torch.ones(8))),
        lambda folder: os.utime(folder / "base" / "model.safetensors", ns=(1, 1)),
        lambda folder: (folder / "base" / "chat_template.jinja").write_text("other"),
        lambda folder: edit_json(folder / "b" / "generation_config.json", eos_token_id=[2, 3]),
        lambda folder: edit_json(folder / "lora" / "adapter_config.json", lora_alpha=8),
    ],
)
def test_changed_sources_get_other_names(shop, change):
    experts = [*with_prompts(), {"name": "l", "model": "./lora"}]
    before = keys(shop, experts=experts)
    change(shop.folder)
    assert all(old != new for old, new in zip(before, keys(shop, experts=experts), strict=True))
