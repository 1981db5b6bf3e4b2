"""Gates: weights of experts for every token, or for every sequence, made inside the model from its hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.bundle.gates_record import GateRule


@dataclass(frozen=True, eq=False)
class Gate:
    """One gate: `directions` [experts, k, in] and `bias` [experts], float32; k is 1 but for score `length`."""

    directions: torch.Tensor
    bias: torch.Tensor

    def to(self, device: torch.device | str) -> Gate:
        """Give the same gate on a device."""
        return Gate(self.directions.to(device), self.bias.to(device))


@dataclass(frozen=True, eq=False)
class Gates:
    """All gates of a model: by tensor name where the rule is `at: module`, else by the path of what they stand before.

    That is a decoder layer, or a part of one that is called with hidden states, such as its MLP. One gate may stand at
    several places.
    """

    method: str
    rule: GateRule
    experts: tuple[str, ...]
    by_name: Mapping[str, Gate]


@dataclass
class Pass:
    """What gates know of the pass that runs: where prompts are [rows, tokens], and whether a sequence goes on.

    `continues` tells that the prompt was read in an earlier pass, whose choice per sequence then stays.
    """

    is_prompt: torch.Tensor | None = None
    continues: bool = False


@dataclass
class Chooser:
    """A gate at work; `chosen` [rows, experts] is what it chose for the sequences at hand, where it chooses for them.

    `held` are the weights that a layer's gate made for all matrices of the layer in the pass that runs. `seen` keeps
    the mean weight of each expert over the tokens of a pass while `watches`, for people to look at.
    """

    gate: Gate
    rule: GateRule
    now: Pass
    chosen: torch.Tensor | None = None
    held: torch.Tensor | None = None
    watches: bool = False
    seen: torch.Tensor | None = None

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Choose for hidden states x [rows, tokens, in]; float32 [rows · tokens, experts]."""
        states = x.reshape(len(x), -1, x.shape[-1]).float()
        if self.rule.per == "token":
            found = weigh(self.gate, self.rule, states.flatten(0, 1))
        else:
            if not self.now.continues or self.chosen is None:
                self.chosen = weigh(self.gate, self.rule, _means(states, self.now.is_prompt))
            found = self.chosen.repeat_interleave(states.shape[1], dim=0)
        if self.watches:
            self.seen = _means(found.detach().view(*states.shape[:2], -1), self.now.is_prompt)
        return found

    def current(self, x: torch.Tensor) -> torch.Tensor:
        """Give the weights that were made for this pass [rows · tokens, experts], whatever x is."""
        if self.held is None:
            raise RuntimeError("a layer's gate is asked before its layer was called")
        return self.held


def _means(states: torch.Tensor, is_prompt: torch.Tensor | None) -> torch.Tensor:
    """Average [rows, tokens, n] over each row's prompt; over all tokens where it is not known."""
    if is_prompt is None:
        return states.mean(1)
    share = is_prompt.to(states)[..., None]
    return (states * share).sum(1) / share.sum(1).clamp(min=1)


def as_read(states: torch.Tensor, rule: GateRule) -> torch.Tensor:
    """Give states [..., in] as gates of a rule read them."""
    if rule.reads == "unit":
        return functional.normalize(states, dim=-1)
    return functional.layer_norm(states, states.shape[-1:]) if rule.reads == "normalised" else states


def scores_of(gate: Gate, rule: GateRule, states: torch.Tensor) -> torch.Tensor:
    """Score experts for states [tokens, in]; float32 [tokens, experts]."""
    states = as_read(states, rule)
    n_experts, k, _ = gate.directions.shape
    products = (states @ gate.directions.flatten(0, 1).t()).view(-1, n_experts, k)
    if rule.score == "length":
        lengths: torch.Tensor = products.norm(dim=-1)
        return lengths + gate.bias
    flat = products.squeeze(-1)
    return (flat.abs() if rule.score == "absolute" else flat) + gate.bias


def weigh(gate: Gate, rule: GateRule, states: torch.Tensor) -> torch.Tensor:
    """Make weights of experts for states [tokens, in]; float32 [tokens, experts], zero for those not chosen."""
    scores = scores_of(gate, rule, states) / rule.temperature
    if rule.top_k is None or rule.top_k >= scores.shape[-1]:
        return _values(scores, rule)
    kept = scores.topk(rule.top_k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, kept.indices, _values(kept.values, rule))


def _values(scores: torch.Tensor, rule: GateRule) -> torch.Tensor:
    if rule.weights == "softmax":
        return scores.softmax(-1)
    return scores.sigmoid() if rule.weights == "sigmoid" else scores


@dataclass
class Gating:
    """The gates of a model at work: choosers by name, and the pass that they share."""

    gates: Gates
    now: Pass
    choosers: dict[str, Chooser]
    hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def begin(self, is_prompt: torch.Tensor | None, *, continues: bool) -> None:
        """Tell all gates of the pass that is about to run."""
        self.now.is_prompt, self.now.continues = is_prompt, continues

    def watch(self, *, watches: bool) -> None:
        """Keep, or let go of, what each gate chooses on average."""
        for chooser in self.choosers.values():
            chooser.watches, chooser.seen = watches, None


def make_gating(gates: Gates, device: torch.device | str = "cpu") -> Gating:
    """Put gates to work on a device."""
    now = Pass()
    return Gating(gates, now, {name: Chooser(gate.to(device), gates.rule, now) for name, gate in gates.by_name.items()})
