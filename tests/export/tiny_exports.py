"""A tiny bundle in float32 whose experts differ in linear weights alone, and one of adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import Workshop, fine_tune, random_tensors, write_adapter, write_checkpoint
from tiny_tokens import FILMS, SUMS, task_prompts, word_tokenizer, write_prompts

FLOAT32 = {"torch_dtype": "float32"}


def linear_shop(folder: Path) -> Workshop:
    """Make base, experts a and b that differ from it in linear weights alone, their prompts, and two adapters."""
    base = {name: 0.2 * tensor for name, tensor in random_tensors(0, torch.float32).items()}
    made = Workshop(folder, base)
    for seed, name in enumerate(("a", "b"), 1):
        moved = fine_tune(base, seed)
        made.experts[name] = {k: moved[k] if k.endswith("_proj.weight") else base[k] for k in base}
    for name, tensors in {"base": base, **made.experts}.items():
        write_checkpoint(folder / name, tensors, FLOAT32)
        (folder / name / "chat_template.jinja").unlink()
        word_tokenizer().save_pretrained(folder / name)
    write_prompts(folder / "a.jsonl", task_prompts(SUMS))
    write_prompts(folder / "b.jsonl", task_prompts(FILMS))
    for seed, name in enumerate(("one", "two"), 5):
        write_adapter(folder / name, seed, rank=2 + seed % 2)
    return made


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Ask a model about some tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[5, 6, 7, 8, 1, 2], [10, 11, 3, 4, 9, 0]])).logits
    return found
