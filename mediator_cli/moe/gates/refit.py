"""Make the gates of a finished Mixture of Experts anew, and find out what its experts are called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.bundle.manifest import MANIFEST, read_manifest
from mediator_cli.bundle.moe import GatesRecord
from mediator_cli.bundle.retouch import check_new, retouch
from mediator_cli.checkpoint.header import read_json, read_tensors
from mediator_cli.checkpoint.moe_layout import moe_layout
from mediator_cli.errors import Problem, RecipeError
from mediator_cli.moe.gates.fit import fit_gates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.moe.gates.report import GateFit, GateReport
    from mediator_cli.moe.gates.settings import GateSettings
    from mediator_cli.plan.moe_plan import ExpertPrompts


def expert_names(folder: Path, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Name the experts of an MoE in the order of its gates' rows: as given, or as its manifest says.

    Empty where neither names them. Raises CheckpointError where the folder is no MoE, RecipeError where the names
    given are not as many as its experts.
    """
    n_experts = len(_numbers(folder))
    noted = manifest_of(folder)
    known = noted.moe.experts if noted and noted.moe else ()
    names = tuple(given) or (known if len(known) == n_experts else ())
    if names and (len(names) != n_experts or len(set(names)) != len(names)):
        message = f"has {n_experts} experts; these are named: {', '.join(names)}"
        raise RecipeError(Problem(str(folder), message, "name each expert once, in the order of their numbers"))
    return names


def _numbers(folder: Path) -> tuple[str, ...]:
    layout = moe_layout(str(folder), read_json(folder / "config.json"), read_tensors(folder))
    return tuple(map(str, range(layout.n_experts)))


def manifest_of(folder: Path) -> Manifest | None:
    """Read the manifest of an MoE that this program wrote; None where there is none."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def refit_gates(
    folder: Path,
    target: Path,
    prompts: Mapping[str, ExpertPrompts],
    settings: GateSettings,
    *,
    names: Sequence[str],
    base: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> GateFit:
    """Make the gates of an MoE anew and write them to `target`, a new folder or the same one.

    `names` are the experts in the order of the gates' rows; none: their numbers. A manifest is renewed: digests, and
    how the gates were made. Raises as `fit_gates` and `retouch` do, before anything is written.
    """
    if target.resolve() != folder.resolve():
        check_new(folder, target)
    fit = fit_gates(folder, base, prompts, tuple(names) or _numbers(folder), settings, progress)
    note = f"gates made anew with method {settings.method}"
    retouch(folder, target, fit.gates, note=note, describe=lambda old: _described(old, fit.report))
    return fit


def gates_record(report: GateReport) -> GatesRecord:
    """Say in a manifest how gates were made."""
    return GatesRecord(
        method=report.method,
        temperature=report.temperature,
        n_prompts=report.n_prompts,
        held_out=report.held_out,
        agreement={str(each.layer): round(each.agreement, 6) for each in report.layers if each.agreement is not None},
    )


def _described(old: Manifest, report: GateReport) -> Manifest:
    if old.moe is None:
        return old
    return old.model_copy(update={"moe": old.moe.model_copy(update={"gates": gates_record(report)})})
