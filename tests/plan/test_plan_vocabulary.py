"""Which tensors have rows of tokens, which rows each source gives, and what the plan says of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import edit_json, edit_tensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_tokens import WORDS, byte_tokenizer
from tiny_vocabularies import BIAS, EMBED, HEAD, STATIC, Tokens, plan_of, rows_of, write_source

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.checkpoint.header import TensorInfo
from mediator_cli.checkpoint.spans import Part, Span
from mediator_cli.checkpoint.vocabulary import TokenizerModel, Vocabulary
from mediator_cli.errors import RecipeError
from mediator_cli.plan.tokens.rows import TokenOutput, TokenSource, make_layouts
from mediator_cli.plan.tokens.tensors import vocabulary_tensors


def info(name, *shape, dtype="F32"):
    return TensorInfo(name, dtype, shape, Path("x"), 0, 0)


def found(*tensors, **config):
    return vocabulary_tensors({t.name: t for t in tensors}, config)


def test_tensors_with_a_row_per_token_are_embeddings_heads_and_their_biases():
    tensors = [info(EMBED, 20, 8), info(HEAD, 20, 8), info(BIAS, 20), info("model.norm.weight", 8)]
    assert found(*tensors, vocab_size=20) == (EMBED, HEAD, BIAS)
    assert found(*tensors, text_config={"vocab_size": 20}) == (EMBED, HEAD, BIAS)
    assert found(*tensors, vocab_size=21) == found(*tensors) == ()


@pytest.mark.parametrize(
    "other",
    [
        info("model.norm.weight", 20),
        info("model.norm.bias", 20),
        info("transformer.ln_f.bias", 20),
        info("transformer.wpe.weight", 20, 8),
        info("embeddings.position_embeddings.weight", 20, 8),
        info("model.embed_positions.weight", 20, 8),
        info("embeddings.token_type_embeddings.weight", 20, 8),
        info("model.layers.0.mlp.up_proj.weight", 20, 8),
        info("model.ids", 20, 8, dtype="I64"),
        info("other.weight", 20, 8, 2),
    ],
    ids=lambda other: other.name,
)
def test_what_is_as_long_as_the_vocabulary_by_chance_is_no_row_of_tokens(other):
    beside = info(other.name.replace("bias", "weight"), 20)
    assert found(info(EMBED, 20, 8), beside, other, vocab_size=20) == (EMBED,)


def test_biases_of_tied_heads_and_of_bart_have_rows():
    names = ["cls.predictions.bias", "cls.predictions.decoder.bias"]
    assert found(*(info(name, 20) for name in names), vocab_size=20) == tuple(names)
    assert found(info("final_logits_bias", 1, 20), vocab_size=20) == ("final_logits_bias",)


def test_an_unchanged_vocabulary_needs_no_layout_and_new_tokens_need_two_spans(tmp_path):
    sources = {"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens()}
    plan = plan_of(tmp_path, sources, tokenizer="union")
    whole = Span(160, (Part("base", EMBED, 0),))
    assert plan.vocabulary == {
        "base": {EMBED: (whole, Span(8, (Part("a", EMBED, 160),)))},
        "b": {EMBED: (Span(160, (Part("b", EMBED, 0),)), Span(8, (Part("a", EMBED, 160),)))},
    }
    embed = next(tensor for tensor in plan.tensors if tensor.name == EMBED)
    assert (embed.shape, embed.size) == ((21, 8), 168)
    assert plan.union is not None


def test_equal_tokenizers_in_other_files_change_nothing(tmp_path):
    for name in ("base", "a"):
        write_source(tmp_path / name, Tokens(padding=2))
    file = tmp_path / "a" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    plan = recipe_plan(tmp_path)
    assert (plan.vocabulary, plan.union, plan.notices) == ({}, None, ())


def recipe_plan(folder, experts=("a",), **fields):
    data = {"version": 1, "base": "./base", "experts": [{"name": n, "model": f"./{n}"} for n in experts], **STATIC}
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {**data, **fields}.items()))
    return make_plan(load_recipe(path))


ALPHABET = st.sampled_from([*"abcdefgh", "<x>", "<y>"])
TEXTS = st.lists(ALPHABET, unique=True, min_size=1, max_size=10)
MADE = st.tuples(TEXTS, st.integers(-2, 4))


def source(name, texts, padding):
    vocabulary = Vocabulary(Path(name), TokenizerModel("x", {t: n for n, t in enumerate(texts)}, None), {}, {})
    return TokenSource(name, vocabulary, max(1, len(texts) + padding), frozenset({"w", "b"}))


def read(layouts, spec, tensor, width):
    """Read rows through a layout: each is a list of (source, text or row number)."""
    rows = []
    for span in layouts.get(spec.name, {}).get(tensor, (Span(spec.n_rows * width, (Part(spec.name, tensor, 0),)),)):
        assert span.size % width == 0
        for n in range(span.size // width):
            rows.append([(part.source, part.start // width + n) for part in span.parts])
            assert all(part.tensor == tensor and part.start % width == 0 for part in span.parts)
    return rows


@given(MADE, st.lists(MADE, min_size=1, max_size=3), st.integers(0, 3))
def test_every_source_gives_the_row_of_the_right_token(base_made, made, choice):
    base = source("base", *base_made)
    experts = [source(f"e{n}", *one) for n, one in enumerate(made)]
    winner = [base, *experts][choice % (1 + len(experts))]
    sources = {s.name: s for s in (base, *experts)}
    output = TokenOutput(winner.vocabulary, winner.n_rows, winner)
    layouts = make_layouts(output, base, experts, {"w": 8, "b": 1})
    for spec in sources.values():
        for tensor, width in (("w", 8), ("b", 1)):
            rows = read(layouts, spec, tensor, width)
            assert len(rows) == output.n_rows
            for number, parts in enumerate(rows):
                text = output.vocabulary.texts.get(number)
                if text is None:
                    by_place = spec.n_rows == output.n_rows and spec.vocabulary.tokens == output.vocabulary.tokens
                    owner = spec if by_place else (base if number < base.n_rows else winner)
                    assert parts == [(owner.name, number)]
                    continue
                assert all(sources[name].vocabulary.tokens[text] == row for name, row in parts)
                owners = [e.name for e in experts if e.row(text) is not None]
                if spec.row(text) is not None:
                    owners = [spec.name]
                elif base.row(text) is not None:
                    owners = ["base"]
                assert [name for name, _ in parts] == owners


def test_a_permuted_vocabulary_of_real_size_is_a_run_for_each_row_at_most():
    texts = [f"t{n}" for n in range(30_000)]
    other = random.Random(0).sample(texts, len(texts))
    base, expert = source("base", texts, 0), source("e", other, 0)
    layouts = make_layouts(TokenOutput(base.vocabulary, base.n_rows, base), base, [expert], {"w": 8, "b": 1})
    assert list(layouts) == ["e"]
    assert sum(span.size for span in layouts["e"]["w"]) == 240_000
    assert len(layouts["e"]["w"]) <= 30_000
    at = texts.index(other[7]) * 8
    ends, name = 0, []
    for span in layouts["e"]["w"]:
        if ends <= at < ends + span.size:
            name = [(span.parts[0].start + at - ends) // 8]
        ends += span.size
    assert name == [7]


def problems_of(call):
    with pytest.raises(RecipeError) as error:
        call()
    return [(p.place.rsplit("recipe.yaml", 1)[-1], p.message, p.hint) for p in error.value.problems]


@pytest.mark.parametrize("missing", ["a", "base"])
def test_other_rows_without_a_tokenizer_are_refused(tmp_path, missing):
    sources = {"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<y>"])}
    plan_of(tmp_path, sources)
    (tmp_path / missing / "tokenizer.json").unlink()
    found = problems_of(lambda: recipe_plan(tmp_path, "ab"))
    assert len(found) == 1
    place, message, hint = found[0]
    assert str(tmp_path / missing) in place
    assert "brings no tokenizer to match rows by" in message
    assert ("it has 21 rows of tokens, the base has 20" in message) == (missing == "a")
    assert ("those of the experts differ" in message) == (missing == "base")
    assert "tokenizer.json" in hint


def test_other_rows_with_a_damaged_tokenizer_are_refused(tmp_path):
    plan_of(tmp_path, {"base": Tokens(), "a": Tokens(added=["<x>"])})
    (tmp_path / "a" / "tokenizer.json").write_text('{"version": "1.0"}')
    ((place, message, _),) = problems_of(lambda: recipe_plan(tmp_path))
    assert "tokenizer.json" in place
    assert message.startswith("holds no vocabulary, and its rows must be matched by token")


def test_a_damaged_tokenizer_with_as_many_rows_is_said(tmp_path):
    plan_of(tmp_path, {"base": Tokens(), "a": Tokens()})
    (tmp_path / "a" / "tokenizer.json").write_text('{"version": "1.0"}')
    plan = recipe_plan(tmp_path)
    assert plan.vocabulary == {}
    assert any("cannot be compared, its rows are matched by position" in notice for notice in plan.notices)


def test_an_expert_without_tokenizer_files_has_the_tokens_of_the_base(tmp_path):
    plan_of(tmp_path, {"base": Tokens(), "a": Tokens(), "b": Tokens(added=["<x>"])})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "a" / name).unlink()
    plan = recipe_plan(tmp_path, "ab", tokenizer="expert:b")
    assert plan.vocabulary["a"][EMBED][0] == Span(160, (Part("a", EMBED, 0),))


def test_a_union_of_different_tokenizer_models_is_refused_with_the_alternatives(tmp_path):
    plan_of(tmp_path, {"base": Tokens(), "a": Tokens(added=["<x>"])})
    byte_tokenizer().save_pretrained(tmp_path / "a")
    ((place, message, hint),) = problems_of(lambda: recipe_plan(tmp_path, tokenizer="union"))
    assert place.endswith(" tokenizer")
    assert "expert a cuts texts into tokens otherwise than the base" in message
    assert "dead rows" in hint
    assert "`tokenizer: base` or `expert:NAME`" in hint
    assert recipe_plan(tmp_path, tokenizer="base").vocabulary["a"]


def test_a_union_needs_a_tokenizer_json_in_the_base(tmp_path):
    plan_of(tmp_path, {"base": Tokens(), "a": Tokens(added=["<x>"])})
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(WORDS)}))
    for folder in ("base", "a"):
        edit_json(tmp_path / folder / "tokenizer_config.json", extra_special_tokens=[])
    data = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    data["model"]["type"] = "BPE"
    data["model"]["merges"] = []
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(data))
    ((place, message, _),) = problems_of(lambda: recipe_plan(tmp_path, tokenizer="union"))
    assert place.endswith(" tokenizer")
    assert "tokens are added to tokenizer.json" in message


def test_a_union_over_ids_with_gaps_is_refused(tmp_path):
    for name, tokens in {"base": Tokens(padding=2), "a": Tokens(added=["<x>"])}.items():
        write_source(tmp_path / name, tokens)
        data = json.loads((tmp_path / name / "tokenizer.json").read_text())
        data["model"]["vocab"]["of"] = 21
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(data))
    ((_, message, _),) = problems_of(lambda: recipe_plan(tmp_path, tokenizer="union"))
    assert "token ids have gaps (20 tokens up to id 21)" in message


def test_tensors_of_one_expert_must_agree_in_their_rows(tmp_path):
    plan_of(tmp_path, {"base": Tokens(untied=True), "a": Tokens(untied=True)})
    edit_tensors(tmp_path / "a" / "model.safetensors", lambda t: t.update({HEAD: torch.zeros(22, 8)}))
    ((_, message, _),) = problems_of(lambda: recipe_plan(tmp_path))
    assert message.startswith("has unequal rows of tokens")
    assert f"22 in {HEAD}" in message


def test_notices_tell_all_that_is_not_merged_as_it_stands(tmp_path):
    sources = {
        "base": Tokens(padding=2),
        "a": Tokens(added=["<x>", "<end>"], eos="<end>", padding=3),
        "b": Tokens(added=["<z>", "<x>"]),
    }
    union = plan_of(tmp_path, sources, tokenizer="union").notices
    assert union[:3] == (
        "the base has no rows of 1 token (<x>): they are the mean of a, b",
        "the base has no rows of 1 token (<end>): they are those of a",
        "the base has no rows of 1 token (<z>): they are those of b",
    )
    for notice in (
        "the base has 22 rows of tokens, the output has 23",
        "expert a has no rows of 1 token (<z>): it counts as the base there",
        "expert a has 25 rows of tokens, the output has 23",
        "3 rows of expert a stand for no token and are not used",
        "expert b has other ids for 2 tokens (<z>, <x>): rows go by the token's text",
        "2 tokens (<x>, <end>) take rows of the base that stood for no token",
        "eos_token is </s> in the output, <end> in expert a",
    ):
        assert notice in union, notice
    only_base = recipe_plan(tmp_path, "ab").notices
    assert "2 tokens (<x>, <end>) of expert a are not in the output: their rows are not used" in only_base
    a_wins = recipe_plan(tmp_path, "ab", tokenizer="expert:a").notices
    assert "1 token (<z>) of expert b are not in the output: their rows are not used" in a_wins


def test_one_token_with_two_sets_of_flags_is_said(tmp_path):
    plan_of(tmp_path, {"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<x>"])})
    data = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    data["added_tokens"][-1] |= {"lstrip": True, "special": False}
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(data))
    plan = recipe_plan(tmp_path, "ab", tokenizer="union")
    assert "expert b defines <x> otherwise; in the output it has lstrip false, special true" in plan.notices
    assert (plan.union.added["<x>"].lstrip, plan.union.added["<x>"].id) == (False, 20)


def test_embeddings_that_stay_the_bases_still_get_rows_for_new_tokens(tmp_path):
    sources = {"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens()}
    plan = plan_of(tmp_path, sources, tokenizer="union", keep_base=["*embed_tokens*"])
    assert plan.vocabulary["base"][EMBED][1].parts == (Part("a", EMBED, 160),)
    rows = load_file(merge(plan, tmp_path / "out", settings=Settings(workers=1)) / "model.safetensors")[EMBED]
    assert torch.equal(rows[:20], rows_of("base", WORDS))
    assert torch.equal(rows[20], rows_of("a", ["<x>"])[0])
