"""The file of gates: a plain safetensors file of their directions and biases, never a pickle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mediator_cli.bundle.gates_record import GATES, GatesRecord
from mediator_cli.bundle.manifest import MANIFEST, bundle_file
from mediator_cli.bundle.record import FileRecord
from mediator_cli.bundle.tensors import read_tensor
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.header import read_header
from mediator_cli.errors import BundleError, CheckpointError, Problem
from mediator_cli.runtime.arrays_file import write_arrays
from mediator_cli.runtime.gates import Gate, Gates

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.checkpoint.header import TensorInfo

FORMAT = "mediator.gates"
FORMAT_VERSION = "1"
_DAMAGED = "the gates are damaged; fetch the bundle again or write it again"
_PARTS = ("directions", "bias")


def write_gates(folder: Path, gates: Gates) -> GatesRecord:
    """Write gates into a folder and describe them; raise OutputError when there are some or the disk refuses."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, gate in gates.by_name.items():
        arrays[f"{name}.directions"] = gate.directions.detach().float().cpu().numpy()
        arrays[f"{name}.bias"] = gate.bias.detach().float().cpu().numpy()
    file = folder / GATES
    write_arrays(file, arrays, {"format": FORMAT, "version": FORMAT_VERSION})
    record = FileRecord(name=GATES, bytes=file.stat().st_size, sha256=digest_file(file))
    return GatesRecord(method=gates.method, rule=gates.rule, experts=gates.experts, file=record)


def read_gates(folder: Path, manifest: Manifest) -> Gates | None:
    """Read the gates of a bundle; None when its manifest has none.

    Raises BundleError naming file and array when the file is missing, damaged, or not what the manifest says.
    """
    record = manifest.gates
    if record is None:
        return None
    if record.experts != tuple(source.name for source in manifest.experts):
        place = f"{folder / MANIFEST} gates.experts"
        raise BundleError(Problem(place, "are not all experts of the bundle in its order", _DAMAGED))
    places = _places(bundle_file(folder, record.file.name))
    names = dict.fromkeys(name.rpartition(".")[0] for name in places)
    found = dict(_read(folder, places, names, len(record.experts)))
    return Gates(record.method, record.rule, record.experts, found)


def _places(file: Path) -> dict[str, TensorInfo]:
    try:
        header = read_header(file)
    except CheckpointError as error:
        raise BundleError(error.problems) from None
    if header.metadata.get("format") != FORMAT or header.metadata.get("version") != FORMAT_VERSION:
        hint = f"expected {FORMAT} version {FORMAT_VERSION}; was it written by a newer mediator?"
        raise BundleError(Problem(str(file), "is not a file of gates that this version reads", hint))
    return {info.name: info for info in header.tensors}


def _read(
    folder: Path, places: Mapping[str, TensorInfo], names: Mapping[str, None], n_experts: int
) -> Iterator[tuple[str, Gate]]:
    for name in names:
        parts = [places.get(f"{name}.{part}") for part in _PARTS]
        directions, bias = parts
        if directions is None or bias is None:
            raise BundleError(Problem(f"{folder / GATES}: {name}", "array is missing", _DAMAGED))
        fits = len(directions.shape) == 3 and directions.shape[0] == n_experts and bias.shape == (n_experts,)
        if not fits or {directions.dtype, bias.dtype} != {"F32"}:
            message = f"is {list(directions.shape)} with a bias of {list(bias.shape)}, for {n_experts} experts"
            raise BundleError(Problem(f"{folder / GATES}: {name}", message, _DAMAGED))
        gate = Gate(read_tensor(directions), read_tensor(bias))
        if not bool(torch.isfinite(gate.directions).all() and torch.isfinite(gate.bias).all()):
            raise BundleError(Problem(f"{folder / GATES}: {name}", "holds NaN or infinite values", _DAMAGED))
        yield name, gate
