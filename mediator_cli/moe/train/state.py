"""What an interrupted training goes on from: one safetensors file, which appears whole or not at all.

It holds the trained parameters and the two moments of Adam, and in its metadata the step, the losses so far, and what
was asked. Nothing else has a say in the steps to come: rows and random numbers follow from the seed and the step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.write import sync, write_error
from mediator_cli.errors import CheckpointError, OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

_ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What torch's AdamW keeps of a parameter; nothing of one that has had no gradient yet."""
_FORMAT = "mediator.training"


@dataclass(frozen=True)
class Progress:
    """How far a training has come: `step` steps are done, `losses` are theirs.

    `key` is what was asked, as JSON data; `before` what was measured before the first step, `tokens` and `seconds`
    what all steps took.
    """

    step: int
    losses: tuple[float, ...]
    key: Mapping[str, Any]
    before: Mapping[str, Any]
    tokens: int = 0
    seconds: float = 0.0


def state_file(target: Path) -> Path:
    """Say where the state of a training that becomes `target` lies."""
    place = target.resolve()
    return place.parent / f".{place.name}.training.safetensors"


def save_state(
    file: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write parameters, moments and progress beside the file, then rename; raise OutputError when that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        found = optimizer.state.get(parameter, {})
        tensors |= {f"{part}.{name}": found[part] for part in _ADAM if part in found}
    partial = file.with_name(f"{file.name}.new")
    stored = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, partial, {"format": _FORMAT, "progress": json.dumps(vars(progress))})
        sync(partial)
        partial.replace(file)
        sync(file.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise write_error(file, error if isinstance(error, OSError) else OSError(str(error))) from None


def read_progress(file: Path) -> Progress:
    """Read how far a training has come; raise CheckpointError where the file is none of ours or damaged."""
    metadata = read_header(file).metadata
    try:
        data = json.loads(metadata["progress"])
        return Progress(**{**data, "losses": tuple(data["losses"])})
    except (KeyError, ValueError, TypeError):
        hint = "train anew with --overwrite"
        raise CheckpointError(Problem(str(file), "is no state of a training", hint)) from None


def load_state(file: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put stored parameters and moments into a model and a new AdamW, which then go on as if never stopped."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored, torch.no_grad():
        known = set(stored.keys())
        for name, parameter in parameters.items():
            parameter.copy_(stored.get_tensor(f"parameter.{name}"))
            found = {part: stored.get_tensor(f"{part}.{name}") for part in _ADAM if f"{part}.{name}" in known}
            if found:
                # The count of steps stays where AdamW makes it: on the CPU.
                optimizer.state[parameter] = {
                    part: tensor if part == "step" else tensor.to(parameter.device) for part, tensor in found.items()
                }


def check_same(file: Path, old: Progress, key: Mapping[str, Any]) -> None:
    """Raise OutputError naming what is asked otherwise than in the training that is to go on."""
    differing = [name for name in key if old.key.get(name) != key[name]]
    # With all steps done only the folder is left to write; in place that may have begun already.
    if old.step == key["steps"] and differing == ["files"]:
        return
    if differing:
        message = f"the interrupted training was another one: {', '.join(differing)} differ"
        raise OutputError(Problem(str(file), message, "ask for the same, or train anew with --overwrite"))
