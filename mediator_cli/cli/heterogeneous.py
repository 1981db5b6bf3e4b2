"""What `validate`, `plan` and `merge` do with a recipe of kind `heterogeneous_moe`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.cli.output import Told, print_json, print_notices, print_table, say, shown_folder
from mediator_cli.errors import OutputError, Problem
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.pipeline.heterogeneous.model import HeterogeneousPlan
    from mediator_cli.pipeline.heterogeneous.report import HeterogeneousReport


def make_plan(recipe: Path, changes: Sequence[str], *, offline: bool) -> HeterogeneousPlan:
    """Plan a recipe of this kind."""
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.pipeline.heterogeneous.make import plan_heterogeneous
    from mediator_cli.recipe.heterogeneous import load_heterogeneous

    loaded = load_heterogeneous(recipe, changes)
    quiet_transformers()
    return plan_heterogeneous(loaded, Access(offline))


def validate_heterogeneous(recipe: Path, changes: Sequence[str], *, offline: bool, as_json: bool) -> None:
    """Say that a recipe is valid; raise MediatorError when it is not."""
    plan = make_plan(recipe, changes, offline=offline)
    if as_json:
        print_json({"valid": True, "problems": [], "notices": list(plan.notices)})
        return
    print_notices(plan.notices)
    say(f"{recipe} is valid: {len(plan.experts)} experts, {len(plan.tensors)} tensors, {plan.n_tokens} tokens.")
    say(f"Next: mediator plan {recipe}")


def show_plan(recipe: Path, changes: Sequence[str], output: Path | None, *, offline: bool, as_json: bool) -> None:
    """Show what a merge would write."""
    from mediator_cli.pipeline.heterogeneous.report import describe_heterogeneous

    report = describe_heterogeneous(make_plan(recipe, changes, offline=offline), output)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    print_notices(report.notices)
    _print(report)
    say(f"Next: mediator merge {recipe}")


def _print(report: HeterogeneousReport) -> None:
    far = ", ".join(f"{e.name} {human_bytes(e.download_bytes)}" for e in report.experts if e.download_bytes)
    print_table(
        ("expert", "architecture", "width#", "parameters#", "tokens known#"),
        [(e.name, e.architecture, str(e.width), _count(e.parameters), f"{e.tokens_known:,}") for e in report.experts],
    )
    head = "one matrix for both" if report.tied else "a matrix each"
    rows = [
        ("shared", f"embedding and head, {head}: {report.tokens:,} tokens of {report.tokenizer}, {report.width} wide"),
        ("projectors", report.projectors),
        ("router", f"{report.router}, {report.top_k} of {len(report.experts)} experts for each prompt"),
        ("parameters", f"{_count(report.parameters)}, at most {_count(report.active_parameters)} for a prompt"),
        ("download", far or "nothing"),
        ("read", human_bytes(report.read_bytes)),
        ("write", f"{human_bytes(report.write_bytes)}, {report.dtype}"),
        ("free disk", f"{human_bytes(report.free_disk)} at {report.output}"),
    ]
    print_table(("what", "value"), rows)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


@dataclass(frozen=True)
class Output:
    """Whether a folder that stands there is replaced, the Hub is asked, and how it is told what was written."""

    overwrite: bool
    offline: bool
    as_json: bool
    quiet: bool


def carried_out(
    recipe: Path, changes: Sequence[str], output: str | None, how: Output, refused: Mapping[str, object]
) -> bool:
    """Write the model of a recipe, if it is of this kind, and say what was written; tell whether it was.

    Raises OutputError for options of `merge` in `refused` that mean nothing here.
    """
    from mediator_cli.recipe.heterogeneous import is_heterogeneous_recipe

    if not is_heterogeneous_recipe(recipe, changes):
        return False
    message = "does not go with a recipe of kind heterogeneous_moe"
    if problems := [Problem(name, message, "leave it out") for name, value in refused.items() if value]:
        raise OutputError(problems)
    _carry_out(recipe, changes, output, how)
    return True


def _carry_out(recipe: Path, changes: Sequence[str], output: str | None, how: Output) -> None:
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.pipeline.heterogeneous.report import describe_heterogeneous
    from mediator_cli.pipeline.heterogeneous.write import merge_heterogeneous
    from mediator_cli.pipeline.settings import Settings

    started, told = time.monotonic(), Told(how.quiet)
    plan = make_plan(recipe, changes, offline=how.offline)
    told.tell(*plan.notices)
    with shown_progress(how.quiet) as progress:
        folder, notices = merge_heterogeneous(plan, output, Settings(overwrite=how.overwrite, progress=progress))
    report, seconds = describe_heterogeneous(plan, folder), time.monotonic() - started
    if how.as_json:
        facts = {"parameters": report.parameters, "bytes": report.write_bytes, "notices": [*plan.notices, *notices]}
        print_json({"model": str(folder), **facts, "seconds": round(seconds, 2)})
    elif not how.quiet:
        _print_written(folder, report, notices, seconds)


def _print_written(folder: Path, report: HeterogeneousReport, notices: Sequence[str], seconds: float) -> None:
    place = shown_folder(folder)
    say(f"model         {place}")
    say(f"experts       {', '.join(f'{e.name} ({e.architecture}, {_count(e.parameters)})' for e in report.experts)}")
    say(f"size          {human_bytes(report.write_bytes)}, {_count(report.parameters)} parameters")
    for notice in notices:
        say(f"router        {notice}")
    say(f"written in {seconds:.1f} s")
    say(f"Next: mediator train {place} --what projectors --rows TASK=FILE … -o TRAINED")
