"""mergekit's configurations, carried out here: the numbers that mergekit 0.1.5 gives (scripts/mergekit_golden.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mediator_cli import Settings, make_plan, merge
from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.pipeline.documents import load_last
from mediator_cli.plan.tokens.templates import TEMPLATES

GOLDEN = Path(__file__).parent.parent / "golden" / "mergekit"
INDEX = json.loads((GOLDEN / "index.json").read_text())
WORDS = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(13))]
TALKS = {
    "plain": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"},
              {"role": "user", "content": "w3"}],
    "system": [{"role": "system", "content": "w0"}, {"role": "user", "content": "w1"}],
}  # fmt: skip
OFFLINE = Access(offline=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with all checkpoints, written once."""
    folder = tmp_path_factory.mktemp("mergekit")
    shutil.copytree(GOLDEN / "inputs", folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("name", INDEX)
def test_a_configuration_gives_what_mergekit_gives(models, name):
    recipe, out, said = models / f"{name}.yaml", models / f"out-{name}", []
    shutil.copyfile(GOLDEN / recipe.name, recipe)
    settings = Settings(workers=1, notify=said.append)
    merge(make_plan(load_last(recipe, (), str(out), OFFLINE, settings), OFFLINE), out, settings=settings)
    found, expected = load_file(out / "model.safetensors"), load_file(GOLDEN / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    facts, tokens = INDEX[name], AutoTokenizer.from_pretrained(out).get_vocab()
    rows = [tokens[text] for text in facts.get("tokens", WORDS)]
    assert len(tokens) == len(rows)
    for tensor, wanted in expected.items():
        # Rows of tokens are compared by their token: a union numbers them otherwise, and may have rows of none.
        has_rows = "embed_tokens" in tensor or "lm_head" in tensor
        own, wanted = (found[tensor][rows], wanted[: len(rows)]) if has_rows else (found[tensor], wanted)
        tolerance = {"rtol": 1e-2} if wanted.dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
        np.testing.assert_allclose(own.float(), wanted.float(), err_msg=tensor, **tolerance)
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == facts["num_hidden_layers"]
    assert config.get("dtype", config.get("torch_dtype")) == facts["dtype"]
    assert config["vocab_size"] == found["lm_head.weight"].shape[0]
    talks = rendered(out)
    assert talks == facts.get("talks", talks)


def rendered(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        return None
    return {
        name: tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        for name, talk in TALKS.items()
    }


FORMATS = {
    "chatml": "<|im_start|>user\nw1<|im_end|>\n<|im_start|>assistant\nw2<|im_end|>\n<|im_start|>user\nw3<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nw1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nw2<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "w3<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] w1 [/INST] w2</s> [INST] w3 [/INST]",
    "alpaca": "### Instruction:\nw1\n\n### Response:\nw2\n\n### Instruction:\nw3\n\n### Response:\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]w1\n[|assistant|]w2[|endofturn|]\n[|user|]w3\n[|assistant|]",
}
SYSTEM = {
    "chatml": "<|im_start|>system\nw0<|im_end|>\n<|im_start|>user\nw1<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nw0<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nw1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] w0\n\nw1 [/INST]",
    "alpaca": "w0\n\n### Instruction:\nw1\n\n### Response:\n",
    "exaone": "[|system|]w0[|endofturn|]\n[|user|]w1\n[|assistant|]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_the_formats_that_models_were_trained_on(models, name):
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    tokenizer.chat_template = TEMPLATES[name]
    found = {
        talk: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for talk, messages in TALKS.items()
    }
    assert found == {"plain": FORMATS[name], "system": SYSTEM[name]}
