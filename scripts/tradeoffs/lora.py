"""Training of one small LoRA adapter: any rank, scale and targets, for a fixed number of small steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from scripts.demo import packing
from scripts.demo.train import TARGETS, by_wording, loss, rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scripts.demo.tasks import Row


@dataclass(frozen=True)
class Adapter:
    """An adapter's shape and training; a step sees ``height`` packed sequences of ``width`` tokens."""

    rank: int
    alpha: int
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    learning_rate: float = 1e-3
    steps: int = 60
    width: int = 256
    height: int = 2
    seed: int = 0


def train_adapter(
    base: Path, rows: Sequence[Row], settings: Adapter, folder: Path, report: Callable[[int, int, float], None]
) -> None:
    """Train the adapter on the rows, again and again until the steps are done, and write it into the folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    wordings = [packing.encode(tokenizer, asked) for asked in by_wording(rows)]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        use_rslora=settings.rslora,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    _fit(model, batches(wordings, settings), settings, report)
    # A path from the checkout's root: valid on every machine, unlike that of the cache.
    model.peft_config["default"].base_model_name_or_path = "demo/base"
    model.save_pretrained(folder, save_embedding_layers=False)
    # PEFT's model card is an empty form that names the cache's absolute path.
    (folder / "README.md").unlink(missing_ok=True)


def batches(wordings: Sequence[Sequence[packing.Chat]], settings: Adapter) -> list[packing.Batch]:
    """Return one batch per step, from as many epochs as that takes."""
    rng = Random(settings.seed)
    epochs = (packing.epoch(wordings, settings.width, settings.height, rng) for _ in repeat(None))
    return list(islice(chain.from_iterable(epochs), settings.steps))


def _fit(
    model: PreTrainedModel,
    planned: Sequence[packing.Batch],
    settings: Adapter,
    report: Callable[[int, int, float], None],
) -> None:
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(planned)))
    model.train()
    for step, batch in enumerate(planned, 1):
        current = loss(model, batch)
        current.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step, len(planned), current.item())
