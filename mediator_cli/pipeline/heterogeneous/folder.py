"""What stands beside the weights: config, generation config, tokenizer, card, and where all came from."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.heterogeneous import ARCHITECTURE, HEAD_BIAS, MANIFEST, MODEL_TYPE
from mediator_cli.checkpoint.source import side_files
from mediator_cli.checkpoint.vocabulary import is_tokenizer_file
from mediator_cli.pipeline.heterogeneous.make import facts_of
from mediator_cli.pipeline.side_files import license_of, write_json
from mediator_cli.pipeline.tokenizer import add_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mediator_cli.pipeline.heterogeneous.model import HeterogeneousPlan

_CONFIG, _GENERATION, _CARD = "config.json", "generation_config.json", "README.md"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ROLES = ("bos", "eos", "pad")


def write_folder(plan: HeterogeneousPlan, folder: Path, title: str) -> None:
    """Write all files but the weights."""
    write_json(folder / _CONFIG, config_of(plan))
    _write_tokenizer(plan, folder)
    _write_generation(plan, folder)
    write_json(folder / MANIFEST, _manifest(plan))
    (folder / _CARD).write_text(_card(plan, title), encoding="utf-8")


def config_of(plan: HeterogeneousPlan) -> dict[str, Any]:
    """Make config.json."""
    recipe = plan.loaded.recipe
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": _DTYPES[plan.dtype],
        "vocab_size": plan.n_tokens,
        "hidden_size": plan.width,
        "tie_word_embeddings": plan.is_tied,
        "head_bias": plan.tensor(HEAD_BIAS) is not None,
        "experts_per_prompt": recipe.top_k,
        "projector": {
            "depth": recipe.projectors.depth,
            "width": recipe.projectors.width,
            "activation": recipe.projectors.activation,
            "skip": recipe.projectors.init == "identity",
        },
        **_token_ids(plan),
        "experts": facts_of(plan),
    }


def _token_ids(plan: HeterogeneousPlan) -> dict[str, Any]:
    """Give the ids of the chosen tokenizer's model, else of the tokenizer itself."""
    theirs: Mapping[str, Any] = plan.owner.source.config
    found = {}
    for role in _ROLES:
        value = theirs.get(f"{role}_token_id")
        found[f"{role}_token_id"] = plan.vocabulary.role_id(role) if value is None else value
    return {name: value for name, value in found.items() if value is not None}


def _write_tokenizer(plan: HeterogeneousPlan, folder: Path) -> None:
    owner = plan.owner.source.path
    for file in side_files(owner):
        if is_tokenizer_file(file):
            target = folder / file.relative_to(owner)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    if plan.adds_tokens:
        add_tokens(folder, plan.vocabulary)


def _write_generation(plan: HeterogeneousPlan, folder: Path) -> None:
    file = plan.owner.source.path / _GENERATION
    own = read_json(file) if file.is_file() else {}
    write_json(folder / _GENERATION, {**_token_ids(plan), **own})


def _manifest(plan: HeterogeneousPlan) -> dict[str, Any]:
    loaded = plan.loaded
    return {
        "schema_version": 1,
        "generator": f"mediator {version('mediator-merge')}",
        "recipe": {"path": loaded.path.name, "text": loaded.text, "changes": list(loaded.changes)},
        "experts": [_source(plan, number) for number in range(len(plan.experts))],
        "router": plan.router_init,
        "notices": list(plan.notices),
    }


def _source(plan: HeterogeneousPlan, number: int) -> dict[str, Any]:
    expert, spec = plan.experts[number], plan.loaded.recipe.experts[number]
    repo = expert.source.repo
    return {
        "name": expert.name,
        "model": spec.model,
        "commit": repo.commit if repo is not None else None,
        "model_type": expert.source.config.get("model_type"),
        "license": license_of(expert.source.path),
        "tokens_known": int((expert.rows >= 0).sum()),
        "files": {
            info.file.name: info.file.stat().st_size for info in expert.source.tensors.values() if info.file.is_file()
        },
    }


def _card(plan: HeterogeneousPlan, title: str) -> str:
    return "\n".join(_card_lines(plan, title)) + "\n"


def _card_lines(plan: HeterogeneousPlan, title: str) -> Iterator[str]:
    recipe = plan.loaded.recipe
    yield from (
        f"# {title}",
        "",
        "Experts of different architectures between one embedding and one head, as in MergeME",
    )
    chosen = f"{recipe.top_k} of {len(plan.experts)} experts"
    yield f"(arXiv 2502.00997): a router reads each prompt and lets {chosen} answer it."
    yield from ("", "| expert | model | architecture | width | layers |", "|---|---|---|---|---|")
    for expert, spec in zip(plan.experts, recipe.experts, strict=True):
        config = expert.source.config
        layers = config.get("num_hidden_layers") or config.get("n_layer") or ""
        licence = license_of(expert.source.path)
        model = f"{spec.model} ({licence})" if licence else spec.model
        yield f"| {expert.name} | {model} | {config.get('model_type')} | {expert.body.width} | {layers} |"
    yield from ("", f"The tokenizer is that of {recipe.tokenizer_of}. With mediator installed:", "", "```python")
    yield from ("import mediator_cli.moe.heterogeneous", "from transformers import AutoModelForCausalLM, AutoTokenizer")
    yield from (
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
    )
