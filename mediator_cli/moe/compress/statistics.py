"""What one pass over calibration tokens tells of the experts of one layer: all that any method asks for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mediator_cli.kernels.arrays import Doubles

_CHUNK_BYTES = 1 << 27
"""Most bytes of expert outputs at a time."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer, and how its router weighs the `top_k` of them that a token gets.

    `gates` [experts, hidden], `gate_up` [experts, 2 × inner, hidden] with the gate half first, `down` [experts, hidden,
    inner].
    """

    gates: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    activation: torch.nn.Module
    top_k: int
    renormalised: bool

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.gates)

    def inner(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        """Compute what the inner neurons of an expert say [tokens, inner]."""
        gate, up = torch.nn.functional.linear(states, self.gate_up[expert]).chunk(2, dim=-1)
        found: torch.Tensor = self.activation(gate) * up
        return found

    def output(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        """Compute what an expert gives for states [tokens, hidden], with weight 1, in float32."""
        return torch.nn.functional.linear(self.inner(expert, states), self.down[expert]).float()

    def route(self, states: torch.Tensor) -> Routing:
        """Choose the experts of each token as the layer does."""
        logits = torch.nn.functional.linear(states, self.gates).float()
        probabilities = logits.softmax(dim=-1)
        weights, chosen = probabilities.topk(min(self.top_k, self.n_experts), dim=-1)
        if self.renormalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(logits, probabilities, torch.zeros_like(logits).scatter(1, chosen, weights), chosen)


@dataclass(frozen=True)
class Routing:
    """Router logits, their softmax, the weights that the layer gives, 0 for experts not chosen; [tokens, experts].

    `chosen` [tokens, top_k] are the experts of each token.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the tokens of one layer, in float64. Those over all tokens are zero where only routed ones were run.

    `n_tokens` [1]; [experts]: `n_routed` tokens that each gets, `saliency_sum` Σ g‖E(x)‖ over those;
    `logit_products` Σ z zᵀ [experts, experts]; over all tokens: `output_sum` Σ E(x) and `gated_output_sum`
    Σ softmax(z) E(x) [experts, hidden], `cosine_sum` Σ cos(E_i(x), E_j(x)) [experts, experts].
    """

    n_tokens: Doubles
    n_routed: Doubles
    saliency_sum: Doubles
    logit_products: Doubles
    output_sum: Doubles
    gated_output_sum: Doubles
    cosine_sum: Doubles

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.n_routed)

    @property
    def frequency(self) -> Doubles:
        """Share of each expert in all choices of the router [experts]; they sum to 1."""
        found: Doubles = self.n_routed / max(1.0, self.n_routed.sum())
        return found

    @property
    def saliency(self) -> Doubles:
        """Mean over the tokens that an expert gets of g‖E(x)‖ [experts]; 0 without such tokens."""
        found: Doubles = self.saliency_sum / np.maximum(1.0, self.n_routed)
        return found

    @property
    def mean_output(self) -> Doubles:
        """Mean of E(x) over all tokens [experts, hidden]."""
        found: Doubles = self.output_sum / self.n_tokens
        return found

    @property
    def mean_gated_output(self) -> Doubles:
        """Mean of softmax(z) E(x) over all tokens [experts, hidden]."""
        found: Doubles = self.gated_output_sum / self.n_tokens
        return found

    @property
    def output_cosines(self) -> Doubles:
        """Mean over all tokens of the cosines between outputs [experts, experts]."""
        found: Doubles = self.cosine_sum / self.n_tokens
        return found


@torch.no_grad()
def measure_layer(
    place: str, experts: Experts, states: Iterable[torch.Tensor], *, every_token: bool = True
) -> LayerStatistics:
    """Run what the gates read, in parts [tokens, hidden], through the experts of a layer.

    Without `every_token` experts see only the tokens that they get, which is all that REAP and M-SMoE ask for.
    Raises CheckpointError, naming `place`, where states, gates or outputs are not finite.
    """
    _check_finite(place, "its gates", experts.gates)
    found = _zeros(experts)
    for chunk in _chunks(experts, states):
        _check_finite(place, "the states that its gates read", chunk)
        routing = experts.route(chunk)
        logits = routing.logits.double()
        found["n_tokens"] += len(chunk)
        found["n_routed"] += (routing.weights.new_zeros(experts.n_experts).double()).scatter_add(
            0, routing.chosen.reshape(-1), torch.ones(routing.chosen.numel(), dtype=torch.float64)
        )
        found["logit_products"] += logits.T @ logits
        add = _add_all if every_token else _add_routed
        add(found, experts, chunk, routing)
    for name, value in found.items():
        _check_finite(place, f"what its experts give ({name})", value)
    return LayerStatistics(**{name: value.numpy() for name, value in found.items()})


def _zeros(experts: Experts) -> dict[str, torch.Tensor]:
    n, hidden = experts.gates.shape
    shapes = {
        "n_tokens": (1,), "n_routed": (n,), "saliency_sum": (n,), "logit_products": (n, n), "output_sum": (n, hidden),
        "gated_output_sum": (n, hidden), "cosine_sum": (n, n),
    }  # fmt: skip
    return {field.name: torch.zeros(shapes[field.name], dtype=torch.float64) for field in fields(LayerStatistics)}


def _chunks(experts: Experts, states: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Cut states so that the outputs of all experts for a part fit in _CHUNK_BYTES."""
    size = max(1, _CHUNK_BYTES // (4 * experts.gates.numel()))
    for part in states:
        yield from part.split(size)


def _add_all(found: dict[str, torch.Tensor], experts: Experts, states: torch.Tensor, routing: Routing) -> None:
    """Add what all experts give for all tokens, whether they get them or not."""
    outputs = torch.stack([experts.output(expert, states) for expert in range(experts.n_experts)])
    lengths = outputs.norm(dim=-1)
    found["saliency_sum"] += (routing.weights.T.double() * lengths).sum(dim=1)
    found["output_sum"] += outputs.sum(dim=1, dtype=torch.float64)
    found["gated_output_sum"] += torch.einsum("te,eth->eh", routing.probabilities, outputs).double()
    # An output of length 0 has no direction: its cosine with all is 0.
    directions = (outputs / lengths.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).transpose(0, 1)
    found["cosine_sum"] += (directions @ directions.transpose(1, 2)).sum(dim=0, dtype=torch.float64)


def _add_routed(found: dict[str, torch.Tensor], experts: Experts, states: torch.Tensor, routing: Routing) -> None:
    """Add what each expert gives for the tokens that it gets."""
    for expert in range(experts.n_experts):
        (tokens,) = (routing.chosen == expert).any(dim=1).nonzero(as_tuple=True)
        if len(tokens):
            lengths = experts.output(expert, states[tokens]).norm(dim=-1).double()
            found["saliency_sum"][expert] += (routing.weights[tokens, expert].double() * lengths).sum()


def _check_finite(place: str, what: str, values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        hint = "the checkpoint is damaged, or was written wrongly: `mediator verify` or merge it again"
        raise CheckpointError(Problem(place, f"{what} hold NaN or infinite values", hint))
