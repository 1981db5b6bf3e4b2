"""`mediator export`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mediator_cli.cli.evaluate import sorted_out
from mediator_cli.cli.export_request import Request, Target, checked, named_paths
from mediator_cli.cli.options import JsonOption, QuietOption
from mediator_cli.cli.output import Told, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

    from mediator_cli.export.lora import LoraJob
    from mediator_cli.export.settings import Run

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def export(
    names: Annotated[list[str], typer.Argument(help="A bundle.", metavar="DIR", show_default=False)],
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            help="dense: one checkpoint. lora, shira: an adapter an expert. moe: one Mixture of Experts. gguf: for "
            "llama.cpp. router: the router alone. vllm: all that vLLM needs, with its command.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the export.", show_default=False)],
    expert: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            metavar="NAME",
            help="dense, gguf: the model is this expert. Else this one alone; repeatable.",
            show_default=False,
        ),
    ] = None,
    mixture: Annotated[
        str | None,
        typer.Option("--mixture", metavar="A=0.7,B=0.3", help="dense, gguf: the model is this mixture."),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="dense, gguf: the dense expert alone, without the others.")
    ] = False,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", metavar="SIZE", help="dense: most bytes of a file; default 5GB.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="lora: rank of all matrices, made one that servers have; default 32."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="lora: the least such rank that holds this share of every expert's change."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            metavar="NAME=DIR",
            help="lora: where the model of an expert (or `base`) lies now; repeatable. Default: as the bundle notes.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="lora: how numbers are stored; default: as the dense model's."),
    ] = None,
    warn_below: Annotated[
        float | None,
        typer.Option("--warn-below", help="lora: share of a layer's change below which you are warned; default 0.5."),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            "--tasks", metavar="FILE…", help="lora: rows of prompt and answer, named like experts, to measure on."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="First rows of each task.")] = None,
    max_adapters: Annotated[
        int | None, typer.Option("--max-adapters", min=1, help="shira: refuse experts that need more to be exact.")
    ] = None,
    architecture: Annotated[
        Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared"] | None,
        typer.Option("--architecture", help="moe: what it is; default: what suits the model."),
    ] = None,
    experts_per_token: Annotated[int | None, typer.Option("--experts-per-token", min=1, help="moe: default 2.")] = None,
    gates: Annotated[
        str | None, typer.Option("--gates", metavar="METHOD", help="moe: how gates are made; default ridge.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts", metavar="NAME=FILE", help="moe: prompts of an expert; default: those of the merge; repeatable."
        ),
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option("--converter", help="gguf: llama.cpp's folder; default: LLAMA_CPP, or what is on PATH."),
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="gguf: the Python that runs the converter; default: this one.")
    ] = None,
    outtype: Annotated[
        Literal["f16", "bf16", "f32", "q8_0"] | None,
        typer.Option("--outtype", help="gguf: how numbers are stored; default f16."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=1, help="gguf: most seconds of one conversion; default 3600.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of random sketches.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that stands there.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a bundle in a form that other software loads, and say what of it does not travel."""
    from mediator_cli.cli.export_report import print_report
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.cli.output import shown_folder
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.export.settings import Run

    folders, files = sorted_out(names, tasks or [])
    request = checked(
        Request(
            to, tuple(expert or ()), mixture, static, shard_size, rank, energy, tuple(source or ()),
            dtype, warn_below, tuple(files), limit, max_adapters, architecture, experts_per_token, gates,
            tuple(prompts or ()), converter, python, timeout, outtype,
        )
    )  # fmt: skip
    folder, told, started = _one(folders), Told(quiet or as_json), time.monotonic()
    quiet_transformers()
    with shown_progress(quiet or as_json) as progress:
        report = _carry_out(request, folder, output, Run(overwrite, progress, _rows(quiet or as_json), told.tell, seed))
    told.tell(*getattr(report, "notices", ()))
    seconds = round(time.monotonic() - started, 2)
    if as_json:
        print_json({**report.model_dump(mode="json"), "seconds": seconds})
    elif not quiet:
        print_report(request, report, shown_folder(output), shown_folder(folder), seconds)


def _rows(quiet: bool) -> Callable[[str, int, int], None]:
    """Tell of answers to the user's rows: a line for each model, when all are there."""
    started: dict[str, float] = {}

    def show(model: str, done: int, total: int) -> None:
        since = started.setdefault(model, time.monotonic())
        if done >= total and not quiet:
            sys.stderr.write(f"answers of {model}: {total} rows in {time.monotonic() - since:.1f} s\n")

    return show


def _one(folders: list[str]) -> Path:
    from mediator_cli.errors import OutputError, Problem

    if len(folders) != 1:
        hint = "rows of --tasks are files that end in .jsonl"
        raise OutputError(Problem("DIR", f"one bundle is exported, not {len(folders)}", hint))
    return Path(folders[0])


def _carry_out(request: Request, folder: Path, output: Path, run: Run) -> BaseModel:
    from mediator_cli.export.folder import open_for_export

    if request.to == "router":
        from mediator_cli.export.router import export_router

        return export_router(folder, output, run)
    if request.to == "vllm":
        from mediator_cli.export.vllm import export_vllm

        return export_vllm(folder, output, _lora_job(request), run)
    bundle = open_for_export(folder)
    if request.to == "dense":
        from mediator_cli.export.dense import export_dense

        return export_dense(bundle, output, request.chosen, run, shard_size=_shard_size(request))
    if request.to == "lora":
        from mediator_cli.export.lora import export_lora

        return export_lora(bundle, output, _lora_job(request), run)
    if request.to == "shira":
        from mediator_cli.export.shira import ShiraJob, export_shira

        return export_shira(bundle, output, ShiraJob(request.expert, request.max_adapters), run)
    if request.to == "moe":
        from mediator_cli.export.moe import MoeJob, export_moe

        job = MoeJob(
            request.architecture or "auto",
            request.expert,
            request.experts_per_token or 2,
            request.gates or "ridge",
            named_paths("prompts", request.prompts),
        )
        return export_moe(bundle, output, job, run)
    from mediator_cli.export.gguf import GgufJob, export_gguf, find_converter

    lora = None if request.is_mixed or not bundle.experts else _lora_job(request)
    gguf = GgufJob(request.chosen, lora, request.outtype or "f16", request.timeout or 3600)
    return export_gguf(bundle, output, gguf, find_converter(request.converter, request.python), run)


def _lora_job(request: Request) -> LoraJob:
    from mediator_cli.evaluate.tasks import load_tasks
    from mediator_cli.export.lora import LoraJob

    return LoraJob(
        rank=request.rank,
        energy=request.energy,
        experts=() if request.to == "gguf" else request.expert,
        sources=named_paths("source", request.source),
        dtype=_DTYPES[request.dtype] if request.dtype else None,
        tasks=load_tasks(request.tasks),
        limit=request.limit,
        warn_below=0.5 if request.warn_below is None else request.warn_below,
    )


def _shard_size(request: Request) -> int:
    from mediator_cli.errors import OutputError, Problem
    from mediator_cli.export.dense import SHARD_SIZE
    from mediator_cli.recipe.sizes import parse_size

    if request.shard_size is None:
        return SHARD_SIZE
    try:
        return parse_size(request.shard_size)
    except ValueError as error:
        raise OutputError(Problem("--shard-size", str(error), "write for example --shard-size 5GB")) from None
