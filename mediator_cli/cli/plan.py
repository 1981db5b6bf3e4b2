"""`mediator plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.heterogeneous import show_plan
from mediator_cli.cli.moe import moe_rows
from mediator_cli.cli.options import JsonOption, MemoryOption, OfflineOption, RecipeArgument, SetOption, WorkersOption
from mediator_cli.cli.output import console, print_json, print_notices, print_table, say
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from mediator_cli.pipeline.estimate import PlanReport
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan

_SHOWN, _LONG = 0.05, 100.0
"""Seconds below which a stage is not told of, and above which tenths are not."""


def plan(
    recipe: RecipeArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the bundle.")] = None,
    changes: SetOption = None,
    memory: MemoryOption = "2GiB",
    workers: WorkersOption = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Measure this machine anew, or leave the time out; default: measure once, and remember it.",
            show_default=False,
        ),
    ] = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a merge would do: layers, time, bytes, memory, parameters, and which source wins where they differ."""
    from mediator_cli.checkpoint.hub.collections import collection_lister
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.run import settings
    from mediator_cli.pipeline.estimate import describe_plan
    from mediator_cli.pipeline.moe_report import describe_moe, widest_moe
    from mediator_cli.pipeline.routable import check_routing
    from mediator_cli.pipeline.settings import output_folder
    from mediator_cli.plan.make import make_plan
    from mediator_cli.recipe.heterogeneous import is_heterogeneous_recipe
    from mediator_cli.recipe.load import load_partly

    if is_heterogeneous_recipe(recipe, changes or ()):
        show_plan(recipe, changes or (), output, offline=offline, as_json=as_json)
        return
    access = Access(offline)
    made = check_routing(make_plan(load_partly(recipe, changes or (), collection_lister(access)), access))
    run = settings(memory, workers)
    moe = describe_moe(made) if made.moe else None
    made = widest_moe(made) if made.moe else made
    if made.modules:
        _plan_adapter(made, output, run, recipe, as_json=as_json)
        return
    # What cannot be done is told before anything is measured.
    report = describe_plan(made, output, run, moe=moe)
    if calibrate is not False:
        from mediator_cli.pipeline.calibrate import constants_for, likely_cache

        constants = constants_for(made, output_folder(made, output), _tell, anew=calibrate is True)
        report = describe_plan(made, output, run, constants, likely_cache(made), moe)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    print_notices(report.notices)
    _print(report)
    say(f"Next: mediator merge {recipe}")


def _plan_adapter(made: Plan, output: Path | None, run: Settings, recipe: Path, *, as_json: bool) -> None:
    from mediator_cli.cli.adapters import print_adapter_plan
    from mediator_cli.pipeline.adapter_plan import describe_adapter_plan

    report = describe_adapter_plan(made, output, run)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    print_notices(report.notices)
    print_adapter_plan(report)
    say(f"Next: mediator merge {recipe}")


def _tell(text: str) -> None:
    console(stderr=True).print(text, markup=False)


def _print(report: PlanReport) -> None:
    rows = [
        ("layers", f"{report.n_layers} ({report.n_units} units, {report.n_tensors} tensors)"),
        *([] if report.moe else [("assignment", report.assignment)]),
        ("settings", "; ".join(f"{what} from {who}" for what, who in report.settings_from.items())),
        ("download", _downloads(report.download_bytes)),
        ("read", f"{human_bytes(sum(report.read_bytes.values()))}: " + _stages(report.read_bytes)),
        *_written(report),
        *_times(report),
        ("peak memory", f"about {human_bytes(report.peak_memory)} with {report.workers} workers"),
        ("free disk", f"{human_bytes(report.free_disk)} at {report.output}"),
    ]
    if any(ends != (1.0, 1.0) for ends in report.weights.values()):
        rows.insert(2, ("weights", "; ".join(f"{name} {_ends(*ends)}" for name, ends in report.weights.items())))
    print_table(("what", "value"), rows)
    print_table(
        ("method", "tensors#", "parameters"),
        [(m.method, str(m.n_tensors), _parameters(m.parameters)) for m in report.methods],
    )
    if report.differences:
        cells = [(d.setting, d.winner, _short(d.value), _others(d.others)) for d in report.differences]
        print_table(("setting", "winner", "value", "others"), cells, title="where the sources differ")
    else:
        say("config, generation config, tokenizer and chat template are the same in all sources.\n")


def _written(report: PlanReport) -> list[tuple[str, str]]:
    if report.moe is not None:
        return moe_rows(report.moe)
    return [("write", f"{human_bytes(report.dense_bytes)} dense + {_range(report)} sparse experts")]


def _times(report: PlanReport) -> list[tuple[str, str]]:
    """Tell the seconds of each stage, and what they take for granted."""
    if report.seconds is None:
        return []
    stages = {name: stage.warm if report.sources_are == "warm" else stage.cold for name, stage in report.stages.items()}
    told = ", ".join(f"{name} {_seconds(*ends)}" for name, ends in stages.items() if ends and ends[1] >= _SHOWN)
    where = "in memory" if report.sources_are == "warm" else "read from the disk"
    return [("time", f"about {_seconds(*report.seconds)}, sources {where}: {told}")]


def _seconds(least: float, most: float) -> str:
    digits = 0 if most >= _LONG else 1
    low, high = f"{least:.{digits}f}", f"{most:.{digits}f}"
    return f"{low} s" if low == high else f"{low} to {high} s"


def _downloads(by_source: dict[str, int]) -> str:
    if not by_source:
        return "nothing"
    return f"{human_bytes(sum(by_source.values()))}: {_stages(by_source)}"


def _ends(least: float, most: float) -> str:
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def _stages(read: dict[str, int]) -> str:
    return ", ".join(f"{stage} {human_bytes(n)}" for stage, n in read.items() if n)


def _range(report: PlanReport) -> str:
    low, high = report.sparse_bytes
    return f"about {human_bytes(low)}" if low == high else f"{human_bytes(low)} to {human_bytes(high)}"


def _parameters(parameters: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def _others(others: dict[str, object]) -> str:
    return "; ".join(f"{name}: {_short(value)}" for name, value in others.items())


def _short(value: object, limit: int = 48) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
