"""The steps: transformers' Trainer, with rows, loss and state of our own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mediator_cli.errors import MediatorError, Problem
from mediator_cli.moe.train.lines import groups
from mediator_cli.moe.train.loss import cross_entropy
from mediator_cli.moe.train.settings import rate
from mediator_cli.moe.train.state import save_state

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn
    from torch.utils.data import Sampler

    from mediator_cli.moe.train.model import Student
    from mediator_cli.moe.train.rows import Example
    from mediator_cli.moe.train.settings import TrainSettings
    from mediator_cli.moe.train.state import Progress

_LARGEST_GRADIENT = 1.0
_SAVE_SHARE = 20
"""A save may take one part in this many of the time."""


@dataclass(frozen=True)
class Beat:
    """What is told while it goes on: steps or passes done of how many, and of steps the loss and tokens a second."""

    stage: str
    done: int
    total: int
    loss: float | None = None
    tokens_per_second: float | None = None


Hear = Callable[[Beat], None]


def unheard(_: Beat) -> None:
    """Tell nobody."""


class NotFinite(MediatorError):
    """A loss or gradient is NaN or infinite."""


@dataclass
class Course:
    """A training on its way: the rows of all steps, how far it is, and where its state is kept."""

    student: Student
    steps: Sequence[Sequence[Example]]
    settings: TrainSettings
    file: Path
    progress: Progress
    hear: Hear = unheard
    started: float = field(default_factory=time.monotonic)

    def note(self, loss: float, norm: float, tokens: int) -> None:
        """Note what a step's loss, gradient and number of tokens are; raise MediatorError where one is not finite."""
        done = self.progress
        if not (math.isfinite(loss) and math.isfinite(norm)):
            message = f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite"
            hint = f"lower --learning-rate, which is {self.settings.peak:g}; nothing was changed"
            raise NotFinite(Problem(f"step {done.step + 1}", message, hint))
        now = time.monotonic()
        self.progress = replace(
            done, losses=(*done.losses, loss), tokens=done.tokens + tokens, seconds=done.seconds + now - self.started
        )
        self.started = now


def make_optimizer(student: Student, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make an AdamW over the trained parameters, without weight decay, which would pull experts towards zero."""
    return torch.optim.AdamW(student.parameters.values(), lr=settings.peak, betas=(0.9, 0.99), weight_decay=0.0)


def run_steps(course: Course, optimizer: torch.optim.Optimizer) -> Progress:
    """Take all steps that are left; gives how far it came, which is to the end.

    Raises MediatorError naming the step whose loss or gradient is not finite.
    """
    first, steps = course.progress.step, len(course.steps)
    if first < steps:
        trainer = _Trainer(
            model=course.student.model,
            args=_arguments(course),
            train_dataset=list(course.steps[first:]),
            data_collator=lambda step: {"rows": step[0]},
            optimizers=(
                optimizer,
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(first + step, steps)),
            ),
            callbacks=[_Keeper(course, optimizer)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.course = course
        trainer.train()
    return course.progress


def _arguments(course: Course) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(course.file.parent),
        max_steps=len(course.steps) - course.progress.step,
        per_device_train_batch_size=1,
        bf16=course.settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        # Clipped where the step is computed, which tells whether the gradient is finite.
        max_grad_norm=0.0,
        seed=course.settings.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,
    )
    # More devices would each get a part of what one step needs as a whole.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Trainer(Trainer):
    """Trainer whose batch is the rows of one step; it writes no file."""

    course: Course

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:  # noqa: ANN401 - differs by version
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing."""
        return 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:  # noqa: ANN401
        """Add up the gradients of one step's passes; gives the mean cross-entropy of its targets."""
        course, rows = self.course, inputs["rows"]
        settings = course.settings
        # Dropout, where a model has any, is the same whether the training was interrupted or not.
        torch.manual_seed((settings.seed << 32) + course.progress.step)
        model.train()
        n_targets = sum(len(row.ids) - row.first for row in rows)
        passes = course.student.passes(model)
        total = torch.zeros((), device=self.args.device)
        for group in groups(rows, settings.width, passes.tokens):
            with self.compute_loss_context_manager():
                found = passes(group)
                loss = cross_entropy(found) / n_targets
                total += loss.detach()
                if settings.load_balance:
                    loss = loss + settings.load_balance * found.balance * len(group) / len(rows)
            self.accelerator.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(course.student.parameters.values(), _LARGEST_GRADIENT)
        course.note(float(total), float(norm), sum(len(row.ids) for row in rows))
        return total


class _Keeper(TrainerCallback):
    """Keeps how far it has come, tells of it, and saves what it goes on from."""

    def __init__(self, course: Course, optimizer: torch.optim.Optimizer) -> None:
        self.course, self.optimizer = course, optimizer
        self.saved, self.took = time.monotonic(), 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - as in transformers
        """Count the step; save when it is time, and at the end."""
        course = self.course
        course.progress = replace(course.progress, step=course.progress.step + 1)
        progress = course.progress
        now = time.monotonic()
        due = now - self.saved >= max(course.settings.save_seconds, _SAVE_SHARE * self.took)
        if due or progress.step == len(course.steps):
            save_state(course.file, course.student.parameters, self.optimizer, progress)
            self.saved = time.monotonic()
            self.took = self.saved - now
        speed = progress.tokens / max(progress.seconds, 1e-9)
        course.hear(Beat("training", progress.step, len(course.steps), progress.losses[-1], speed))
