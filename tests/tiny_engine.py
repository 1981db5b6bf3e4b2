"""Models of many architectures with experts held in memory, and a caller that gathers what an engine tells."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_architectures import _SIZES, DECODERS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.runtime.gating import gate_sizes
from mediator_cli.runtime.held import give_experts, hold_experts
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.serve.engine.engine import Engine, Ticket
from mediator_cli.serve.engine.request import Event, Failed, Finished, Request, Started, Text

EXPERTS = ("a", "b", "c")


def held_model(kind: str = "llama", **changes: Any) -> RoutedModel:
    """Make a random float32 model of an architecture with three low-rank experts on all its linear layers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_SIZES, **DECODERS[kind], **changes})
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # The head is tied or not: either way what it says must differ from token to token.
        base.get_output_embeddings().weight.normal_(0, 1)
    chosen = {
        f"{name}.weight": module.weight.shape
        for name, module in base.base_model.named_modules(prefix=base.base_model_prefix)
        if isinstance(module, nn.Linear | Conv1D)
    }
    model = hold_experts(base, chosen, Path("held"), None)
    give_experts(model, {name: {tensor: _delta(shape) for tensor, shape in chosen.items()} for name in EXPERTS})
    return model


def _delta(shape: torch.Size) -> FactorDelta:
    return FactorDelta(0.5 * torch.randn(2, shape[1]), 0.5 * torch.randn(shape[0], 2))


@dataclass
class Caller:
    """What one request was told, in order; `wait` until it is over."""

    events: list[Event] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    ticket: Ticket | None = None

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.over.set()

    def wait(self) -> Caller:
        assert self.over.wait(60), "no answer came"
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))

    @property
    def tokens(self) -> list[int]:
        return [scored.token for event in self.events if isinstance(event, Text) for scored in event.tokens]

    @property
    def log_probs(self) -> list[float | None]:
        return [scored.log_prob for event in self.events if isinstance(event, Text) for scored in event.tokens]

    @property
    def started(self) -> Started:
        (started,) = (event for event in self.events if isinstance(event, Started))
        return started

    @property
    def end(self) -> Finished | Failed:
        (end,) = (event for event in self.events if isinstance(event, Finished | Failed))
        assert end is self.events[-1]
        return end


def ask(engine: Engine, *requests: Request) -> list[Caller]:
    """Submit all requests at once and wait for all answers."""
    callers = [Caller() for _ in requests]
    for caller, request in zip(callers, requests, strict=True):
        caller.ticket = engine.submit(request, caller)
    return [caller.wait() for caller in callers]


def random_gates(model: RoutedModel, per: Any) -> Gates:
    """Make gates of random preferences at every module."""
    torch.manual_seed(1)
    made = {
        name: Gate(0.5 * torch.randn(len(EXPERTS), 1, size), 0.5 * torch.randn(len(EXPERTS)))
        for name, size in gate_sizes(model).items()
    }
    return Gates("test", GateRule(at="module", per=per), EXPERTS, made)
