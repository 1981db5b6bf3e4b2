"""Modules are told apart by what they compute, also where their numbers are not there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from mediator_cli.runtime.forms import call_with, form_of


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return x * self.weight if gate is None else x * self.weight * gate


class Offset(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward((ids + 1) % self.num_embeddings)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


CASES = [
    (lambda: nn.Linear(4, 6), "linear"),
    (lambda: FalconLinear(4, 6, bias=False), "linear"),
    (lambda: Doubled(4, 6), None),
    (lambda: Conv1D(6, 4), "transposed"),
    (lambda: nn.Embedding(7, 4), "lookup"),
    (lambda: Gemma3TextScaledWordEmbedding(7, 4, 6, 3.0), "lookup"),
    (lambda: Offset(7, 4), None),
    (lambda: OPTLearnedPositionalEmbedding(7, 4), None),
    (lambda: Gemma3RMSNorm(4), "vectors"),
    (lambda: nn.LayerNorm(4), "vectors"),
    (Gated, None),
    (Nested, None),
    (lambda: nn.Conv1d(4, 4, 3), None),
    (nn.GELU, None),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("make", "form"), CASES)
def test_forms(make, form, device) -> None:
    with torch.device(device):
        module = make()
    assert form_of(module) == form


def test_the_router_of_a_mixture_of_experts_has_no_form() -> None:
    assert form_of(MixtralTopKRouter(MixtralConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=2))) is None


def test_trying_a_module_does_not_change_it() -> None:
    torch.manual_seed(0)
    module = Gemma3TextScaledWordEmbedding(7, 4, 6, 3.0)
    before = module.weight
    form_of(module)
    assert module.weight is before
    assert module.padding_idx == 6
    assert torch.equal(module(torch.tensor([2])), 3.0 * before[2][None])


def test_parameters_are_put_back_when_a_call_fails() -> None:
    module = nn.Linear(4, 6)
    own = module.weight
    with pytest.raises(RuntimeError):
        call_with(module, {"weight": torch.ones(6, 9)}, torch.ones(1, 4))
    assert module.weight is own
