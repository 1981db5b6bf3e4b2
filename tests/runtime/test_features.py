"""Prompt features against what they are by definition, and the prompts that have none."""

import zlib

import numpy as np
import pytest
import torch
from tiny_tokens import byte_tokenizer, word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mediator_cli.errors import BundleError
from mediator_cli.runtime import features
from mediator_cli.runtime.dense_features import folder_reader
from mediator_cli.runtime.features import (
    TEXT_SIZE,
    FeatureSpec,
    embedding_means,
    model_reader,
    prompt_features,
    text_counts,
    text_reader,
)

PROMPTS = [[5, 6, 7], [8], [9, 9, 3, 12, 1, 4, 4], [19, 0]]
SPECS = [
    FeatureSpec("embedding_mean"),
    FeatureSpec("hidden_mean", 1),
    FeatureSpec("hidden_mean", 3),
    FeatureSpec("text"),
]


def llama(**fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | fields)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=8, n_layer=3, n_head=2)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_mean_is_the_mean_of_the_tokens_rows(dtype):
    model = llama().to(dtype)
    table = model.get_input_embeddings().weight.detach().double().numpy()
    expected = [sum(table[token] for token in prompt) / len(prompt) for prompt in PROMPTS]
    found = prompt_features(model, word_tokenizer(), FeatureSpec("embedding_mean"), PROMPTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_each_row_is_read_once():
    asked = []

    def rows(tokens):
        asked.extend(tokens)
        return torch.arange(10.0)[tokens, None]

    assert embedding_means(rows, [[3, 3, 6], [6]]).tolist() == [[4.0], [6.0]]
    assert asked == [3, 6]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("layer", [1, 2])
def test_hidden_mean_is_the_mean_hidden_state_behind_a_layer(make, layer):
    model = make()
    found = prompt_features(model, word_tokenizer(), FeatureSpec("hidden_mean", layer), PROMPTS)
    with torch.no_grad():
        states = [model(torch.tensor([p]), output_hidden_states=True).hidden_states[layer][0] for p in PROMPTS]
    np.testing.assert_allclose(found, [state.mean(0).numpy() for state in states], rtol=1e-4, atol=1e-6)


def test_hidden_mean_runs_no_later_layer_and_leaves_the_model_as_it_was():
    model = llama()
    ran = []
    for n, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))
    before = model(torch.tensor([PROMPTS[0]])).logits
    ran.clear()
    prompt_features(model, word_tokenizer(), FeatureSpec("hidden_mean", 2), PROMPTS)
    assert set(ran) == {0, 1}
    assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits, before)


def test_batches_change_nothing_but_rounding(monkeypatch):
    model, spec = llama(), FeatureSpec("hidden_mean", 2)
    whole = prompt_features(model, word_tokenizer(), spec, PROMPTS)
    monkeypatch.setattr(features, "_BATCH_TOKENS", 3)
    np.testing.assert_allclose(prompt_features(model, word_tokenizer(), spec, PROMPTS), whole, rtol=1e-4, atol=1e-6)


def test_text_counts_words_and_runs_of_characters():
    # " ab " holds one word, the runs " ab" and "ab " of three and " ab " of four.
    places = [zlib.crc32(part) % TEXT_SIZE for part in (b"word:ab", b" ab", b"ab ", b" ab ")]
    expected = np.zeros(TEXT_SIZE)
    expected[places] = 0.5
    assert len(set(places)) == 4
    np.testing.assert_allclose(text_counts("ab"), expected)


def test_text_counts_repeated_parts():
    found = text_counts("a a")
    # " a a ": the word a twice; " a " twice and "a a" once; two runs of four; one of five.
    word, twice, once = (zlib.crc32(part) % TEXT_SIZE for part in (b"word:a", b" a ", b"a a"))
    assert found[word] == found[twice] == pytest.approx(2 * found[once])
    assert float(np.square(found).sum()) == pytest.approx(1)
    assert found[once] == pytest.approx(1 / np.sqrt(4 + 4 + 1 + 1 + 1 + 1))


def test_text_ignores_case_and_white_space_and_reads_any_script():
    assert np.array_equal(text_counts("Hello  World\n"), text_counts(" hello world"))
    assert not np.array_equal(text_counts("hello world"), text_counts("world hello"))
    assert np.linalg.norm(text_counts("你好 мир \ud800")) == pytest.approx(1)


def test_text_features_are_those_of_the_decoded_prompt():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("How many apples?")
    assert np.array_equal(text_reader(tokenizer).read([ids])[0], text_counts("how many apples?"))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_folder_gives_the_same_features_as_the_model_in_memory(tmp_path, spec, dtype, make):
    model = make().to(dtype)
    model.save_pretrained(tmp_path)
    expected = prompt_features(model, word_tokenizer(), spec, PROMPTS)
    assert np.array_equal(folder_reader(tmp_path, word_tokenizer(), spec).read(PROMPTS), expected)


def test_embedding_mean_of_a_folder_reads_the_rows_alone(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path)
    monkeypatch.setattr("mediator_cli.runtime.open.load_dense", None)
    assert folder_reader(tmp_path, word_tokenizer(), FeatureSpec("embedding_mean")).read(PROMPTS).shape == (4, 8)


@pytest.mark.parametrize("kind", ["embedding_mean", "hidden_mean"])
def test_a_folder_that_is_no_model_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(BundleError) as raised:
        folder_reader(tmp_path, word_tokenizer(), FeatureSpec(kind, 1 if kind == "hidden_mean" else None))
    assert str(tmp_path) in raised.value.problems[0].place


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_empty_prompt_is_refused(spec):
    with pytest.raises(BundleError, match="prompt 2: is empty"):
        prompt_features(llama(), word_tokenizer(), spec, [[5], []])


@pytest.mark.parametrize("spec", [FeatureSpec("embedding_mean"), FeatureSpec("hidden_mean", 1)], ids=str)
def test_a_token_that_the_model_does_not_know_is_refused(spec):
    with pytest.raises(BundleError, match="prompt 1: has token id 20, the model knows 20 ids"):
        prompt_features(llama(), word_tokenizer(), spec, [[5, 20]])


def test_a_prompt_longer_than_the_context_is_refused_only_where_the_model_has_to_read_it():
    model, long = llama(), [5] * 33
    with pytest.raises(BundleError, match="prompt 1: has 33 tokens, the model reads 32 at most") as raised:
        prompt_features(model, word_tokenizer(), FeatureSpec("hidden_mean", 1), [long])
    assert "embedding_mean or text" in raised.value.problems[0].hint
    assert len(prompt_features(model, word_tokenizer(), FeatureSpec("embedding_mean"), [long])) == 1
    assert len(prompt_features(model, word_tokenizer(), FeatureSpec("text"), [long])) == 1


@pytest.mark.parametrize("layer", [0, 4])
def test_a_layer_that_the_model_does_not_have_is_refused(layer):
    with pytest.raises(BundleError, match=f"has no decoder layer {layer}, only 1 to 3"):
        model_reader(llama(), word_tokenizer(), FeatureSpec("hidden_mean", layer))
