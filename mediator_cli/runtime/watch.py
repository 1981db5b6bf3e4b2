"""Look at what gates choose on prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mediator_cli.errors import BundleError, Problem
from mediator_cli.runtime.policy import entropy
from mediator_cli.runtime.router import Routing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.runtime.gates import Gating
    from mediator_cli.runtime.gradients import Experts


@torch.no_grad()
def watch_gates(model: Experts, gating: Gating, prompts: Sequence[Sequence[int]]) -> Routing:
    """Read prompts of token ids with the gates at work: what they choose on average, over tokens and gates.

    Weights may be any numbers where the rule leaves them free; probabilities are their magnitudes as shares. Raises
    BundleError for an empty prompt.
    """
    rows = []
    gating.watch(watches=True)
    try:
        for at, prompt in enumerate(prompts, 1):
            if not len(prompt):
                raise BundleError(Problem(f"prompt {at}", "is empty", "give some text"))
            model(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=False)
            seen = [chooser.seen[0] for chooser in gating.choosers.values() if chooser.seen is not None]
            rows.append(torch.stack(seen).mean(0).cpu())
    finally:
        gating.watch(watches=False)
    weights = torch.stack(rows).numpy().astype(np.float64)
    shares = np.abs(weights)
    totals = shares.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, shares / np.where(totals > 0, totals, 1), 1 / shares.shape[1])
    none = np.zeros(len(rows))
    return Routing(model.expert_names, shares, entropy(shares), none, none.astype(bool), weights.astype(np.float32))
