"""Compress a model folder into another: measure, decide, write."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.digest import scan_tensors
from mediator_cli.bundle.manifest import MANIFEST, read_manifest, to_json
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.checkpoint.moe_layout import moe_layout
from mediator_cli.checkpoint.source import open_checkpoint, side_files
from mediator_cli.engine.publish import check_output, publish
from mediator_cli.errors import CheckpointError, MediatorError, Problem
from mediator_cli.moe.compress.decide import decide
from mediator_cli.moe.compress.job import make_job
from mediator_cli.moe.compress.report import (
    REPORT,
    CompressionReport,
    card,
    layer_record,
    notices,
    parameters,
    sizes,
)
from mediator_cli.moe.compress.statistics_file import (
    Calibration,
    Statistics,
    load_statistics,
    model_digest,
    save_statistics,
)
from mediator_cli.moe.compress.write import new_config, write_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.bundle.record import FileRecord
    from mediator_cli.checkpoint.moe_layout import MoeLayout
    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.engine.publish import Mode
    from mediator_cli.moe.compress.groups import Group
    from mediator_cli.moe.compress.job import Job, Wishes

    Progress = Callable[[str, int, int], None]

_LONGEST = 2048
"""Tokens of a row that are read, at most."""
SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Rows:
    """Calibration rows as token ids, and the files that they come from."""

    prompts: tuple[tuple[int, ...], ...]
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class Opened:
    """A model that shall be compressed, and how."""

    source: Checkpoint
    layout: MoeLayout
    job: Job
    manifest: Manifest | None


@dataclass(frozen=True)
class Settings:
    """How to run: what may stand at the output, where statistics are kept, who is told how far it is.

    `licence` is that of the source, for the model card; files of weights are at most `shard_size` bytes.
    """

    mode: Mode
    statistics: Path | None
    progress: Progress
    generator: str
    licence: str | None = None
    shard_size: int = SHARD_SIZE


def open_job(folder: Path, wishes: Wishes) -> Opened:
    """Open a model by its headers and check what was asked for; raise MediatorError for what the user can mend."""
    source = open_checkpoint(folder)
    layout = moe_layout(str(folder), source.config, source.tensors)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    return Opened(source, layout, make_job(wishes, str(folder), layout), manifest)


def choose_rows(by_file: Sequence[Iterable[tuple[int, ...]]], n_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Take rows from the files in turn until there are `n_tokens`; long rows are cut.

    >>> choose_rows([[(1, 2), (3,)], [(4,)]], 3)
    ((1, 2), (4,))
    """
    in_turn = (row[:_LONGEST] for row in chain.from_iterable(zip_longest(*by_file)) if row)
    chosen: list[tuple[int, ...]] = []
    left = n_tokens
    for row in in_turn:
        if left <= 0:
            break
        chosen.append(row[:left])
        left -= len(row)
    return tuple(chosen)


def compress(opened: Opened, rows: Rows | None, target: Path, run: Settings) -> CompressionReport:
    """Write the compressed model into `target`, which appears whole or not at all; gives what compression.json holds.

    Statistics are taken from `run.statistics` where that file exists; else the rows are run through the model, and the
    statistics written there. Raises MediatorError for what the user can mend.
    """
    check_output(target, run.mode)
    statistics, groups = _measure(opened, rows, run)
    with publish(target, run.mode, {"the job": repr(opened.job)}) as building:
        return _write(opened, statistics, groups, building.folder, run)


def _measure(opened: Opened, rows: Rows | None, run: Settings) -> tuple[Statistics, dict[int, tuple[Group, ...]]]:
    """Measure all layers, or read what was measured before, and group the experts of each."""
    job, file = opened.job, run.statistics
    if file is not None and job.is_sequential:
        message = f"is not for {job.method}, which measures each layer behind the compressed ones before it"
        raise MediatorError(Problem("--statistics", message, "leave it out"))
    if file is not None and file.exists():
        statistics = load_statistics(file, opened.source, opened.layout)
        return statistics, {layer: decide(job, found) for layer, found in statistics.layers.items()}
    if rows is None or not rows.prompts:
        hint = "give files of rows that are like what the model will read: --rows FILE"
        raise MediatorError(Problem("--rows", "there is nothing to calibrate on", hint))
    return _calibrate(opened, rows, run)


def _calibrate(opened: Opened, rows: Rows, run: Settings) -> tuple[Statistics, dict[int, tuple[Group, ...]]]:
    from mediator_cli.moe.compress.collect import collect, collect_in_sequence
    from mediator_cli.moe.layerwise import open_layerwise

    job, model = opened.job, open_layerwise(opened.source.path)
    n_tokens = sum(map(len, rows.prompts))
    size = sum(info.n_bytes for info in opened.source.tensors.values())
    done = 0

    def advanced(n_layers: int) -> None:
        nonlocal done
        done += n_layers
        run.progress("calibrate", done * size // model.n_layers, size)

    if job.is_sequential:
        found = collect_in_sequence(model, rows.prompts, advanced, job)
    else:
        every_token = job.every_token or run.statistics is not None
        found = collect(model, rows.prompts, advanced, every_token=every_token)
    digest = model_digest(opened.source, opened.layout)
    calibration = Calibration(files=rows.files, n_rows=len(rows.prompts), n_tokens=n_tokens, model=digest)
    statistics = Statistics(calibration, found.statistics)
    if run.statistics is not None:
        save_statistics(run.statistics, statistics)
    return statistics, found.groups or {layer: decide(job, each) for layer, each in found.statistics.items()}


def _write(
    opened: Opened, statistics: Statistics, groups: Mapping[int, tuple[Group, ...]], folder: Path, run: Settings
) -> CompressionReport:
    source, layout, job = opened.source, opened.layout, opened.job
    before, after = sizes(source, layout, job)
    done = 0

    def advanced(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        run.progress("write", done, after.bytes)

    final = write_weights(source, layout, job, groups, folder, run.shard_size, advanced)
    _write_side_files(source, new_config(source.config, layout, job), folder)
    manifest = opened.manifest
    report = CompressionReport(
        generator=run.generator,
        source=str(source.path),
        source_digest=manifest.digest if manifest else None,
        experts=manifest.moe.experts if manifest and manifest.moe else (),
        method=job.method,
        parameters=parameters(job),
        calibration=statistics.calibration,
        before=before,
        after=after,
        layers={layer: layer_record(own, statistics.layers[layer]) for layer, own in final.items()},
        tensors=_digests(folder),
        notices=tuple(notices(job, layout, _renormalises(opened), statistics.layers)),
    )
    (folder / REPORT).write_text(to_json(report), encoding="utf-8")
    (folder / "README.md").write_text(card(report, run.licence), encoding="utf-8")
    return report


def _renormalises(opened: Opened) -> bool:
    return opened.layout.format.name == "mixtral" or bool(opened.source.config.get("norm_topk_prob", False))


def _write_side_files(source: Checkpoint, config: Mapping[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    generation = source.path / "generation_config.json"
    for file in (*side_files(source.path), *([generation] if generation.is_file() else [])):
        target = folder / file.relative_to(source.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _digests(folder: Path) -> dict[str, str]:
    """Digest what was written; raise CheckpointError where some of it is not finite."""
    infos = read_tensors(folder)
    scans = dict(zip(infos, scan_tensors(list(infos.values())), strict=True))
    if broken := [name for name, scan in scans.items() if not scan.is_finite]:
        hint = "the checkpoint is damaged: merge or fetch it again"
        raise CheckpointError(Problem(broken[0], "holds NaN or infinite values", hint))
    return {name: scan.digest for name, scan in sorted(scans.items())}
