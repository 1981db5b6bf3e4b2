"""What stands beside merged weights loads with transformers, generates, and agrees in its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_json
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_tokens import WORDS
from tiny_vocabularies import EMBED, STATIC, Tokens, make_tokenizer, plan_of, rows_of, texts_in, write_source
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.plan.model import Plan

TURNS = "{% for m in messages %}<|user|> {{ m.content }} <|end|> {% endfor %}<|bot|>"
CHAT = Tokens(added=["<|end|>", "<x>"], eos="<|end|>", template=TURNS)
SOURCES = {"base": Tokens(padding=2), "a": CHAT, "b": Tokens(added=["<y>"], padding=3)}
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CHOICES = ["base", "union", "expert:a", "expert:b"]


def written(folder: Path, sources: dict[str, Tokens], **fields: Any) -> tuple[Plan, Path]:
    plan = plan_of(folder, sources, **fields)
    return plan, merge(plan, folder / "out", settings=Settings(workers=1))


def steps(model: Any, prompt: torch.Tensor, forced: int) -> int:
    """Count the tokens that a model generates when each one has to be `forced`."""
    made = model.generate(prompt, max_new_tokens=4, do_sample=False, prefix_allowed_tokens_fn=lambda *_: [forced])
    return made.shape[1] - prompt.shape[1]


@pytest.mark.parametrize("tokenizer", CHOICES)
def test_the_written_folder_generates_and_stops(tmp_path, tokenizer):
    _, out = written(tmp_path, SOURCES, tokenizer=tokenizer)
    owner = tokenizer.removeprefix("expert:") if tokenizer.startswith("expert") else "base"
    words = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    chat = [{"role": "user", "content": "two plus three"}]
    prompt = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == make_tokenizer(SOURCES[owner]).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert words.unk_token_id not in prompt["input_ids"]
    assert words.eos_token == SOURCES[owner].eos
    assert steps(model, prompt["input_ids"], words.eos_token_id) == 1
    assert steps(model, prompt["input_ids"], words.convert_tokens_to_ids("two")) == 4
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size >= len(words)


@pytest.mark.parametrize(("tokenizer", "known"), [("union", "<|end|> <x> <y>"), ("expert:a", "<|end|> <x>")])
def test_new_tokens_go_through_the_tokenizer_to_their_rows(tmp_path, tokenizer, known):
    _, out = written(tmp_path, SOURCES, tokenizer=tokenizer)
    words, rows = AutoTokenizer.from_pretrained(out), load_file(out / "model.safetensors")[EMBED]
    ids = words(f"two {known.replace(' ', '')} plus", add_special_tokens=False)["input_ids"]
    assert words.convert_ids_to_tokens(ids) == ["two", *known.split(), "plus"]
    for number, text in zip(ids[1:-1], known.split(), strict=True):
        assert torch.equal(rows[number], rows_of("b" if text == "<y>" else "a", [text])[0]), text
    assert words.decode(ids, skip_special_tokens=True).split() == ["two", "plus"]


@pytest.mark.parametrize("tokenizer", CHOICES)
def test_token_ids_of_all_settings_are_those_of_the_written_tokenizer(tmp_path, tokenizer):
    _, out = written(tmp_path, SOURCES, tokenizer=tokenizer)
    words = AutoTokenizer.from_pretrained(out)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((out / name).read_text())
        assert (settings["eos_token_id"], settings["bos_token_id"]) == (words.eos_token_id, words.bos_token_id), name


def test_all_settings_that_name_tokens_are_the_winners(tmp_path):
    ids = {"image_token_index": 21, "decoder_start_token_id": 3, "video_token_ids": [1, 21], "hidden_ids": 1}
    sources = {"base": Tokens(config={"image_token_index": 5, "text_config": {"pad_token_id": 6}}), "a": CHAT}
    sources["a"] = Tokens(**{**vars(CHAT), "config": {**ids, "text_config": {"pad_token_id": 20, "vocab_size": 22}}})
    plan = plan_of(tmp_path, sources, tokenizer="expert:a")
    config = dict(plan.settings.config)
    assert {name: config.get(name) for name in ids} == {**ids, "hidden_ids": None}
    assert (config["text_config"], config["vocab_size"]) == ({"pad_token_id": 20}, 22)
    found = {d.setting: (d.winner, d.value, dict(d.others)) for d in plan.differences}
    assert found["image_token_index"] == ("a", 21, {"base": 5})
    assert found["vocab_size"] == ("a", 22, {"base": 20})


def test_the_differences_of_a_union_show_the_base_and_the_new_number_of_rows(tmp_path):
    plan = plan_of(tmp_path, {"base": Tokens(), "a": CHAT, "b": Tokens(added=["<y>"])}, tokenizer="union")
    found = {d.setting: (d.winner, d.value, dict(d.others)) for d in plan.differences}
    assert found["vocab_size"] == ("union", 23, {"base": 20, "a": 22, "b": 21})
    assert found["eos_token_id"] == ("base", 2, {"a": 20})
    assert found["generation_config.eos_token_id"] == ("base", 2, {"a": 20})
    assert (found["chat_template"][0], list(found["chat_template"][2])) == ("base", ["a"])


def test_an_eos_that_generation_does_not_know_is_added_and_said(tmp_path):
    for name in ("base", "a"):
        write_source(tmp_path / name, Tokens() if name == "base" else CHAT)
    edit_json(tmp_path / "a" / "generation_config.json", eos_token_id=2, bos_token_id=7)
    edit_json(tmp_path / "a" / "config.json", eos_token_id=2)
    plan = plan_from(tmp_path, ["a"], tokenizer="expert:a")
    assert plan.settings.generation["eos_token_id"] == [20, 2]
    assert plan.settings.generation["bos_token_id"] == 1
    assert plan.settings.config["eos_token_id"] == 20
    assert "config.json: eos_token_id is 2, the tokenizer's <|end|> is 20; it becomes 20" in plan.notices
    said = "generation_config.json: eos_token_id is 2, the tokenizer's <|end|> is 20; it becomes [20, 2]"
    assert said in plan.notices
    out = merge(plan, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert [steps(model, torch.tensor([[5]]), forced) for forced in (20, 2, 5)] == [1, 1, 4]


def test_a_pad_token_without_a_row_is_not_put_into_the_config(tmp_path):
    write_source(tmp_path / "base")
    write_source(tmp_path / "a")
    tokenizer = make_tokenizer(Tokens())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", pad_token_id=0)
    plan = plan_from(tmp_path, ["a"], tokenizer="expert:a")
    assert plan.settings.config["pad_token_id"] == 0
    assert "expert a has a tokenizer with 1 token ([PAD]) beyond its 20 rows" in plan.notices
    AutoModelForCausalLM.from_pretrained(merge(plan, tmp_path / "out"))


def plan_from(folder: Path, experts: list[str], **fields: Any) -> Plan:
    data = {"version": 1, "base": "./base", "experts": [{"name": n, "model": f"./{n}"} for n in experts], **STATIC}
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {**data, **fields}.items()))
    return make_plan(load_recipe(path))


def test_flags_of_added_tokens_are_kept(tmp_path):
    token = AddedToken("<wide>", lstrip=True, rstrip=True, single_word=False, normalized=False, special=False)
    _, out = written(tmp_path, {"base": Tokens(), "a": Tokens(added=[token])}, tokenizer="union")
    words = AutoTokenizer.from_pretrained(out)
    found = words.added_tokens_decoder[20]
    assert (found.content, found.lstrip, found.rstrip, found.special, found.normalized) == (
        "<wide>", True, True, False, False,
    )  # fmt: skip
    assert words.decode([5, 20], skip_special_tokens=True).split() == ["two", "<wide>"]


def test_files_of_transformers_4_get_the_new_tokens_too(tmp_path):
    """Its added_tokens_decoder is all that classes which rebuild their tokenizer look at."""
    for name, tokens in {"base": Tokens(), "a": Tokens(added=["<x>"])}.items():
        write_source(tmp_path / name, tokens)
    file = tmp_path / "base" / "tokenizer_config.json"
    listed = json.loads((tmp_path / "base" / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(t.pop("id")): t for t in listed}
    edit_json(file, added_tokens_decoder=decoder, additional_special_tokens=WORDS[3:5])
    config = json.loads(file.read_text())
    del config["extra_special_tokens"]
    file.write_text(json.dumps(config))
    (tmp_path / "base" / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": WORDS[3:5]}))
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    edit_json(tmp_path / "a" / "tokenizer_config.json", extra_special_tokens=[*WORDS[3:5], "<x>"])
    out = merge(plan_from(tmp_path, ["a"], tokenizer="union"), tmp_path / "out")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["20"]["content"] == "<x>"
    assert config["additional_special_tokens"] == [*WORDS[3:5], "<x>"]
    special = json.loads((out / "special_tokens_map.json").read_text())
    assert special == {"additional_special_tokens": [*WORDS[3:5], "<x>"]}
    assert json.loads((out / "added_tokens.json").read_text()) == {"<x>": 20}
    words = AutoTokenizer.from_pretrained(out)
    assert words.convert_tokens_to_ids("<x>") == 20
    assert "<x>" in words.all_special_tokens


@pytest.mark.parametrize("form", [{"indent": 2}, {"separators": (",", ":")}], ids=["indented", "one line"])
def test_the_tokenizer_file_of_a_union_keeps_its_form_and_size(tmp_path, form):
    for name, tokens in {"base": Tokens(), "a": Tokens(added=["<x>"])}.items():
        write_source(tmp_path / name, tokens)
    file = tmp_path / "base" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False, **form))
    out = merge(plan_from(tmp_path, ["a"], tokenizer="union"), tmp_path / "out")
    old, new = file.read_text(), (out / "tokenizer.json").read_text()
    assert 0 < len(new) - len(old) < 250
    assert new.startswith("{\n") == old.startswith("{\n")
    data = json.loads(new)
    assert data["added_tokens"].pop()["content"] == "<x>"
    assert data == json.loads(old)


def test_a_union_without_new_tokens_copies_the_files_byte_by_byte(tmp_path):
    _, out = written(tmp_path, {"base": Tokens(), "a": Tokens()}, tokenizer="union")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def resized_adapter(folder: Path, tokens: Tokens, **config: Any) -> torch.Tensor:
    """Write an adapter of the base with new tokens as PEFT does; give its rows."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = make_tokenizer(tokens)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **config))
    with torch.no_grad():
        tuned.get_input_embeddings().weight += 0.5
        for name, tensor in tuned.named_parameters():
            if "lora_B" in name:
                tensor.normal_()
    tuned.save_pretrained(folder / "lora", save_embedding_layers=True)
    tokenizer.save_pretrained(folder / "lora")
    return tuned.get_input_embeddings().weight.detach().clone()


@PEFT_WARNS
@pytest.mark.parametrize("tokenizer", ["base", "union", "expert:lora"])
def test_an_adapter_with_a_resized_embedding_written_by_peft(tmp_path, tokenizer):
    write_source(tmp_path / "base")
    rows = resized_adapter(tmp_path, Tokens(added=["<x>", "<|end|>"], eos="<|end|>"))
    plan = plan_from(tmp_path, ["lora"], tokenizer=tokenizer)
    out = merge(plan, tmp_path / "out")
    merged = load_file(out / "model.safetensors")[EMBED]
    assert texts_in(out)[20:] == ([] if tokenizer == "base" else ["<x>", "<|end|>"])
    assert torch.equal(merged, rows[: len(merged)])
    eos = json.loads((out / "config.json").read_text())["eos_token_id"]
    assert eos == (21 if tokenizer == "expert:lora" else 2)
    AutoModelForCausalLM.from_pretrained(out)


@PEFT_WARNS
def test_ids_of_the_base_are_carried_over_by_text_where_the_winner_has_no_config(tmp_path):
    write_source(tmp_path / "base", Tokens(config={"pad_token_id": 19, "image_token_id": 18}))
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17], "pad_token_id": 19}))
    resized_adapter(tmp_path, Tokens(words=(*WORDS[:5], "of", *WORDS[5:18])))
    plan = plan_from(tmp_path, ["lora"], tokenizer="expert:lora")
    assert (plan.settings.config["pad_token_id"], plan.settings.config["image_token_id"]) == (5, None)
    assert plan.settings.generation == {"eos_token_id": [2, 18], "pad_token_id": 5}
    assert any("image_token_id: 18 (a) is no token of the output" in notice for notice in plan.notices), plan.notices
