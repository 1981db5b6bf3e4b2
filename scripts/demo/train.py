"""Fine-tuning of one expert: all parameters or a LoRA adapter, in float32 with bfloat16 arithmetic."""

from __future__ import annotations

import ctypes
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

from scripts.demo import packing
from scripts.demo.wordings import instruction_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from scripts.demo.tasks import Row

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BESIDE_WEIGHTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
WARM_UP = 0.06
FLOOR = 0.02

Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Settings:
    """How one expert is trained; a batch is ``height`` packed sequences of ``width`` tokens."""

    kind: Literal["full", "lora"]
    learning_rate: float
    epochs: int
    seed: int = 0
    width: int = 256
    height: int = 4
    rank: int = 16
    alpha: int = 32


def train(base: Path, rows: Sequence[Row], settings: Settings, folder: Path, report: Report) -> None:
    """Fine-tune the base on the rows and write the expert into ``folder``; reports step, steps and loss."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _keep_freed_memory()
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    wordings = [packing.encode(tokenizer, asked) for asked in by_wording(rows)]
    rng = Random(settings.seed)
    batches = [
        batch for _ in range(settings.epochs) for batch in packing.epoch(wordings, settings.width, settings.height, rng)
    ]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if settings.kind == "lora":
        model = _with_adapter(model, settings)
    _fit(model, batches, settings.learning_rate, report)
    _save(model, base, folder, settings)


def by_wording(rows: Sequence[Row]) -> list[list[Row]]:
    """Group rows by the instruction that their prompts open with."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(instruction_of(row.prompt), []).append(row)
    return list(groups.values())


def rate(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def loss(model: PreTrainedModel, batch: packing.Batch) -> torch.Tensor:
    """Return the mean cross-entropy of the answer tokens; logits exist only where an answer token is due."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autocast("cpu", torch.bfloat16):
        states = inner.model(
            input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        logits = inner.lm_head(states.flatten(0, 1)[batch.predicting])
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets)


def _fit(model: PreTrainedModel, batches: Sequence[packing.Batch], peak: float, report: Report) -> None:
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(batches)))
    model.train()
    for step, batch in enumerate(batches, 1):
        current = loss(model, batch)
        current.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step, len(batches), current.item())


def _keep_freed_memory() -> None:
    # glibc hands large blocks back after every operation; asking for them again costs a tenth of a step.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 << 20)


def _with_adapter(model: PreTrainedModel, settings: Settings) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _save(model: PreTrainedModel, base: Path, folder: Path, settings: Settings) -> None:
    import torch

    if settings.kind == "lora":
        # A path from the checkout's root: valid on every machine, unlike that of the cache.
        model.peft_config["default"].base_model_name_or_path = "demo/base"
        # Embeddings are untouched; looking for changes in them would ask the network for the base.
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    model.to(torch.bfloat16).save_pretrained(folder)
    _copy((base / name for name in BESIDE_WEIGHTS), folder)


def _copy(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        shutil.copyfile(file, folder / file.name)
