"""What is compared: sources, static merges, bundles, MoEs with every gate, trained, cut and compressed ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TASKS = ("maths", "sarcasm", "sentiment", "language")
GATES = (
    "random", "uniform_random", "hidden", "hidden_avg", "hidden_last", "cheap_embed", "centred", "ridge", "logistic",
)  # fmt: skip
DEFAULT_GATES = "ridge"
MEAN: Mapping[str, Any] = {"method": "linear"}
SHARED: Mapping[str, Mapping[str, Any]] = {
    "mean (BTX)": MEAN,
    "TIES (MergeME)": {"method": "ties", "preset": "mergeme"},
    "DARE (MergeME)": {"method": "dare_linear", "preset": "mergeme"},
}
"""How all that is no expert is merged, as the paper has it."""
STEPS = "80"
"""Steps of training, of eight rows each: what two cores do in some minutes."""
PROMPTS = 32
"""Prompts of each expert that gates are made from: with 64, the default, they come out a point better."""
COMPRESSIONS = ("reap", "ream", "m_smoe", "hc_smoe", "sub_moe")


@dataclass(frozen=True)
class Trial:
    """A model: of a recipe, changed by commands of mediator, and which part of it answers; `model` is one of the demo.

    Each step is a command with its options; it reads the folder before it and writes its own.
    """

    group: str
    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[tuple[str, ...], ...] = ()
    part: str = ""
    model: str = ""
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What its result is kept under."""
        return f"{self.group}: {self.name}"


def trials() -> Iterator[Trial]:
    """List all trials in the order of the table."""
    yield Trial("sources", "base", model="base")
    for name in TASKS:
        yield Trial("sources", f"expert {name}", model=f"experts/{name}")
    yield from _static()
    yield from _bundles()
    yield from _moes()
    yield from _trained()
    yield from _smaller()


def _static() -> Iterator[Trial]:
    none = {"assign": {"rule": "none"}}
    for name, average in SHARED.items():
        yield Trial("static merge", name, {**none, "average": dict(average)})
    yield Trial(
        "static merge", "task arithmetic, λ 0.5", {**none, "average": {"method": "task_arithmetic", "lambda": 0.5}}
    )


def _bundles() -> Iterator[Trial]:
    yield Trial("bundle", "default recipe", {"extract": {"density": 0.06, "select": "magnitude", "values": "sign"}})
    whole = {"assign": {"rule": "all"}, "extract": {"density": 1.0, "values": "bf16", "dense": "base"}}
    policy = {"rule": "top_k", "k": 2, "combine": "probabilities"}
    for name, features in (("perplexity", "perplexity"), ("task vectors", "gradient")):
        router = {"features": features, "policy": policy}
        yield Trial("separate attention", f"{name} router", {**whole, "router": router})


def _moes() -> Iterator[Trial]:
    for method in GATES:
        yield Trial("MoE, mean shared", f"gates {method}", moe(gates={"method": method}))
    for name, average in list(SHARED.items())[1:]:
        yield Trial("MoE", f"{name} shared, gates {DEFAULT_GATES}", moe(average))
    base = moe(shared_from="base")
    yield Trial("MoE", f"base shared, gates {DEFAULT_GATES}", base)
    for top_k in (1, 4):
        yield Trial("MoE", f"mean shared, gates {DEFAULT_GATES}, top {top_k}", moe(experts_per_token=top_k))
    yield Trial("MoE", f"mean shared, gates {DEFAULT_GATES}, base as fifth expert", moe(base_expert=True))
    conflicted = {**moe(), "assign": {"rule": "mean_std"}}
    yield Trial("MoE", f"conflicted layers only, gates {DEFAULT_GATES}", conflicted)


def _trained() -> Iterator[Trial]:
    train = ("train", "--what", "gates", "--steps", STEPS)
    for name, average in SHARED.items():
        yield Trial("MoE, gates trained", f"{name} shared, from {DEFAULT_GATES}", moe(average), (train,))
    yield Trial("MoE, gates trained", "mean (BTX) shared, from random", moe(gates={"method": "random"}), (train,))


def _smaller() -> Iterator[Trial]:
    for share in (0.25, 0.5):
        granite = moe(format="granitemoeshared", neurons=share, experts_per_token=1)
        yield Trial("smaller", f"granitemoeshared, {share:.0%} of the neurons, top 1", granite)
    for method in COMPRESSIONS:
        yield Trial(
            "smaller", f"{method}, 4 to 3 experts", moe(), (("compress-moe", "--method", method, "--experts", "3"),)
        )


def moe(average: Mapping[str, Any] = MEAN, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - recipe data
    """Write the part of a recipe that makes an MoE."""
    spec = {"gates": {"method": DEFAULT_GATES}, **fields}
    return {"kind": "moe", "average": dict(average), "moe": {**spec, "gates": {**spec["gates"], "prompts": PROMPTS}}}
