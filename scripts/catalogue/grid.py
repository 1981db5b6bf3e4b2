"""What is merged for the table: each method at its defaults, and a few values of the parameter that matters most."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mediator_cli.methods.method import Method
from mediator_cli.methods.registry import methods

FOUR = ("maths", "language", "sarcasm", "sentiment")
PAIR, ONE = ("maths", "sentiment"), ("maths",)
NOT_RUN = {"ota": "the experts' second moments were not kept when they were trained"}
"""Methods that the demo's experts cannot show, and why."""
GRID: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "task_arithmetic": ({"lambda": 0.3}, {"lambda": 0.5}),
    "ties": ({"lambda": 0.7}, {"density": 0.5}, {"preset": "fusion_bench"}),
    "dare_linear": ({"density": 0.5}, {"preset": "fusion_bench"}),
    "dare_ties": ({"lambda": 0.7}, {"preset": "mergekit", "density": 0.5, "lambda": 0.3}),
    "breadcrumbs": ({"density": 0.5, "lambda": 0.4}, {"density": 0.85, "lambda": 0.3}),
    "breadcrumbs_ties": ({"lambda": 0.4},),
    "della": ({"lambda": 0.5}, {"density": 0.5}),
    "della_linear": ({"lambda": 0.5},),
    "sce": ({"select_topk": 0.5}, {"merged": "all"}),
    "consensus": ({"lambda": 0.25}, {"lambda": 0.7}),
    "emr": ({"lambda": 0.5}, {"lambda": 0.7}),
    "magmax": ({"lambda": 0.7}, {"lambda": 1.0}),
    "pcb": ({"preset": "vision"}, {"density": 0.3}),
    "iso_c": ({"lambda": 0.5}, {"lambda": 1.5}),
    "iso_cts": ({"lambda": 0.5}, {"lambda": 1.5}),
    "tsv_m": ({"lambda": 0.5}, {"lambda": 0.7}),
    "doge_ta": ({"lambda": 0.3},),
    "drm": ({"lambda": 0.5},),
    "wudi": ({"unit": "rms"},),
    "knots": ({"lambda": 1.0},),
    "tatr": ({"lambda": 0.5},),
    "opcm": ({"alpha": 0.8},),
    "svc": ({"lambda": 0.5},),
}


@dataclass(frozen=True)
class Trial:
    """One merge: the method, its parameters, the experts, and whether they are taken as adapters."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] = FOUR
    adapters: bool = False

    @property
    def name(self) -> str:
        """A text that is the same for the same merge."""
        written = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return f"{self.method} {written}".strip()


def trials() -> Iterator[Trial]:
    """List all merges, method by method."""
    for name, method in methods().items():
        if name not in NOT_RUN:
            yield from (_trial(method, parameters) for parameters in ({}, *GRID.get(name, ())))


def _trial(method: Method, parameters: Mapping[str, Any]) -> Trial:
    most = method.n_inputs[1] or len(FOUR)
    experts = {1: ONE, 2: PAIR}.get(most, FOUR)
    return Trial(method.name, parameters, experts, method.space == "adapter")
