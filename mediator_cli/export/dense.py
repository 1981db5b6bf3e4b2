"""One mixture of a bundle as a whole checkpoint of Hugging Face, written tensor by tensor."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

from mediator_cli.checkpoint.write import NewTensor, create_file, index_json, plan_shards, write_at
from mediator_cli.errors import BundleError, Problem
from mediator_cli.export.folder import (
    building,
    check_experts,
    chosen_experts,
    copy_side_files,
    folder_bytes,
    losses,
    made_by,
    write_card,
    write_report,
)
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.pipeline.progress import counter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from mediator_cli.bundle.read import Bundle
    from mediator_cli.export.settings import Run

SHARD_SIZE = 5 * 10**9


class DenseReport(BaseModel):
    """What was written; an empty mixture is the dense expert alone."""

    model_config = ConfigDict(frozen=True)

    format: str = "dense"
    folder: str
    bundle: str
    mixture: dict[str, float]
    n_tensors: int
    bytes: int
    notices: tuple[str, ...] = ()


def export_dense(
    bundle: Bundle, target: Path, mixture: Mapping[str, float], run: Run, *, shard_size: int = SHARD_SIZE
) -> DenseReport:
    """Write a mixture as a checkpoint folder, which appears whole or not at all; {} is the dense expert alone.

    Each tensor is what `Bundle.mixture` gives, bit by bit; one is in memory at a time.
    Raises BundleError for unknown experts and damage, OutputError when the disk refuses.
    """
    check_mixture(bundle, mixture)
    with building(target, run, f"dense {dict(mixture)} {bundle.manifest.digest}") as folder:
        report = write_dense(bundle, folder, mixture, run, shard_size=shard_size, title=target.name)
        report = report.model_copy(update={"folder": str(target.absolute())})
        write_report(folder, report)
    return report


def write_dense(
    bundle: Bundle,
    folder: Path,
    mixture: Mapping[str, float],
    run: Run,
    *,
    shard_size: int = SHARD_SIZE,
    title: str = "",
) -> DenseReport:
    """Do the same into a folder that is there and empty, and is thrown away by the caller where this fails."""
    check_mixture(bundle, mixture)
    notices = tuple(losses(bundle.manifest))
    for notice in notices:
        run.notify(notice)
    infos = [NewTensor(info.name, info.dtype, info.shape) for info in bundle.tensors.values()]
    shards = plan_shards(infos, shard_size)
    advance = counter(run.progress, f"write {told(mixture)}", sum(info.n_bytes for info in infos))
    for name, tensors in shards.items():
        _write_shard(bundle, folder / name, tensors, mixture, advance)
    if len(shards) > 1:
        index = json.dumps(index_json(shards), indent=1) + "\n"
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    copy_side_files(bundle, folder)
    _write_card(bundle, folder, mixture, title or folder.name)
    return DenseReport(
        folder=str(folder),
        bundle=bundle.manifest.digest,
        mixture=dict(mixture),
        n_tensors=len(infos),
        bytes=folder_bytes(folder),
        notices=notices,
    )


def _write_shard(
    bundle: Bundle,
    file: Path,
    tensors: tuple[NewTensor, ...],
    mixture: Mapping[str, float],
    advance: Callable[[int], None],
) -> None:
    places = create_file(file, tensors, {"format": "pt"})
    with file.open("r+b") as stream:
        for tensor in tensors:
            mixed = bundle.mixture(mixture, tensor.name) if mixture else bundle.dense(tensor.name)
            data = mixed.contiguous().reshape(-1).view(torch.uint8).numpy()
            write_at(stream.fileno(), file, bytes_of(data), places[tensor.name].start)
            advance(tensor.n_bytes)


def check_mixture(bundle: Bundle, mixture: Mapping[str, float]) -> None:
    """Raise BundleError for experts that the bundle lacks and for weights that are no numbers."""
    if not mixture:
        return
    check_experts(bundle)
    chosen_experts(bundle, tuple(mixture))
    wrong = [name for name, weight in mixture.items() if not math.isfinite(weight)]
    if wrong:
        raise BundleError(Problem(f"weight of {wrong[0]}", "is no finite number", "write for example a=0.7,b=0.3"))


def told(mixture: Mapping[str, float]) -> str:
    """Name a mixture.

    >>> told({}), told({"maths": 1.0}), told({"a": 0.7, "b": 0.3})
    ('dense', 'maths', 'a=0.7,b=0.3')
    """
    if len(mixture) == 1 and 1.0 in mixture.values():
        return next(iter(mixture))
    return ",".join(f"{name}={weight:g}" for name, weight in mixture.items()) or "dense"


def _write_card(bundle: Bundle, folder: Path, mixture: Mapping[str, float], title: str) -> None:
    what = f"the mixture {told(mixture)}" if mixture else "the dense expert alone, without the sparse experts"
    lines = [
        f"A bundle of a dense model and sparse experts as one checkpoint: {what}. {made_by(bundle)}",
        "",
        "`AutoModelForCausalLM.from_pretrained` on this folder loads it, and so does any server.",
        "",
    ]
    write_card(bundle, folder, title, lines, tags=())
