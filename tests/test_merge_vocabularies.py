"""Merges of experts whose tokens are not the base's: the rows of each source follow the texts of its tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_tokens import WORDS
from tiny_vocabularies import BIAS, EMBED, HEAD, Tokens, expected_rows, plan_of, rows_of, texts_in

from mediator_cli import Settings, merge, read_bundle

SHUFFLED = tuple([*WORDS[:5], *reversed(WORDS[5:])])
FEWER = tuple(WORDS[:-2])
CASES: dict[str, tuple[dict[str, Tokens], str]] = {
    "two experts add": ({"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<y>", "<x>"])}, "union"),
    "base, added are dropped": ({"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens()}, "base"),
    "expert, added are kept": ({"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<y>"])}, "expert:a"),
    "base, other order": ({"base": Tokens(), "a": Tokens(words=SHUFFLED), "b": Tokens()}, "base"),
    "expert, other order": ({"base": Tokens(), "a": Tokens(words=SHUFFLED), "b": Tokens(added=["<y>"])}, "expert:a"),
    "expert has fewer": ({"base": Tokens(), "a": Tokens(words=FEWER, added=["<x>"]), "b": Tokens()}, "expert:a"),
    "base padded": ({"base": Tokens(padding=3), "a": Tokens(), "b": Tokens(padding=3)}, "base"),
    "expert padded": ({"base": Tokens(), "a": Tokens(padding=4), "b": Tokens()}, "base"),
    "union takes reserved rows": ({"base": Tokens(padding=3), "a": Tokens(added=["<x>"]), "b": Tokens()}, "union"),
    "union past padding": (
        {"base": Tokens(padding=1), "a": Tokens(added=["<x>", "<z>"]), "b": Tokens(added=["<y>"], padding=5)},
        "union",
    ),
    "the same id for two tokens": (
        {"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<y>"])},
        "union",
    ),
}


def written(folder, sources, **fields: Any):
    plan = plan_of(folder, sources, **fields)
    return plan, merge(plan, folder / "out", settings=Settings(workers=1))


@pytest.mark.parametrize(("sources", "tokenizer"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("untied", [False, True])
def test_rows_follow_the_texts_of_tokens(tmp_path, sources, tokenizer, untied):
    sources = {name: Tokens(**{**vars(tokens), "untied": untied}) for name, tokens in sources.items()}
    _, out = written(tmp_path, sources, tokenizer=tokenizer)
    merged, texts = load_file(out / "model.safetensors"), texts_in(out)
    for tensor in (EMBED, HEAD, BIAS) if untied else (EMBED,):
        assert torch.allclose(merged[tensor], expected_rows(texts, sources, tensor), atol=1e-6), tensor
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(texts)
    assert set(merged) == set(load_file(tmp_path / "base" / "model.safetensors"))


def test_each_choice_has_the_rows_of_its_tokenizer(tmp_path):
    sources = {"base": Tokens(padding=2), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<y>", "<x>", "<z>"])}
    found = {}
    for choice in ("base", "expert:a", "expert:b", "union"):
        folder = tmp_path / choice.replace(":", "-")
        found[choice] = texts_in(written(folder, sources, tokenizer=choice)[1])[20:]
    assert found == {
        "base": ["row 20", "row 21"],
        "expert:a": ["<x>"],
        "expert:b": ["<y>", "<x>", "<z>"],
        "union": ["<x>", "<y>", "<z>"],
    }


@pytest.mark.parametrize(
    "average",
    [
        {"method": "linear"},
        {"method": "task_arithmetic"},
        {"method": "ties", "density": 0.3},
        {"method": "dare_ties", "density": 0.5},
        {"method": "dare_linear", "density": 0.5},
    ],
    ids=lambda average: average["method"],
)
def test_a_token_of_one_expert_keeps_exactly_its_row_by_every_method(tmp_path, average):
    sources = {"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<y>", "<z>"])}
    _, out = written(tmp_path, sources, tokenizer="union", average=average)
    rows = load_file(out / "model.safetensors")[EMBED]
    assert texts_in(out)[20:] == ["<x>", "<y>", "<z>"]
    assert torch.equal(rows[20], rows_of("a", ["<x>"])[0])
    assert torch.equal(rows[21:], rows_of("b", ["<y>", "<z>"]))


def test_task_arithmetic_adds_nothing_where_an_expert_lacks_a_token(tmp_path):
    sources = {"base": Tokens(), "a": Tokens(words=FEWER), "b": Tokens()}
    _, out = written(tmp_path, sources, average={"method": "task_arithmetic", "lambda": 0.5})
    rows = load_file(out / "model.safetensors")[EMBED]
    base, a, b = (rows_of(name, WORDS) for name in ("base", "a", "b"))
    delta = (b - base) + torch.where(torch.arange(20)[:, None] < 18, a - base, torch.zeros(()))
    assert torch.allclose(rows, base + 0.5 * delta, atol=1e-6)


def test_weights_count_for_tokens_of_several_experts(tmp_path):
    sources = {"base": Tokens(), "a": Tokens(added=["<x>"]), "b": Tokens(added=["<x>"]), "c": Tokens()}
    weights = [0.5, 2.0, 1.5]
    experts = [{"name": n, "model": f"./{n}", "weight": w} for n, w in zip("abc", weights, strict=True)]
    _, out = written(tmp_path, sources, tokenizer="union", experts=experts)
    rows = load_file(out / "model.safetensors")[EMBED]
    assert torch.allclose(rows, expected_rows(texts_in(out), sources, weights=weights), atol=1e-6)


def test_padded_rows_are_never_cut_by_a_tokenizer_with_fewer_tokens(tmp_path):
    sources = {"base": Tokens(padding=7), "a": Tokens(padding=7), "b": Tokens(padding=7)}
    for choice in ("base", "union", "expert:a"):
        folder = tmp_path / choice.replace(":", "-")
        plan, out = written(folder, sources, tokenizer=choice)
        rows = load_file(out / "model.safetensors")[EMBED]
        assert (rows.shape[0], plan.vocabulary, plan.notices) == (27, {}, ())
        padded = [f"row {n}" for n in range(20, 27)]
        assert torch.allclose(rows[20:], (rows_of("a", padded) + rows_of("b", padded)) / 2, atol=1e-6)


@pytest.mark.parametrize("tokenizer", ["base", "union", "expert:a", "expert:b"])
def test_a_routed_bundle_of_density_1_gives_each_expert_its_rows_back(tmp_path, tokenizer):
    sources = {
        "base": Tokens(padding=1),
        "a": Tokens(words=SHUFFLED, added=["<x>"]) if tokenizer != "union" else Tokens(added=["<x>"]),
        "b": Tokens(added=["<y>", "<x>"]),
    }
    routed = {"assign": {"rule": "all"}, "extract": {"density": 1.0, "values": "fp32"}}
    _, out = written(tmp_path, sources, tokenizer=tokenizer, **routed)
    bundle, texts = read_bundle(out), texts_in(out)
    assert bundle.manifest.assignment["model.embed_tokens"] == "route"
    for name in ("a", "b"):
        for text, row in zip(texts, bundle.expert(name, EMBED), strict=True):
            if text in {*sources[name].words, *sources[name].added}:
                assert torch.equal(row, rows_of(name, [text])[0]), (name, text)
            elif text in {*sources["base"].words, "row 20", "row 21"}:
                assert torch.equal(row, rows_of("base", [text])[0]), (name, text)
