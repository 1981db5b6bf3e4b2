"""`mediator compress-moe`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mediator_cli.cli.options import JsonOption, QuietOption
from mediator_cli.cli.output import Told, print_json, print_table, say
from mediator_cli.errors import MediatorError, Problem, some_names
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.evaluate.tasks import Task
    from mediator_cli.moe.compress.report import CompressionReport, SizeRecord
    from mediator_cli.moe.compress.run import Opened, Rows

_SHOWN = 8
_TOGETHER = 64
"""Rows that are tokenised at a time."""


def compress_moe(
    folder: Annotated[
        Path,
        typer.Argument(help="A Mixture of Experts: Mixtral, Qwen2-MoE, Qwen3-MoE.", metavar="DIR", show_default=False),
    ],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    method: Annotated[
        Literal["reap", "ream", "m_smoe", "hc_smoe", "sub_moe"],
        typer.Option("--method", help="reap drops experts; the others merge them."),
    ] = "reap",
    experts: Annotated[
        int | None, typer.Option("--experts", metavar="N", help="Experts left in each layer.", show_default=False)
    ] = None,
    keep: Annotated[
        float | None, typer.Option("--keep", metavar="SHARE", help="Share of experts left.", show_default=False)
    ] = None,
    rows: Annotated[
        list[Path] | None,
        typer.Option(
            "--rows", metavar="FILE…", help="JSON lines of prompt and answer to calibrate on.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: DIR-METHOD-N beside DIR.", show_default=False)
    ] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Say how large it will be; read no weight.")] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Calibration tokens, at most.")] = 16384,
    raw: Annotated[bool, typer.Option("--raw", help="Rows without the chat template.")] = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--statistics",
            metavar="FILE",
            help="What a calibration found: read where it exists, else written. Not for ream.",
            show_default=False,
        ),
    ] = None,
    router: Annotated[
        Literal["dominant", "mean", "tied"] | None,
        typer.Option(
            "--router", help="What the gates of merged experts become.", show_default="reap, ream: dominant; else mean"
        ),
    ] = None,
    align: Annotated[
        bool | None,
        typer.Option(
            "--align/--no-align",
            help="Put inner neurons in one order before merging.",
            show_default="ream, m_smoe: yes",
        ),
    ] = None,
    rank: Annotated[
        float, typer.Option("--rank", min=0.001, max=1.0, help="sub_moe: share of singular directions kept.")
    ] = 1.0,
    cap: Annotated[int, typer.Option("--cap", min=1, help="ream: experts that a centroid takes in, at most.")] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of k-means and of random projections.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a compressed model that stands there.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Leave fewer experts in a Mixture of Experts: drop those that matter least, or merge those that are alike."""
    from mediator_cli.cli.evaluate import sorted_out
    from mediator_cli.cli.output import shown_folder
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.moe.compress.job import Wishes
    from mediator_cli.moe.compress.run import Settings, compress, open_job
    from mediator_cli.pipeline.record import package_version
    from mediator_cli.pipeline.side_files import license_of

    surplus, files = sorted_out(more or [], rows or [])
    if surplus:
        raise MediatorError([Problem(word, "is no file of rows", "give JSON lines: --rows FILE…") for word in surplus])
    wishes = Wishes(method, experts, keep, router, align, rank, cap, seed)
    opened = open_job(folder, wishes)
    if only_plan:
        _show_plan(opened, as_json)
        return
    target = (output or _default_output(folder, opened)).absolute()
    started = time.monotonic()
    known = statistics is not None and statistics.exists()
    chosen = None if known or not files else _read_rows(folder, files, tokens, raw=raw)
    with shown_progress(quiet) as progress:
        run = Settings(
            "overwrite" if overwrite else "new",
            statistics,
            progress,
            f"mediator {package_version()}",
            license_of(folder),
        )
        report = compress(opened, chosen, target, run)
    seconds = round(time.monotonic() - started, 2)
    Told(quiet).tell(*report.notices)
    if as_json:
        print_json({**report.model_dump(mode="json"), "output": str(target), "seconds": seconds})
    elif not quiet:
        _print(report, shown_folder(target), seconds)


def _default_output(folder: Path, opened: Opened) -> Path:
    whole = folder.absolute()
    return whole.with_name(f"{whole.name}-{opened.job.method}-{opened.job.n_experts}")


def _read_rows(folder: Path, files: Sequence[Path], n_tokens: int, *, raw: bool) -> Rows:
    """Choose among the rows of all files, each with its answer; only those that are chosen are tokenised."""
    from mediator_cli.bundle.record import FileRecord
    from mediator_cli.checkpoint.digest import digest_file
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.evaluate.tasks import load_tasks
    from mediator_cli.moe.compress.run import Rows, choose_rows

    tasks = load_tasks(files)
    from mediator_cli.runtime.prompts import load_tokenizer

    quiet_transformers()
    tokenizer = load_tokenizer(folder)
    by_file = [_tokenised(tokenizer, task, raw=raw) for task in tasks]
    records = tuple(FileRecord(name=file.name, bytes=file.stat().st_size, sha256=digest_file(file)) for file in files)
    return Rows(choose_rows(by_file, n_tokens), records)


def _tokenised(tokenizer: PreTrainedTokenizerBase, task: Task, *, raw: bool) -> Iterator[tuple[int, ...]]:
    from mediator_cli.runtime.tokens import answer_tokens, prompt_tokens

    for start in range(0, len(task.rows), _TOGETHER):
        rows = task.rows[start : start + _TOGETHER]
        prompts = prompt_tokens(tokenizer, [row.prompt for row in rows], raw=raw)
        answers = answer_tokens(tokenizer, prompts, [row.answer for row in rows])
        yield from (prompt.ids + answer for prompt, answer in zip(prompts, answers, strict=True))


def _show_plan(opened: Opened, as_json: bool) -> None:
    from mediator_cli.moe.compress.report import parameters, sizes

    before, after = sizes(opened.source, opened.layout, opened.job)
    if as_json:
        facts = {"method": opened.job.method, "parameters": parameters(opened.job)}
        print_json({**facts, "before": before.model_dump(), "after": after.model_dump()})
        return
    print_table(("", "before#", "after#"), list(_size_rows(before, after)))


def _size_rows(before: SizeRecord, after: SizeRecord) -> Iterator[tuple[str, str, str]]:
    yield "experts a layer", str(before.n_experts), str(after.n_experts)
    yield "experts a token gets", str(before.top_k), str(after.top_k)
    yield "size", human_bytes(before.bytes), human_bytes(after.bytes)
    yield "parameters", f"{before.n_parameters:,}", f"{after.n_parameters:,}"
    yield "parameters a token passes", f"{before.n_active:,}", f"{after.n_active:,}"


def _print(report: CompressionReport, place: str, seconds: float) -> None:
    names = report.experts or tuple(map(str, range(report.before.n_experts)))
    drops = report.method == "reap"
    print_table(("layer#", "kept", "dropped") if drops else ("layer#", "merged"), list(_layer_rows(report, names)))
    print_table(("", "before#", "after#"), list(_size_rows(report.before, report.after)))
    calibration = report.calibration
    say(f"calibrated on {calibration.n_tokens} tokens of {calibration.n_rows} rows")
    say(f"written to {place} in {seconds:.1f} s; compression.json there says what became of each expert")
    say(f"Next: mediator evaluate {place} --tasks FILE…")


def _layer_rows(report: CompressionReport, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Show layer by layer what is left and what is not, or what was merged with what."""
    shown = list(report.layers.items())
    for number, layer in shown[:_SHOWN]:
        groups = [" + ".join(names[expert] for expert in group.experts) for group in layer.groups]
        dropped = [some_names([names[expert] for expert in layer.dropped], _SHOWN)] if layer.dropped else []
        yield str(number), some_names(groups, _SHOWN), *dropped
    if len(shown) > _SHOWN:
        yield "…", f"{len(shown) - _SHOWN} more layers in compression.json", *([""] if shown[0][1].dropped else [])
