"""What `plan` and `merge` print where adapters are merged into an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.cli.output import print_table, say
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from mediator_cli.pipeline.adapter_plan import AdapterPlanReport


def print_adapter_plan(report: AdapterPlanReport) -> None:
    """Print what merging adapters would read and write."""
    downloads = ", ".join(f"{name} {human_bytes(n)}" for name, n in report.download_bytes.items())
    rows = [
        ("output", f"an adapter: {report.n_modules} modules, {report.dtype}"),
        ("ranks", "; ".join(f"{name} {_ends(*ends)}" for name, ends in report.ranks.items())),
        ("weights", "; ".join(f"{name} {_ends(*ends)}" for name, ends in report.weights.items())),
        ("download", downloads or "nothing"),
        ("read", f"{human_bytes(report.read_bytes)} of the adapters, nothing of the base"),
        ("write", f"{human_bytes(report.written_bytes)} at most"),
        ("peak memory", f"about {human_bytes(report.peak_memory)} with {report.workers} workers"),
        ("free disk", f"{human_bytes(report.free_disk)} at {report.output}"),
    ]
    print_table(("what", "value"), rows)
    print_table(
        ("method", "tensors#", "parameters"),
        [(m.method, str(m.n_tensors), ", ".join(f"{k}={v}" for k, v in m.parameters.items())) for m in report.methods],
    )


def adapter_summary(folder: Path, seconds: float) -> dict[str, Any]:
    """Gather what another program wants to know of a finished adapter."""
    from mediator_cli.bundle.adapter import ADAPTER_MANIFEST
    from mediator_cli.checkpoint.header import read_json

    manifest = read_json(folder / ADAPTER_MANIFEST)
    return {
        "adapter": str(folder),
        "digest": manifest["digest"],
        "modules": {name: record["rank"] for name, record in manifest["modules"].items()},
        "bytes": sum(file["bytes"] for file in manifest["files"]),
        "seconds": round(seconds, 2),
    }


def print_adapter(place: str, summary: dict[str, Any]) -> None:
    """Print a finished adapter in a few lines."""
    ranks = summary["modules"].values()
    say(f"adapter       {place}")
    say(f"modules       {len(ranks)}, rank {_ends(min(ranks), max(ranks))}")
    say(f"size          {human_bytes(summary['bytes'])}")
    say(f"written in {summary['seconds']:.1f} s, digest {summary['digest']}")
    say(f"Next: mediator inspect {place}   ·   PeftModel.from_pretrained(BASE, '{place}')")


def _ends(least: float, most: float) -> str:
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"
