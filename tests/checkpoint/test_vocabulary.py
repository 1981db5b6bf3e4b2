"""Vocabularies of model folders, against those that transformers reads from the same files."""

import json

import pytest
from conftest import edit_json
from tiny_tokens import SPECIALS, byte_tokenizer
from tiny_vocabularies import Tokens, make_tokenizer
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mediator_cli.checkpoint.pieces import read_pieces
from mediator_cli.checkpoint.vocabulary import has_vocabulary, is_tokenizer_file, read_vocabulary, vocabulary_digest
from mediator_cli.errors import CheckpointError


def unigram():
    pieces = [("<unk>", 0.0), ("▁two", -1.5), ("▁three", -2.25), ("a", -3.0)]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), unk_token="<unk>")
    made.add_tokens(["<extra>"])
    return made


KINDS = {
    "bytes": byte_tokenizer,
    "words": lambda: make_tokenizer(Tokens(added=["<x>", AddedToken("plain", special=False)])),
    "unigram": unigram,
}


def as_loaded(folder):
    return AutoTokenizer.from_pretrained(folder).get_vocab()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(tmp_path, kind):
    KINDS[kind]().save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path)
    assert dict(found.tokens) == as_loaded(tmp_path)
    assert found.end == len(found.tokens) == len(AutoTokenizer.from_pretrained(tmp_path))


def test_added_tokens_have_ids_flags_and_roles(tmp_path):
    token = AddedToken("<x>", lstrip=True, normalized=False, special=False)
    make_tokenizer(Tokens(added=[token, "<|end|>"], eos="<|end|>")).save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path)
    x, end = found.added["<x>"], found.added["<|end|>"]
    assert (x.id, end.id) == (20, 21)
    assert x.flags == {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
    assert end.special
    assert found.roles == {"bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "[UNK]"}
    assert found.extra == ("<|user|>", "<|bot|>")
    assert (found.role_id("eos"), found.role_id("pad"), found.texts[21]) == (21, None, "<|end|>")


@pytest.mark.parametrize("named", ["pad_token", "extra_special_tokens", "added_tokens_decoder"])
def test_tokens_that_only_settings_name_come_behind_the_others(tmp_path, named):
    make_tokenizer(Tokens(added=["<x>"])).save_pretrained(tmp_path)
    values = {
        "pad_token": "[PAD]",
        "extra_special_tokens": ["<|user|>", "[PAD]"],
        "added_tokens_decoder": {"21": {"content": "[PAD]", "special": True}},
    }
    edit_json(tmp_path / "tokenizer_config.json", **{named: values[named]})
    found = read_vocabulary(tmp_path)
    assert found.tokens["[PAD]"] == 21
    assert dict(found.tokens) == as_loaded(tmp_path)


def test_stated_ids_that_transformers_gives_other_ones_are_noted(tmp_path):
    make_tokenizer(Tokens(added=["<x>", "<y>"])).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["added_tokens"][-1]["id"] = 30
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    found = read_vocabulary(tmp_path)
    assert dict(found.tokens) == as_loaded(tmp_path)
    assert found.tokens["<y>"] == 21
    assert dict(found.restated) == {"<y>": 30}


def bytes_files(folder):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "json")
    model = json.loads((folder / "json" / "tokenizer.json").read_text())["model"]
    (folder / "old").mkdir()
    (folder / "old" / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])]
    (folder / "old" / "merges.txt").write_text("\n".join(lines) + "\n")
    return read_vocabulary(folder / "json"), folder / "old"


def test_vocab_json_with_merges_is_the_same_model_as_its_tokenizer_json(tmp_path):
    ours, folder = bytes_files(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<y>": 401, "<x>": 400}))
    old = read_vocabulary(folder)
    assert old.model.is_same(ours.model)
    assert {text: old.tokens[text] for text in ("<x>", "<y>")} == {
        "<x>": len(ours.tokens),
        "<y>": len(ours.tokens) + 1,
    }
    (folder / "merges.txt").write_text("a b\n")
    assert not read_vocabulary(folder).model.is_same(ours.model)


def test_merges_as_text_and_as_pairs_are_one_model(tmp_path):
    ours, _ = bytes_files(tmp_path)
    file = tmp_path / "json" / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    file.write_text(json.dumps(data))
    assert read_vocabulary(tmp_path / "json").model.is_same(ours.model)


def test_scores_of_pieces_belong_to_the_model(tmp_path):
    unigram().save_pretrained(tmp_path)
    ours = read_vocabulary(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["vocab"][1][1] = -1.0
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    other = read_vocabulary(tmp_path)
    assert dict(other.tokens) == dict(ours.tokens)
    assert not other.model.is_same(ours.model)


def test_vocab_txt_counts_lines(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nwörd\n")
    assert read_vocabulary(tmp_path).tokens == {"[PAD]": 0, "[UNK]": 1, "wörd": 2}


def field(number, kind, data):
    key = bytes([number << 3 | kind])
    return key + (bytes([len(data)]) if kind == 2 else b"") + data


def piece(text, score=b"\0\0\x80\xbf", kind=None):
    inner = field(1, 2, text.encode()) + field(2, 5, score) + (field(3, 0, bytes([kind])) if kind else b"")
    return field(1, 2, inner)


SPM = (
    piece("<unk>", kind=2) + piece("<s>", kind=3) + piece("▁two") + field(2, 2, b"\x0a\x03abc") + field(9, 1, b"8" * 8)
)


def test_pieces_of_a_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(SPM)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 3}))
    assert read_pieces(tmp_path / "tokenizer.model") == {"<unk>": 0, "<s>": 1, "▁two": 2}
    assert read_vocabulary(tmp_path).tokens == {"<unk>": 0, "<s>": 1, "▁two": 2, "<pad>": 3}


@pytest.mark.parametrize("data", [b"", b"\xff" * 30, SPM[:-3], b"Zm9v 0\nYmFy 1\n", piece("a")[:4]])
def test_what_is_no_sentencepiece_model_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match="no SentencePiece model") as error:
        read_vocabulary(tmp_path)
    assert "save_pretrained" in error.value.problems[0].hint


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "broken JSON"),
        ("tokenizer.json", "{}", "holds no vocabulary"),
        ("tokenizer.json", '{"model": {"vocab": [1, 2]}}', "no vocabulary that can be read"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}', "'b' is no token id"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', "KeyError: 'content'"),
        ("vocab.json", '{"a": -1}', "-1 is no token id"),
        ("sentencepiece.bpe.model", "", "tokenizer classes shift them"),
    ],
)
def test_damaged_vocabularies_are_refused_with_a_way_out(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as error:
        read_vocabulary(tmp_path)
    problem = error.value.problems[0]
    assert message in problem.message
    assert problem.place == str(tmp_path / name)
    assert problem.hint


def test_a_folder_without_tokenizer_files_has_no_vocabulary(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert (has_vocabulary(tmp_path), read_vocabulary(tmp_path)) == (False, None)


def test_digests_tell_vocabularies_apart_but_not_templates(tmp_path):
    digests = {}
    for name, tokens in {"one": Tokens(), "two": Tokens(template="{{ x }}"), "three": Tokens(added=["<x>"])}.items():
        make_tokenizer(tokens).save_pretrained(tmp_path / name)
        digests[name] = vocabulary_digest(tmp_path / name)
    assert digests["one"] == digests["two"] != digests["three"]
    edit_json(tmp_path / "two" / "tokenizer_config.json", eos_token="<s>")
    assert vocabulary_digest(tmp_path / "two") != digests["one"]


def test_tokenizer_files_are_told_from_those_of_processors(tmp_path):
    ours = ["tokenizer.json", "chat_template.jinja", "spiece.model", "qwen.tiktoken", "added_tokens.json"]
    theirs = ["preprocessor_config.json", "processor_config.json", "modules.json"]
    assert [name for name in [*ours, *theirs] if is_tokenizer_file(tmp_path / name)] == ours


def test_special_tokens_of_the_byte_tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert [read_vocabulary(tmp_path).tokens[text] for text in SPECIALS] == list(range(5))
