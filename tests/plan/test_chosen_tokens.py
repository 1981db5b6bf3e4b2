"""Rows of single tokens, padding and chat templates as a recipe chooses them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import edit_json
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mediator_cli import load_recipe, make_plan, merge
from mediator_cli.errors import MediatorError

GOLDEN = Path(__file__).parent.parent / "golden" / "mergekit"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def models(tmp_path):
    shutil.copytree(GOLDEN / "inputs", tmp_path, dirs_exist_ok=True)
    return tmp_path


def plan_of(models, **fields):
    experts = [{"name": name, "model": f"./{name}"} for name in ("chat", "a")]
    recipe = {"version": 1, "base": "./base", "experts": experts, "assign": {"rule": "none"}, **fields}
    (models / "recipe.yaml").write_text(json.dumps(recipe))
    return make_plan(load_recipe(models / "recipe.yaml"))


def test_rows_are_taken_from_where_the_recipe_says(models):
    tokens = {
        "w3": {"source": "chat", "force": True}, "w4": {"source": "a", "id": 0, "force": True},
        "<|im_end|>": {"source": "chat", "token": "w1"}, "<|new|>": {"source": "zero"}, "<|mean|>": {},
    }  # fmt: skip
    with pytest.raises(MediatorError, match=r"no source has rows of 1 token \(<\|mean\|>\)"):
        plan_of(models, tokens=tokens, tokenizer="expert:chat")
    tokens.pop("<|mean|>")
    plan = plan_of(models, tokens=tokens, tokenizer="expert:chat", pad_tokens_to=8)
    assert "the recipe chooses the rows of 4 tokens (w3, w4, <|im_end|>, <|new|>)" in plan.notices
    out = merge(plan, models / "out")
    ids = AutoTokenizer.from_pretrained(out).get_vocab()
    rows = load_file(out / "model.safetensors")[EMBEDDING]
    chat, a, base = (load_file(models / name / "model.safetensors")[EMBEDDING] for name in ("chat", "a", "base"))
    assert rows.shape == (24, 8)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 24
    assert torch.equal(rows[ids["w3"]], chat[6])
    assert torch.equal(rows[ids["w4"]], a[0])
    # Both the base and a lack the token and have the row that is chosen; chat has its own.
    torch.testing.assert_close(rows[ids["<|im_end|>"]], (chat[17] + chat[4]) / 2)
    assert ids["<|new|>"] == 18
    assert not rows[18:].any()
    torch.testing.assert_close(rows[ids["w5"]], (chat[8] + a[8]) / 2)
    assert not torch.equal(rows[ids["w5"]], base[8])


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"tokens": {"w1": {"source": "b"}}}, "tokens.w1.source", "no source 'b'"),
        ({"tokens": {"w1": {"source": "a", "id": 16}}}, "tokens.w1.id", "a has no row 16: it has 16"),
        ({"tokens": {"w1": {"source": "a", "token": "x"}}}, "tokens.w1", "a has no row of x"),
        ({"tokens": {"x": {"source": "base"}}}, "tokens.x", "base has no row of x"),
        ({"tokens": {"x": {"source": "a", "id": 1, "token": "w1"}}}, "tokens.x", "give token or id, not both"),
        ({"tokens": {"x": {"id": 1}}}, "tokens.x", "token and id name a row of a source"),
        ({"pad_tokens_to": 0}, "pad_tokens_to", "greater than or equal to 1"),
        ({"chat_template": "chatlm"}, "chat_template", "no chat template 'chatlm'"),
    ],
)
def test_what_is_wrong_with_a_token_is_told_with_its_place(models, fields, place, message):
    with pytest.raises(MediatorError) as raised:
        plan_of(models, **fields)
    found = [problem for problem in raised.value.problems if problem.place.endswith(f"recipe.yaml:1 {place}")]
    assert len(found) == 1, raised.value
    assert message in found[0].message


def test_tokens_of_unknown_vocabularies_are_not_chosen(models):
    for name in ("base", "chat", "a"):
        (models / name / "tokenizer.json").unlink()
    with pytest.raises(MediatorError) as raised:
        plan_of(models, tokens={"w1": {"source": "a"}}, pad_tokens_to=8)
    said = [problem.message for problem in raised.value.problems]
    assert said.count("no source brings a tokenizer that can be read") == 2


def test_a_chosen_template_is_the_only_one(models):
    edit_json(models / "base" / "tokenizer_config.json", chat_template="old")
    (models / "base" / "chat_template.jinja").unlink()
    kept = merge(plan_of(models), models / "kept")
    assert AutoTokenizer.from_pretrained(kept).chat_template == "old"
    out = merge(plan_of(models, chat_template="{{ messages }}"), models / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
