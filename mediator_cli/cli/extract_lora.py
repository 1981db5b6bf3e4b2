"""`mediator extract-lora`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mediator_cli.cli.options import JsonOption, MemoryOption, OfflineOption, QuietOption, WorkersOption
from mediator_cli.cli.output import Told, print_json, print_table, say
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mediator_cli.pipeline.extraction import ChangeReport, ExtractionReport, MatrixReport

_RANK = 16
_SHOWN = 12


def extract_lora(
    base: Annotated[
        str,
        typer.Argument(help="The base: a folder, or org/name@revision.", metavar="BASE", show_default=False),
    ],
    model: Annotated[
        str,
        typer.Argument(
            help="Its fine-tune, or an adapter that shall become a plain one.", metavar="MODEL", show_default=False
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the adapter.", show_default=False)],
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Rank of each matrix, at most; default 16, no limit with --energy."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", min=0.0, max=1.0, help="Take the least rank that holds this share of a change (squared)."
        ),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Also what has a row per token: embeddings and head.")
    ] = False,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="GLOB", help="Only tensors of such names; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="No tensors of such names; repeatable.")
    ] = None,
    save_modules: Annotated[
        bool,
        typer.Option("--save-modules", help="Store changed norms and biases whole, which factors cannot carry."),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="How numbers are stored.")
    ] = "float32",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the random sketches.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that stands there.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Show every matrix.")] = False,
    memory: MemoryOption = "2GiB",
    workers: WorkersOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a LoRA adapter of a fine-tune: the nearest low-rank change of each matrix, and how much of it that holds."""
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.output import shown_folder
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.cli.run import settings
    from mediator_cli.errors import OutputError, Problem
    from mediator_cli.pipeline.carried import Choice
    from mediator_cli.pipeline.extract_lora import extract_lora as carry_out
    from mediator_cli.pipeline.extraction import Job

    if energy is not None and energy <= 0:
        raise OutputError(Problem("--energy", "must be more than 0", "write for example --energy 0.9"))
    job = Job(
        base=base,
        model=model,
        rank=rank or (0 if energy is not None else _RANK),
        energy=1.0 if energy is None else energy,
        choice=Choice(tuple(include or ()), tuple(exclude or ()), embeddings),
        save_modules=save_modules,
        dtype=dtype,
        seed=seed,
    )
    told, started = Told(quiet), time.monotonic()
    with shown_progress(quiet) as progress:
        run = settings(memory, workers, overwrite=overwrite, progress=progress, notify=told.tell)
        report = carry_out(job, output, run, Access(offline))
    told.tell(*report.notices)
    seconds = round(time.monotonic() - started, 2)
    if as_json:
        print_json({**report.model_dump(mode="json"), "seconds": seconds})
    elif not quiet:
        _print(report, shown_folder(Path(output)), seconds, tensors=tensors)


def _print(report: ExtractionReport, place: str, seconds: float, *, tensors: bool) -> None:
    if tensors:
        rows = [(m.tensor, _shape(m), str(m.rank), f"{m.size:.2%}", f"{m.energy:.3f}") for m in report.matrices]
        print_table(("matrix", "shape", "rank#", "change#", "energy held#"), rows)
    else:
        print_table(("matrices", "number#", "rank#", "change#", "energy held#"), list(_by_kind(report.matrices)))
    _print_changes("changed and stored whole", report.saved)
    _print_changes("changed, and not in the adapter", report.not_carried)
    say(f"adapter       {place}")
    say(f"matrices      {len(report.matrices)} with factors; {report.unchanged} tensors are the base's")
    if report.left_out:
        say(f"left out      {report.left_out} tensors, by --include and --exclude")
    say(f"energy held   {report.energy:.1%} of all changes of these matrices")
    say(f"size          {human_bytes(report.bytes)}")
    say(f"written in {seconds:.1f} s")
    say(f"Next: mediator inspect {place}   ·   name it as an expert of a recipe")


def _by_kind(matrices: Iterable[MatrixReport]) -> Iterable[tuple[str, ...]]:
    from mediator_cli.checkpoint.layout import place_of

    kinds: dict[str, list[MatrixReport]] = {}
    for matrix in matrices:
        kinds.setdefault(place_of(matrix.tensor).kind, []).append(matrix)
    for kind, own in kinds.items():
        ranks = sorted(matrix.rank for matrix in own)
        held = sorted(matrix.energy for matrix in own)
        mean = sum(matrix.size for matrix in own) / len(own)
        rank = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        yield kind, str(len(own)), rank, f"{mean:.2%}", f"{held[0]:.3f} to {held[-1]:.3f}"


def _shape(matrix: MatrixReport) -> str:
    return " × ".join(map(str, matrix.shape))


def _print_changes(title: str, changes: tuple[ChangeReport, ...]) -> None:
    if not changes:
        return
    rows = [(change.tensor, f"{change.size:.2%}", change.reason) for change in changes[:_SHOWN]]
    if len(changes) > _SHOWN:
        rows.append((f"… and {len(changes) - _SHOWN} more", "", "--json lists them"))
    print_table(("tensor", "change#", "why"), rows, title=title)
