"""Draw random checkpoints, a piece at a time: python -m benchmark.draw SIZE FOLDER SEED...

A process of its own, since what the process that measures has once held counts as memory of those that it starts.
Seed 0 is the base, `FOLDER/base`; seed n is `FOLDER/expert{n-1}`, the base plus a small change.
"""

from __future__ import annotations

import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from benchmark.shapes import SIZES, Size
from numpy.typing import NDArray

PIECE = 1 << 20
"""Elements that are drawn at a time."""
BASE_SPREAD, CHANGE_SPREAD = np.float32(0.02), np.float32(0.001)


def main() -> None:
    """Write the base, then the experts, as many at a time as there are cores."""
    size, folder, seeds = SIZES[sys.argv[1]], Path(sys.argv[2]), [int(seed) for seed in sys.argv[3:]]
    if 0 in seeds:
        write_checkpoint(size, folder, 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda seed: write_checkpoint(size, folder, seed), [seed for seed in seeds if seed]))


def write_checkpoint(size: Size, folder: Path, seed: int) -> None:
    """Write one checkpoint; config.json comes last, as the mark of a whole one."""
    own = folder / (f"expert{seed - 1}" if seed else "base")
    own.mkdir(parents=True, exist_ok=True)
    with (own / "model.safetensors").open("wb") as stream:
        stream.write(header(size))
        draw(stream, size.parameters, seed, folder / "base" / "model.safetensors")
    (own / "config.json").write_text(json.dumps(size.config(), indent=2))


def header(size: Size) -> bytes:
    """Make the header of a safetensors file, padded to 8 bytes: its length, then names, dtypes, shapes and places."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in size.shapes().items():
        stop = start + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def draw(stream: BinaryIO, n: int, seed: int, base: Path) -> None:
    """Write n random bfloat16 numbers; for seeds above 0, those of the base and a change."""
    generator = np.random.Generator(np.random.SFC64(seed))
    known = np.memmap(base, np.uint16, "r")[-n:] if seed else None
    values = np.empty(PIECE, np.float32)
    for start in range(0, n, PIECE):
        piece = values[: min(PIECE, n - start)]
        generator.standard_normal(out=piece, dtype=np.float32)
        piece *= CHANGE_SPREAD if seed else BASE_SPREAD
        if known is not None:
            piece += widen(known[start : start + len(piece)])
        stream.write(narrow(piece).data)


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Read bit patterns of bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bit patterns of bfloat16, a half away from zero; the values are used up."""
    bits = values.view(np.uint32)
    bits += np.uint32(0x8000)
    return (bits >> np.uint32(16)).astype(np.uint16)


if __name__ == "__main__":
    main()
