"""What is timed: settings of our recipe, and what mergekit calls the same job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ROUTED_SHARE = 0.4
WEIGHT = {"weight": 1.0}
HALF = {"weight": 1.0, "density": 0.5}


@dataclass(frozen=True)
class Job:
    """Settings of one job; `peer` and `each` are mergekit's, for the whole and for each expert."""

    settings: tuple[str, ...]
    writes: bool = True
    peer: Mapping[str, object] | None = None
    each: Mapping[str, float] = field(default_factory=dict)
    has_base: bool = True
    slow: bool = True

    def command(self, program: Sequence[str], recipe: str, output: str, n_units: int) -> list[str]:
        """Write our command line; of a model with that many units, `{routed}` are routed."""
        routed = round(ROUTED_SHARE * n_units)
        changes = [part for setting in self.settings for part in ("--set", setting.format(routed=routed))]
        name = "merge" if self.writes else "analyze-conflicts"
        return [*program, name, recipe, "-o", output, "--quiet", *changes]

    def peer_recipe(self, base: str, experts: Sequence[str]) -> dict[str, object]:
        """Write mergekit's recipe; it writes bfloat16 as we do."""
        models = [{"model": expert, "parameters": dict(self.each)} for expert in experts]
        found = {"models": models, "dtype": "bfloat16", **(self.peer or {})}
        return found | ({"base_model": base} if self.has_base else {})


def merged(*settings: str) -> tuple[str, ...]:
    """Write settings of a plain merge."""
    return ("assign.rule=none", *(f"average.{setting}" for setting in settings))


def peer(method: str, **parameters: object) -> dict[str, object]:
    """Write mergekit's name of a method, and parameters of the whole."""
    return {"merge_method": method, "parameters": parameters}


JOBS = {
    "linear": Job(merged("method=linear"), peer=peer("linear"), each=WEIGHT, has_base=False, slow=False),
    "task_arithmetic": Job(
        merged("method=task_arithmetic", "lambda=0.25"),
        peer=peer("task_arithmetic", **{"lambda": 0.25}), each=WEIGHT, slow=False,
    ),
    "ties": Job(
        merged("method=ties", "preset=mergekit", "density=0.5"), peer=peer("ties", normalize=True), each=HALF
    ),
    "ties_paper": Job(merged("method=ties")),
    "dare_ties": Job(
        merged("method=dare_ties", "preset=mergekit", "density=0.5"), peer=peer("dare_ties"), each=HALF
    ),
    "breadcrumbs": Job(
        merged("method=breadcrumbs", "preset=mergekit", "density=0.9", "gamma=0.01"),
        peer=peer("breadcrumbs"), each={"weight": 1.0, "density": 0.9, "gamma": 0.01},
    ),
    "della": Job(
        merged("method=della", "preset=mergekit", "density=0.5", "epsilon=0.15"),
        peer=peer("della"), each={**HALF, "epsilon": 0.15},
    ),
    "sce": Job(merged("method=sce", "preset=mergekit", "select_topk=0.5"), peer=peer("sce", select_topk=0.5)),
    "analyze-conflicts": Job((), writes=False),
    "routed-40": Job(("assign.rule=top_k", "assign.k={routed}", "average.method=ties")),
    "routed-all": Job(("assign.rule=all", "extract.density=0.05", "extract.values=sign")),
}  # fmt: skip
"""By name; `ties` and later ones are set as mergekit sets them, `ties_paper` trims over the whole model."""

CURVE_JOBS = ("linear", "ties", "routed-40")
