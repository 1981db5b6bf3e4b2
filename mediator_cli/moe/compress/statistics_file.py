"""Statistics on disk, so that one calibration pass serves several methods and sizes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.digest import digest_tensors
from mediator_cli.bundle.manifest import to_json
from mediator_cli.bundle.record import FileRecord, Record
from mediator_cli.checkpoint.digest import fold
from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.read import open_files, read_slab
from mediator_cli.checkpoint.write import NewTensor, header_bytes, write_error
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.moe.compress.statistics import LayerStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.moe_layout import MoeLayout
    from mediator_cli.checkpoint.source import Checkpoint

_KEY = "calibration"
_HINT = "name another file to calibrate anew, or remove this one"


class Calibration(Record):
    """What a model was calibrated on: files of rows, tokens, and the digest of the gates and of one expert a layer."""

    files: tuple[FileRecord, ...]
    n_rows: int
    n_tokens: int
    model: str


@dataclass(frozen=True)
class Statistics:
    """Statistics of all layers that have routed experts, and where they come from."""

    calibration: Calibration
    layers: Mapping[int, LayerStatistics]


def model_digest(source: Checkpoint, layout: MoeLayout) -> str:
    """Digest all gates and the first expert's down projection in each layer: cheap, and other models have others."""
    names = [layout.format.expert_of(layer, 0, "down_proj") for layer in layout.layers]
    found = digest_tensors({name: source.tensors[name] for name in (*layout.routers, *names)})
    return fold(bytes.fromhex(digest) for digest in found.values())


def save_statistics(file: Path, statistics: Statistics) -> None:
    """Write statistics beside their place, then rename; raise OutputError when that fails."""
    arrays = {
        f"layers.{layer}.{name}": np.ascontiguousarray(array, np.float64)
        for layer, found in statistics.layers.items()
        for name, array in asdict(found).items()
    }
    tensors = [NewTensor(name, "F64", array.shape) for name, array in arrays.items()]
    staged = file.with_name(f".{file.name}.partial")
    try:
        with staged.open("wb") as stream:
            stream.write(header_bytes(tensors, {_KEY: to_json(statistics.calibration)}))
            for array in arrays.values():
                stream.write(bytes_of(array))
        staged.replace(file)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise write_error(file, error) from None


def load_statistics(file: Path, source: Checkpoint, layout: MoeLayout) -> Statistics:
    """Read statistics; raise CheckpointError where they are damaged or of another model."""
    header = read_header(file)
    try:
        calibration = Calibration.model_validate(json.loads(header.metadata[_KEY]))
    except (KeyError, ValueError):
        message = "holds no statistics of a calibration"
        raise CheckpointError(Problem(str(file), message, _HINT)) from None
    if calibration.model != model_digest(source, layout):
        raise CheckpointError(Problem(str(file), f"is of another model than {source.path}", _HINT))
    infos = {info.name: info for info in header.tensors}
    wanted = {layer: [f"layers.{layer}.{each.name}" for each in fields(LayerStatistics)] for layer in layout.layers}
    if missing := [name for names in wanted.values() for name in names if name not in infos]:
        raise CheckpointError(Problem(str(file), f"lacks {missing[0]}", _HINT))
    with open_files([file]) as handles:
        arrays = {name: read_slab(handles, info, 0, info.size).reshape(info.shape) for name, info in infos.items()}
    layers = {layer: LayerStatistics(*(arrays[name] for name in names)) for layer, names in wanted.items()}
    return Statistics(calibration, layers)
