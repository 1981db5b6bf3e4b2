"""What a router reads of a prompt: the last user turn, the same whether a chat template wraps it or not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokens import TEMPLATES, byte_tokenizer, word_tokenizer

from mediator_cli.errors import BundleError
from mediator_cli.runtime.prompts import load_tokenizer, prompt_reader

READERS = {name: prompt_reader(byte_tokenizer(template)) for name, template in TEMPLATES.items()}
PLAIN = prompt_reader(byte_tokenizer())
# Markers of a template in what a user writes are read as markers, as the model itself would.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<#["), max_size=40).filter(str.strip)


def templated(reader, *turns, answer=True):
    chat = [{"role": role, "content": text} for role, text in turns]
    text = reader.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
    return reader.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", READERS)
@given(text=TEXTS)
def test_a_templated_and_a_raw_prompt_have_the_same_content(name, text):
    reader = READERS[name]
    expected = reader.tokenizer.encode(text.strip(), add_special_tokens=False)
    assert reader.encode(text) == expected
    assert reader.content(reader.tokenizer.encode(text, add_special_tokens=False)) == expected
    assert reader.content(templated(reader, ("user", text))) == expected


@pytest.mark.parametrize(
    ("name", "answer"), [("chatml", True), ("chatml", False), ("inst", True), ("inst", False), ("alpaca", True)]
)
def test_only_the_last_user_turn_is_read(name, answer):
    reader = READERS[name]
    turns = (("user", "first"), ("assistant", "so"), ("user", "how many apples?"))
    assert reader.content(templated(reader, *turns, answer=answer)) == reader.encode("how many apples?")


@pytest.mark.parametrize("name", ["chatml", "inst"])
def test_a_system_message_is_not_read(name):
    reader = READERS[name]
    ids = templated(reader, ("system", "Answer in rhyme."), ("user", "how many apples?"))
    assert reader.content(ids) == reader.encode("how many apples?")


def test_a_chat_without_the_default_system_message_is_recognised():
    reader = READERS["chatml"]
    ids = reader.tokenizer.encode("<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n")
    assert reader.content(ids) == reader.encode("how many?")


@pytest.mark.parametrize("name", READERS)
def test_the_beginning_of_an_answer_is_not_read(name):
    reader = READERS[name]
    ids = templated(reader, ("user", "how many?")) + reader.encode("There are")
    assert reader.content(ids) == reader.encode("how many?")


@pytest.mark.parametrize("reader", [PLAIN, *READERS.values()])
def test_padding_and_special_tokens_around_a_raw_prompt_are_not_read(reader):
    ids = reader.encode("how many apples?")
    bos, eos = reader.tokenizer.bos_token_id, reader.tokenizer.eos_token_id
    assert reader.content([eos, eos, bos, *ids, eos]) == ids


def test_padding_before_a_template_is_not_read():
    reader = READERS["chatml"]
    ids = [reader.tokenizer.eos_token_id] * 3 + templated(reader, ("user", "how many?"))
    assert reader.content(ids) == reader.encode("how many?")


def test_without_a_template_what_looks_like_one_is_text():
    text = "### Instruction:\nhow many?\n\n### Response:"
    assert PLAIN.content(PLAIN.encode(text)) == PLAIN.encode(text)
    assert (PLAIN.opening, PLAIN.closing) == (None, None)


def test_an_opening_that_nothing_closes_is_text():
    reader = READERS["alpaca"]
    ids = reader.encode("what does ### Instruction: mean")
    assert reader.content(ids) == ids


@pytest.mark.parametrize("reader", [PLAIN, *READERS.values()])
def test_an_empty_prompt_has_no_content(reader):
    assert reader.content([]) == []
    assert reader.content([reader.tokenizer.eos_token_id]) == []
    assert reader.encode(" \n ") == []


@pytest.mark.parametrize("name", READERS)
def test_an_empty_turn_has_no_content(name):
    assert READERS[name].content(templated(READERS[name], ("user", ""))) == []


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[5].content }}", "{% if %}", "hello"])
def test_a_template_that_tells_nothing_is_as_good_as_none(template):
    reader = prompt_reader(byte_tokenizer(template))
    assert reader.content(reader.encode("how many?")) == reader.encode("how many?")
    assert reader.opening is reader.closing is None


def test_a_tokenizer_of_whole_words_is_read_too():
    reader = prompt_reader(word_tokenizer())
    ids = templated(reader, ("user", "two bananas plus three"))
    assert reader.tokenizer.convert_ids_to_tokens(reader.content(ids)) == ["two", "[UNK]", "plus", "three"]
    assert reader.content(ids) == reader.encode("two bananas plus three")


def test_a_saved_tokenizer_is_loaded(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    assert prompt_reader(load_tokenizer(tmp_path)).encode("film plot") == [10, 12]


@pytest.mark.parametrize("text", [None, "{", '{"version": "1.0"}'])
def test_a_folder_without_a_tokenizer_that_works_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BundleError, match="has no usable tokenizer") as raised:
        load_tokenizer(tmp_path)
    assert raised.value.problems[0].place == str(tmp_path)
    assert "tokenizer.json" in raised.value.problems[0].hint
