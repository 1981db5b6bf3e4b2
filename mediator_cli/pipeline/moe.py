"""A Mixture of Experts: which layers get experts, then gates and all else that no source has, behind the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.digest import digest_tensors
from mediator_cli.bundle.moe import MoeRecord
from mediator_cli.checkpoint.moe_layout import PROJECTIONS
from mediator_cli.checkpoint.read import narrow
from mediator_cli.checkpoint.write import create_file, shard_name, write_at
from mediator_cli.engine.team import Alone
from mediator_cli.errors import Problem, RecipeError
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.pipeline.assign import assign_plan
from mediator_cli.pipeline.conflicts import reuse_report, scores_by_measure
from mediator_cli.pipeline.survey import analyze_conflicts
from mediator_cli.plan.moe.check import block_unit
from mediator_cli.plan.moe.make import as_moe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.bundle.conflict_report import ConflictReport
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.moe.gates.report import GateFit
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan
    from mediator_cli.plan.moe_plan import MoePlan


@dataclass(frozen=True)
class Made:
    """The file of what no source has, the digests of its tensors, and what the manifest says of the MoE."""

    file: str
    digests: Mapping[str, str]
    record: MoeRecord
    notices: tuple[str, ...]


def decide_layers(plan: Plan, conflicts: Path | None, run: Settings) -> tuple[Plan, ConflictReport | None]:
    """Give the plan of the MoE, with experts in the layers that the rule chooses; conflict is measured if it asks.

    Raises RecipeError where the rule chooses none.
    """
    if plan.moe is None or plan.moe.layers is not None:
        return (as_moe(plan, plan.moe.layers or ()) if plan.moe else plan), None
    report = _report(plan, conflicts, run)
    decisions = assign_plan(plan, scores_by_measure(plan, report))
    units = [block_unit(layer, plan.loaded.recipe) for layer in range(len(plan.layers))]
    layers = [layer for layer, unit in enumerate(units) if decisions[unit] == "route"]
    if not layers:
        message = f"by rule {plan.loaded.recipe.assign.rule} no layer gets experts"
        hint = "`mediator analyze-conflicts` shows the scores; choose a lower limit, or rule all"
        raise RecipeError(Problem(plan.loaded.place("assign", "rule"), message, hint))
    return as_moe(plan, layers), report


def _report(plan: Plan, conflicts: Path | None, run: Settings) -> ConflictReport:
    if conflicts is not None:
        return reuse_report(plan, conflicts, {})
    # Who shares the work meets in the output's folder, which is not there yet; so each measures by itself.
    return analyze_conflicts(plan, replace(run, team=Alone()))


def made_file(n_shards: int) -> str:
    """Name the file of what no source has: the last, behind so many shards."""
    return shard_name(n_shards + 1, n_shards + 1)


def write_made(plan: Plan, moe: MoePlan, folder: Path, n_shards: int, run: Settings) -> Made:
    """Write gates, fitted on the experts' prompts, and what a format wants beside them; all other files stand there."""
    name = made_file(n_shards)
    infos = create_file(folder / name, moe.made, {"format": "pt"})
    _fill(folder / name, infos, _fixed(infos))
    if moe.format.name == "granitemoeshared":
        from mediator_cli.pipeline.neurons import write_neurons

        write_neurons(plan, moe, folder, infos, run)
    gates = _fit_gates(plan, moe, folder, run)
    _fill(folder / name, infos, gates.gates)
    return Made(name, digest_tensors(infos, run.workers), _record(plan, moe, gates), gates.report.notices)


def _fixed(infos: Mapping[str, TensorInfo]) -> dict[str, Floats]:
    # llama.cpp divides by what the gate of the shared expert gives, so zeros there would make NaN.
    gates = [info for info in infos.values() if info.name.endswith("shared_expert_gate.weight")]
    return {info.name: np.ones(info.shape, np.float32) for info in gates}


def _fill(file: Path, infos: Mapping[str, TensorInfo], arrays: Mapping[str, Floats]) -> None:
    """Write whole tensors into a file that stands in its full size; raise OutputError where one does not fit."""
    with file.open("r+b") as stream:
        for name, array in arrays.items():
            info = infos[name]
            stored, _ = narrow(np.ascontiguousarray(array, np.float32).reshape(-1), info.dtype)
            write_at(stream.fileno(), file, bytes_of(stored), info.start)


def _fit_gates(plan: Plan, moe: MoePlan, folder: Path, run: Settings) -> GateFit:
    """Fit the gates by running the folder that was written, layer by layer; only here is torch imported."""
    from mediator_cli.moe.gates.fit import fit_gates
    from mediator_cli.moe.gates.settings import GateSettings

    spec = moe.gates
    seed = plan.loaded.recipe.seed
    settings = GateSettings(spec.method, spec.temperature, spec.strength, spec.chat, spec.prompts, seed)
    return fit_gates(folder, plan.base.path, moe.texts, moe.experts, settings, run.progress)


def _record(plan: Plan, moe: MoePlan, gates: GateFit) -> MoeRecord:
    from mediator_cli.moe.gates.refit import gates_record

    total, active = parameters(plan)
    return MoeRecord(
        format=moe.format.name,
        experts=moe.experts,
        experts_per_token=moe.top_k,
        layers=moe.layers or (),
        inner=moe.inner,
        shared_from=moe.spec.shared_from,
        n_parameters=total,
        n_active=active,
        gates=gates_record(gates.report),
    )


def parameters(plan: Plan) -> tuple[int, int]:
    """Count all parameters of an MoE, and those that a token passes through: its experts, and all that is shared."""
    moe = plan.moe
    if moe is None:
        raise RuntimeError("the plan makes no MoE")
    sizes = {tensor.name: tensor.size for tensor in plan.tensors}
    sizes |= {tensor.name: prod(tensor.shape) for tensor in moe.made}
    total, routed = sum(sizes.values()), 0
    for layer in moe.layers or ():
        if moe.format.expert:
            names = [
                moe.format.expert_of(layer, number, projection)
                for number in range(len(moe.experts))
                for projection in PROJECTIONS
            ]
        else:
            stem = f"model.layers.{layer}.block_sparse_moe"
            names = [f"{stem}.input_linear.weight", f"{stem}.output_linear.weight"]
        routed += sum(sizes[name] for name in names)
    return total, total - routed + routed * moe.top_k // len(moe.experts)
