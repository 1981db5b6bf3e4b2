"""Model folders whose rows of tokens can be told apart: each row is drawn from the source and the token's text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from conftest import HIDDEN, edit_json, random_tensors, write_checkpoint
from safetensors.torch import load_file
from tiny_tokens import WORD_TEMPLATE, WORDS
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mediator_cli import load_recipe, make_plan
from mediator_cli.plan.model import Plan

EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
STATIC = {"assign": {"rule": "none"}, "average": {"method": "linear"}}


@dataclass(frozen=True)
class Tokens:
    """What a source's tokenizer and rows are like."""

    words: Sequence[str] = tuple(WORDS)
    added: Sequence[str | AddedToken] = ()
    padding: int = 0
    untied: bool = False
    bias: bool = True
    eos: str = "</s>"
    template: str = WORD_TEMPLATE
    config: dict[str, Any] = field(default_factory=dict)


def make_tokenizer(tokens: Tokens) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words, with added tokens behind them; texts become special tokens."""
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(tokens.words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", chat_template=tokens.template,
        extra_special_tokens=WORDS[3:5],
    )  # fmt: skip
    made.add_tokens([AddedToken(t, special=True, normalized=False) if isinstance(t, str) else t for t in tokens.added])
    made.eos_token = tokens.eos
    return made


def row_of(source: str, text: str, tensor: str = EMBED) -> torch.Tensor:
    """Draw the row [8] of a token."""
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(crc32(f"{source} {text} {tensor}".encode())))


def rows_of(source: str, texts: Iterable[str], tensor: str = EMBED) -> torch.Tensor:
    """Stack the rows of some tokens; of the bias, one number each."""
    rows = torch.stack([row_of(source, text, tensor) for text in texts])
    return rows[:, 0].contiguous() if tensor == BIAS else rows


def texts_of(tokens: Tokens) -> list[str]:
    """List the tokens of all rows; those of no token are called `row 20` and so on."""
    ids = make_tokenizer(tokens).get_vocab()
    texts = {number: text for text, number in ids.items()}
    return [texts.get(n, f"row {n}") for n in range(len(ids) + tokens.padding)]


def write_source(folder: Path, tokens: Tokens | None = None) -> Path:
    """Write a model in float32 whose rows of tokens are drawn from its folder's name and the token."""
    tokens = tokens or Tokens()
    texts = texts_of(tokens)
    tensors = random_tensors(crc32(folder.name.encode()), torch.float32)
    heads = (HEAD, BIAS) if tokens.bias else (HEAD,)
    for name in (EMBED, *heads) if tokens.untied else (EMBED,):
        tensors[name] = rows_of(folder.name, texts, name)
    config = {"vocab_size": len(texts), "tie_word_embeddings": not tokens.untied, "dtype": "float32", **tokens.config}
    write_checkpoint(folder, tensors, config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    tokenizer = make_tokenizer(tokens)
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    edit_json(folder / "config.json", **ids)
    edit_json(folder / "generation_config.json", **ids)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("torch_dtype", "old_dtype"))
    return folder


def texts_in(folder: Path) -> list[str]:
    """List the texts of a written folder's rows, as transformers reads its tokenizer."""
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    n_rows = load_file(folder / "model.safetensors")[EMBED].shape[0]
    texts = {number: text for text, number in ids.items()}
    return [texts.get(n, f"row {n}") for n in range(n_rows)]


def expected_rows(
    texts: Sequence[str], sources: dict[str, Tokens], tensor: str = EMBED, weights: Sequence[float] = ()
) -> torch.Tensor:
    """Work out the linear merge of rows by the rules, token by token; `sources` have the base first."""
    owned = {name: set(texts_of(tokens)) for name, tokens in sources.items()}
    as_they_are = {name for name, tokens in sources.items() if texts_of(tokens) == texts}
    experts = [name for name in sources if name != "base"]
    found = []
    for text in texts:
        having = [n for n in experts if text in owned[n] and (n in as_they_are or not text.startswith("row "))]
        if text in owned["base"]:
            reads = [name if name in having else "base" for name in experts]
            rows = [rows_of(name, [text], tensor)[0] for name in reads]
        else:
            mean = torch.stack([rows_of(name, [text], tensor)[0] for name in having]).mean(dim=0)
            rows = [rows_of(name, [text], tensor)[0] if name in having else mean for name in experts]
        scale = torch.tensor(weights or [1.0] * len(experts)).view(-1, *[1] * rows[0].dim())
        found.append((torch.stack(rows) * scale).sum(dim=0) / scale.sum())
    return torch.stack(found)


def plan_of(folder: Path, sources: dict[str, Tokens], **fields: Any) -> Plan:
    """Write all sources and plan their merge."""
    for name, tokens in sources.items():
        write_source(folder / name, tokens)
    experts = [{"name": name, "model": f"./{name}"} for name in sources if name != "base"]
    data = {"version": 1, "base": "./base", "experts": experts, **STATIC, **fields}
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in data.items()))
    return make_plan(load_recipe(path))
