"""Bundles whose experts brought tokens of their own, as they answer: one expert's mixture is that expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokens import FILMS, SUMS, WORDS, task_prompts, write_prompts
from tiny_vocabularies import Tokens, plan_of, write_source
from transformers import AutoModelForCausalLM, AutoTokenizer

from mediator_cli import Settings, merge, read_bundle
from mediator_cli.pipeline.router import route_texts
from mediator_cli.runtime.open import open_bundle

LOSSLESS: dict[str, Any] = {"assign": {"rule": "all"}, "extract": {"density": 1.0, "values": "fp32"}}
SHUFFLED = (*WORDS[:5], *reversed(WORDS[5:]))
TEXT = "two <x> plus dull"


def logits_of(model: Any, tokenizer: Any, names: list[str]) -> torch.Tensor:
    """Give the logits of some tokens by text, after each token of TEXT that both have."""
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return model(ids).logits[0][:, tokenizer.convert_tokens_to_ids(names)]


@pytest.mark.parametrize("tokenizer", ["union", "expert:a", "expert:b"])
@pytest.mark.parametrize("untied", [False, True])
def test_a_mixture_of_one_expert_gives_its_own_logits(tmp_path: Path, tokenizer: str, untied: bool) -> None:
    words = tuple(WORDS) if tokenizer == "union" else SHUFFLED
    sources = {
        "base": Tokens(untied=untied, bias=False),
        "a": Tokens(added=["<x>"], words=words, untied=untied, bias=False),
        "b": Tokens(added=["<y>", "<x>"], untied=untied, bias=False, padding=1),
    }
    out = merge(plan_of(tmp_path, sources, tokenizer=tokenizer, **LOSSLESS), tmp_path / "out")
    model, tokens = open_bundle(out, dtype=torch.float32), AutoTokenizer.from_pretrained(out)
    for weights, name in (([1.0, 0.0], "a"), ([0.0, 1.0], "b")):
        own = AutoTokenizer.from_pretrained(tmp_path / name)
        names = [text for text in own.get_vocab() if text in tokens.get_vocab()]
        expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / name), own, names)
        with model.mixing([weights]):
            found = logits_of(model, tokens, names)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokenizer", ["union", "expert:a"])
def test_a_router_reads_prompts_with_the_output_s_tokens(tmp_path: Path, tokenizer: str) -> None:
    sources = {"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<y>"])}
    for name, words in (("a", SUMS), ("b", FILMS)):
        write_source(tmp_path / name, sources[name])
        write_prompts(tmp_path / f"{name}.jsonl", task_prompts(words))
    experts = [{"name": name, "model": f"./{name}", "prompts": f"./{name}.jsonl"} for name in "ab"]
    plan = plan_of(tmp_path, sources, tokenizer=tokenizer, experts=experts, **{**LOSSLESS, "router": {}})
    out = merge(plan, tmp_path / "out", settings=Settings(workers=1))
    record, routing = route_texts(out, ["two plus three", "dull film fine"])
    assert set(plan.notices) <= set(read_bundle(out).manifest.notices)
    assert [record.experts[int(row.argmax())] for row in routing.probabilities] == ["a", "b"]
