"""`mediator merge`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mediator_cli.cli.heterogeneous import Output, carried_out
from mediator_cli.cli.moe import print_moe
from mediator_cli.cli.options import (
    JsonOption,
    MemoryOption,
    OfflineOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    WorkersOption,
)
from mediator_cli.cli.output import Told, print_json, print_table, say, shown_folder
from mediator_cli.errors import OutputError, Problem
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.bundle.router_record import RouterRecord, RouterReport
    from mediator_cli.executors.place import Place
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan


def merge(
    recipe: RecipeArgument,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder or URL of the bundle; default: output.path of the recipe."),
    ] = None,
    conflicts: Annotated[
        Path | None, typer.Option("--conflicts", help="Reuse this conflicts.json instead of measuring.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that stands there.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted merge, from its last finished step.")
    ] = False,
    changes: SetOption = None,
    memory: MemoryOption = "2GiB",
    workers: WorkersOption = None,
    executor: Annotated[
        Literal["local", "rank", "ray"],
        typer.Option(
            "--executor",
            help="local: this process. rank: one of several that share a folder and run the same command. "
            "ray: workers on a Ray cluster.",
        ),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address", help="The Ray cluster, such as ray://host:10001; default: RAY_ADDRESS, or a cluster here."
        ),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option("--ray-workers", min=1, help="Workers on the Ray cluster; default: one a node.")
    ] = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Carry a recipe out: measure conflict, assign layers, average, extract experts, write the bundle."""
    from mediator_cli.bundle.manifest import read_manifest
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.cli.run import settings
    from mediator_cli.pipeline.documents import load_last
    from mediator_cli.pipeline.download import plan_with_unseen
    from mediator_cli.pipeline.upload import output_url

    if carried_out(
        recipe, changes or (), output, Output(overwrite, offline, as_json, quiet),
        {"--conflicts": conflicts, "--resume": resume, "--executor": executor != "local"},
    ):  # fmt: skip
        return
    _check_executor(executor, address, ray_workers)
    place, patience = _place() if executor == "rank" else (None, 0.0)
    told = Told(quiet)
    with shown_progress(quiet) as progress:
        run = settings(memory, workers, overwrite=overwrite, resume=resume, progress=progress, notify=told.tell)
        loaded = load_last(recipe, changes or (), output, Access(offline), run, alone=executor == "local")
        made = plan_with_unseen(loaded, Access(offline), progress)
    _check_adapters(made, executor)
    url = _check_url(output_url(made, output), executor, offline=offline)
    told.tell(*made.notices)
    if made.router is not None or made.moe is not None:
        quiet_transformers()
    started = time.monotonic()
    with shown_progress(quiet) as progress:
        run = settings(memory, workers, overwrite=overwrite, resume=resume, progress=progress, notify=told.tell)
        if executor == "ray":
            folder = _on_ray(made, output, conflicts, run, (address, ray_workers, workers, offline))
        else:
            folder = _here(made, output, conflicts, run, place, patience)
    if place is not None and place.rank:
        _print_part(folder, place, as_json=as_json, quiet=quiet)
        return
    if made.modules:
        _print_adapter(folder, time.monotonic() - started, as_json=as_json, quiet=quiet)
        return
    manifest = read_manifest(folder)
    told.tell(*manifest.notices)
    shown = url or shown_folder(folder)
    if as_json:
        print_json(summary(url or str(folder), manifest, time.monotonic() - started))
    elif not quiet:
        _print(shown, manifest, time.monotonic() - started)


def _check_executor(executor: str, address: str | None, ray_workers: int | None) -> None:
    given = {"--address": address, "--ray-workers": ray_workers}
    wrong = [name for name, value in given.items() if value is not None and executor != "ray"]
    if wrong:
        message = "is for --executor ray alone"
        raise OutputError([Problem(name, message, "add --executor ray, or leave it out") for name in wrong])


def _check_adapters(plan: Plan, executor: str) -> None:
    if plan.modules and executor != "local":
        raise OutputError(Problem("--executor", "adapters are small: one process merges them", "leave it out"))


def _check_url(url: str | None, executor: str, *, offline: bool) -> str | None:
    """Refuse what a bundle at a URL cannot be made with."""
    if url is not None and executor != "local":
        message = "several processes write into a shared folder, not to a URL"
        raise OutputError(Problem("--output", message, "merge into a folder, then copy it"))
    if url is not None and offline:
        raise OutputError(Problem("--output", "a URL cannot be written with --offline", "choose a folder"))
    return url


def _place() -> tuple[Place, float]:
    from mediator_cli.executors.place import find_patience, find_place

    return find_place(os.environ), find_patience(os.environ)


def _here(
    plan: Plan, output: str | None, conflicts: Path | None, run: Settings, place: Place | None, patience: float
) -> Path:
    """Merge in this process, alone or as one of several."""
    from mediator_cli.pipeline.merge import merge as carry_out

    if place is not None:
        from mediator_cli.executors.rank import share_merge

        run = share_merge(plan, run, place, patience)
    return carry_out(plan, output, conflicts, run)


def _on_ray(
    plan: Plan,
    output: str | None,
    conflicts: Path | None,
    run: Settings,
    given: tuple[str | None, int | None, int | None, bool],
) -> Path:
    """Merge on a Ray cluster that sees the same folders."""
    from mediator_cli.executors.place import find_patience
    from mediator_cli.executors.ray_job import Cluster, Job, merge_on_ray
    from mediator_cli.pipeline.settings import output_folder

    address, ray_workers, threads, offline = given
    folder, loaded = output_folder(plan, output), plan.loaded
    job = Job(
        recipe=loaded.path.absolute(),
        text=loaded.text,
        changes=loaded.changes,
        output=folder,
        conflicts=None if conflicts is None else conflicts.absolute(),
        overwrite=run.overwrite,
        resume=run.resume,
        memory=run.memory,
        threads=threads,
        offline=offline,
        patience=find_patience(os.environ),
    )
    merge_on_ray(job, Cluster(address, ray_workers), run.notify)
    return folder


def _print_adapter(folder: Path, seconds: float, *, as_json: bool, quiet: bool) -> None:
    from mediator_cli.cli.adapters import adapter_summary, print_adapter

    summary = adapter_summary(folder, seconds)
    if as_json:
        print_json(summary)
    elif not quiet:
        print_adapter(shown_folder(folder), summary)


def _print_part(folder: Path, place: Place, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({"bundle": str(folder), "rank": place.rank, "world": place.world})
    elif not quiet:
        say(f"process {place.rank} of {place.world} has done its part; process 0 finishes {shown_folder(folder)}")


def summary(place: str, manifest: Manifest, seconds: float) -> dict[str, object]:
    """Gather what another program wants to know of a finished merge."""
    report = manifest.router.report if manifest.router else None
    return {
        "bundle": place,
        "digest": manifest.digest,
        "assignment": manifest.assignment,
        "scores": manifest.conflict.scores if manifest.conflict else None,
        "moe": manifest.moe.model_dump(mode="json") if manifest.moe else None,
        "router": report.model_dump(mode="json") if report else None,
        "sizes": manifest.sizes.model_dump(),
        "seconds": round(seconds, 2),
    }


def _print(place: str, manifest: Manifest, seconds: float) -> None:
    print_bundle(place, manifest)
    say(f"written in {seconds:.1f} s, digest {manifest.digest}")
    more = "gates" if manifest.moe else "inspect"
    say(f"Next: mediator {more} {place}   ·   mediator verify {place}")


def print_bundle(place: str, manifest: Manifest) -> None:
    """Print the assignment of every unit, what each expert keeps, and the sizes; of an MoE, its experts."""
    if manifest.moe is not None:
        print_moe(place, manifest, manifest.moe)
        return
    scores = manifest.conflict.scores if manifest.conflict else {}
    is_low_rank = manifest.extract is not None and manifest.extract.mode == "factors"
    kept, say_kept = ("changed by", _changers) if is_low_rank else ("energy kept by each sparse expert", _energy)
    rows = [
        (unit, decision, f"{scores[unit]:.3f}" if unit in scores else "", say_kept(manifest, unit))
        for unit, decision in manifest.assignment.items()
    ]
    if manifest.sparse:
        print_table(("unit", "assignment", "conflict#", kept), rows)
    if manifest.router is not None:
        print_table(("router", "value"), router_rows(manifest.router))
    sizes, n_routed = manifest.sizes, list(manifest.assignment.values()).count("route")
    total = sizes.dense + sizes.sparse
    say(f"bundle        {place}")
    say(f"units         {len(manifest.assignment) - n_routed} averaged, {n_routed} routed")
    how = "low-rank" if is_low_rank else "sparse"
    say(f"size          {human_bytes(total)} = {human_bytes(sizes.dense)} dense + {human_bytes(sizes.sparse)} {how}")
    if not manifest.experts:
        return
    say(
        f"against       {human_bytes(sizes.full_models)} for {len(manifest.experts)} full models "
        f"({total / max(1, sizes.full_models):.0%} of that)"
    )


def router_rows(router: RouterRecord) -> list[tuple[str, str]]:
    """Tell what a router reads, how it decides and how often it is right."""
    policy = router.policy
    if router.features == "none":
        return [("reads", "nothing: every prompt gets the same mixture"), *_blind_rows(router)]
    layers = f" after {router.layer} layers" if router.layer else ""
    asked = f" of the {'last turn' if router.reads == 'turn' else 'whole prompt'}" if router.asks else ""
    form = f" ({router.form})" if router.form else ""
    given = {"uncertainty": ("sure", "cover"), "top_k": ("k",), "fixed": ("weights",)}.get(policy.rule, ())
    parameters = ", ".join(f"{name}={getattr(policy, name)}" for name in given)
    return [
        ("reads", f"{router.features}{asked}{layers}, {router.size} features"),
        ("classifier", f"{router.classifier}{form}, temperature {router.temperature:.3g}"),
        ("policy", f"{policy.rule}({parameters}), outside: {policy.outside}"),
        *([] if policy.combine == "parameters" else [("combined", f"{policy.combine} of experts that run apart")]),
        *([] if router.outside_above is None else [("outside above", f"{router.outside_above:.3g}")]),
        *_report_rows(router.report),
    ]


def _blind_rows(router: RouterRecord) -> list[tuple[str, str]]:
    weights = router.policy.weights or dict.fromkeys(router.experts, 1 / len(router.experts))
    rows = [("mixture", " + ".join(f"{name} {weight:.3g}" for name, weight in weights.items() if weight))]
    combine = router.policy.combine
    return rows if combine == "parameters" else [*rows, ("combined", f"{combine} of experts that run apart")]


def _report_rows(report: RouterReport | None) -> list[tuple[str, str]]:
    if report is None:
        return [("right on", "not measured, for want of prompts")]
    return [
        *([("fitted on", f"{report.n_fitted} prompts")] if report.n_fitted else []),
        ("right on", f"{report.accuracy:.1%} of {report.n_held_out} held-out prompts"),
        ("calibration", f"error {report.calibration_error:.3f}, log loss {report.log_loss:.3f}"),
    ]


def _changers(manifest: Manifest, unit: str) -> str:
    """Count the adapters that change a unit: each of them keeps all of its change."""
    count = sum(unit in record.units for record in manifest.sparse)
    return f"{count} of {len(manifest.experts)} experts" if count else ""


def _energy(manifest: Manifest, unit: str) -> str:
    return "  ".join(f"{s.expert} {s.units[unit].energy:.2f}" for s in manifest.sparse if unit in s.units)
