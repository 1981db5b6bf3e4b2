"""A Mixture of Experts in the terminal: what is planned, and what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.cli.output import say
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.bundle.moe import MoeRecord
    from mediator_cli.pipeline.moe_report import Ends, MoeReport


def moe_rows(report: MoeReport) -> list[tuple[str, str]]:
    """Tell what a plan of kind moe will write."""
    shared = "averaged" if report.shared_from == "average" else f"copied from {report.shared_from}"
    layers = "all that the rule chooses" if report.layers[0] != report.layers[1] else ""
    return [
        ("format", f"{report.format}, all that is no expert {shared}"),
        ("experts", f"{', '.join(report.experts)}; {report.experts_per_token} for each token"),
        ("in layers", f"{_ends(report.layers)}{f', {layers} (rule {report.rule})' if layers else ''}"),
        ("gates", report.gates),
        ("parameters", f"{_millions(report.parameters)}, {_millions(report.active)} active for a token"),
        ("write", " to ".join(human_bytes(n) for n in dict.fromkeys(report.bytes))),
    ]


def _ends(ends: Ends) -> str:
    return " to ".join(str(n) for n in dict.fromkeys(ends))


def _millions(ends: Ends) -> str:
    return " to ".join(f"{n / 1e6:,.1f}M" for n in dict.fromkeys(ends))


def print_moe(place: str, manifest: Manifest, record: MoeRecord) -> None:
    """Print what a written MoE holds."""
    size, own = manifest.sizes.dense, manifest.sizes.full_models
    shared = "averaged" if record.shared_from == "average" else f"copied from {record.shared_from}"
    say(f"MoE           {place}")
    say(f"format        {record.format}; all that is no expert is {shared}")
    say(f"experts       {', '.join(record.experts)}; {record.experts_per_token} for each token")
    say(f"in layers     {_layers(record.layers)}")
    say(f"gates         {_gates(record)}")
    say(f"parameters    {record.n_parameters / 1e6:,.1f}M, {record.n_active / 1e6:,.1f}M active for a token")
    say(f"size          {human_bytes(size)}")
    say(f"against       {human_bytes(own)} for {len(manifest.experts)} full models ({size / max(1, own):.0%} of that)")


def _gates(record: MoeRecord) -> str:
    right, which = record.gates.agreement, "held-out tokens" if record.gates.held_out else "tokens"
    told = f", {sum(right.values()) / len(right):.0%} of {which} choose their own expert first" if right else ""
    return f"{record.gates.method}{told}"


def _layers(layers: tuple[int, ...]) -> str:
    """Write numbers as ranges.

    >>> _layers((0, 1, 2, 5, 7, 8))
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
