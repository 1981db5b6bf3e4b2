"""What `add-expert` and `remove-expert` tell of a bundle before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.cli.output import print_json, print_table, say, shown_folder
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.pipeline.change.run import Changed


def print_change(folder: Path, changed: Changed, seconds: float, *, as_json: bool, quiet: bool) -> None:
    """Print what became of a bundle, as JSON or as a table of before and after."""
    if as_json:
        print_json(change_summary(folder, changed, seconds))
    elif not quiet:
        _print(folder, changed, seconds)


def change_summary(folder: Path, changed: Changed, seconds: float) -> dict[str, Any]:
    """Gather what another program wants to know of a change."""
    record = changed.after.history[-1]
    return {
        "bundle": str(folder),
        "change": record.change,
        "expert": record.source.name,
        "energy_kept": changed.energy,
        "router": record.router,
        "before": _facts(changed.before),
        "after": _facts(changed.after),
        "notices": list(changed.notices),
        "seconds": round(seconds, 2),
    }


def _facts(manifest: Manifest) -> dict[str, Any]:
    router = manifest.router
    report = router.report.model_dump(mode="json") if router is not None and router.report is not None else None
    return {
        "digest": manifest.digest,
        "experts": [source.name for source in manifest.experts],
        "sizes": manifest.sizes.model_dump(),
        "router": {"classifier": router.classifier, "temperature": router.temperature, "report": report}
        if router is not None
        else None,
    }


def _print(folder: Path, changed: Changed, seconds: float) -> None:
    record, both = changed.after.history[-1], (changed.before, changed.after)
    rows = [
        ("experts", *(", ".join(source.name for source in manifest.experts) for manifest in both)),
        ("sparse experts", *(human_bytes(manifest.sizes.sparse) for manifest in both)),
        ("dense expert", *(human_bytes(manifest.sizes.dense) for manifest in both)),
        ("router right on", *(_accuracy(manifest) for manifest in both)),
        ("digest", *(manifest.digest[:12] for manifest in both)),
    ]
    print_table(("", "before", "after"), rows)
    if changed.energy is not None:
        say(f"kept          {changed.energy:.1%} of how {record.source.name} differs from the dense expert (squares)")
    say(f"router        {record.router}")
    say(f"{record.change:<13} {record.source.name} in {seconds:.1f} s")
    place = shown_folder(folder)
    say(f'Next: mediator verify {place}   ·   mediator route {place} "a prompt"')


def _accuracy(manifest: Manifest) -> str:
    router = manifest.router
    if router is None:
        return "no router"
    if router.report is None:
        return "not measured"
    return f"{router.report.accuracy:.1%} of {router.report.n_held_out} held-out prompts"
