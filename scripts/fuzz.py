"""Feed damaged files to everything that reads files from outside: any end but a result or a MediatorError is a defect.

    python scripts/fuzz.py [--seconds N] [--seed N] [--bundle FOLDER] [header sparse journal manifest ...]

Runs until it is stopped, or for N seconds, and prints a reproducer, the seed and the file in base64, for each defect.
With a bundle, its manifest is the one that is damaged.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mediator_cli.bundle.manifest import MANIFEST, read_manifest
from mediator_cli.bundle.sparse_file import SparseTensor, open_sparse_file
from mediator_cli.bundle.sparse_writer import create_sparse_file
from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.write import NewTensor, create_file
from mediator_cli.engine.journal import open_journal, start_journal
from mediator_cli.errors import MediatorError

KEY = {"the recipe": "x", "the file a": [1, 2]}
WORDS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b'"',
    b"\\",
    b"\0",
    b"\xff",
    b"[" * 2000,
    b"9" * 25,
    b"F32",
)


@dataclass(frozen=True)
class Target:
    """A file that is damaged, whole as `make` writes it into a folder, and what reads it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def make_header(folder: Path) -> Path:
    """Write a safetensors file with two tensors."""
    create_file(folder / "m", [NewTensor("a.b", "F32", (2, 3)), NewTensor("c", "BF16", (5,))], {"format": "pt"})
    return folder / "m"


def make_sparse(folder: Path) -> Path:
    """Write a sparse expert with a bitmap of signs, gaps of bytes, and overrides."""
    rng, file = np.random.default_rng(0), folder / "s"
    specs = {
        "a": SparseTensor(shape=(10, 30), n_kept=100, index="bitmap", values="sign", scale=0.5),
        "b": SparseTensor(shape=(2000,), n_kept=5, index="gaps", values="int8", scale=0.1, n_overrides=2),
    }
    with create_sparse_file(file, "x", list(specs)) as writer:
        bits = np.zeros(300, np.uint8)
        bits[rng.choice(300, 100, replace=False)] = 1
        places = writer.place("a", specs["a"], "F32", 38)
        writer.write(places["values"], rng.integers(0, 256, 13, np.uint8))
        writer.write(places["bitmap"], np.packbits(bits, bitorder="little"))
        places = writer.place("b", specs["b"], "F32", 7)
        writer.write(places["values"], rng.integers(-127, 128, 5, np.int8))
        writer.write(places["gaps"], np.array([1, 255, 3, 255, 9, 0, 7], np.uint8))
        writer.write(places["override_index"], np.array([3, 1999], np.int64))
        writer.write(places["override_values"], np.ones(2, np.float32))
        writer.finish()
    return file


def read_sparse(file: Path) -> object:
    """Decode all tensors."""
    sparse = open_sparse_file(file)
    return [sparse.decode(name) for name in sparse.tensors]


def make_journal(folder: Path) -> Path:
    """Write a journal of three steps."""
    journal = start_journal(folder / "journal", KEY)
    for step in ("survey", "batch 0.0", "batch 0.1"):
        journal.write(step, {"dense": {"t": "ab"}, "stored": {}, "seen": [["f", "t", "cd"]]})
    return journal.file


def make_key(folder: Path) -> Path:
    """Write a journal; what it is about is damaged."""
    make_journal(folder)
    return folder / "journal" / "key.json"


def read_journal(file: Path) -> object:
    """Open the journal that a file belongs to."""
    return open_journal(file.parent, KEY)


def make_manifest(folder: Path) -> Path:
    """Write what looks like a manifest as far as it can without a bundle."""
    file = folder / MANIFEST
    fields = {
        "schema_version": 2, "checksum": "", "created_by": "x", "tensors": {"t": {"shape": [1]}}, "digest": "ab" * 16,
        "experts": [{"name": "a", "files": []}], "sparse": [], "assignment": {"u": "route"}, "notices": [],
    }  # fmt: skip
    file.write_text(json.dumps(fields))
    return file


TARGETS = {
    "header": Target(make_header, read_header),
    "sparse": Target(make_sparse, read_sparse),
    "journal": Target(make_journal, read_journal),
    "key": Target(make_key, read_journal),
    "manifest": Target(make_manifest, lambda file: read_manifest(file.parent)),
}


def damage(raw: bytes, chance: random.Random) -> bytes:
    """Change bytes, numbers and lengths of a file, a few at a time."""
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(data) + 1)
        stop = min(len(data), at + chance.choice((0, 1, 1, 2, 8, 64)))
        kind = chance.randrange(6)
        if kind == 0:
            data[at:stop] = bytes(chance.randrange(256) for _ in range(stop - at))
        elif kind == 1:
            data[at:stop] = b""
        elif kind == 2:
            data[at:stop] = chance.choice(WORDS)
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data[at:at] = data[at:stop] * chance.choice((1, 2, 100))
        else:
            data = _with_other_number(data, chance)
    return bytes(data)


def _with_other_number(data: bytearray, chance: random.Random) -> bytearray:
    """Replace a run of digits, or the length at the start, by another number."""
    places = [at for at, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    if not places or chance.random() < 0.1:
        return bytearray(chance.choice((0, 1, 7, 2**31, 2**62, 2**64 - 1)).to_bytes(8, "little")) + data[8:]
    at = chance.choice(places)
    stop = at
    while stop < len(data) and 0x30 <= data[stop] <= 0x39:
        stop += 1
    number = chance.choice((0, 1, 2, 255, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -1))
    return data[:at] + str(number).encode() + data[stop:]


def try_one(name: str, file: Path, whole: bytes, seed: int) -> tuple[str, str]:
    """Read one damaged file; give how it ended and, for a defect, its reproducer."""
    raw = damage(whole, random.Random(seed))
    file.write_bytes(raw)
    try:
        TARGETS[name].read(file)
    except MediatorError:
        return "refused", ""
    except Exception:  # noqa: BLE001 - that is what is looked for
        report = f"{name}: seed {seed}\n{traceback.format_exc()}{base64.b64encode(raw).decode()}\n"
        return "defect", report
    return "read", ""


def fuzz(names: Sequence[str], seconds: float, seed: int, bundle: Path | None = None) -> Counter[str]:
    """Go round the targets until time is over; print reproducers, and count how files ended."""
    ends: Counter[str] = Counter()
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as place:
        files: dict[str, tuple[Path, bytes]] = {}
        for name in names:
            folder = Path(place) / name
            folder.mkdir()
            file = TARGETS[name].make(folder)
            if name == "manifest" and bundle is not None:
                file.write_bytes((bundle / MANIFEST).read_bytes())
            files[name] = file, file.read_bytes()
        while time.monotonic() < until:
            for name, (file, whole) in files.items():
                end, report = try_one(name, file, whole, seed)
                ends[f"{name} {end}"] += 1
                if report:
                    sys.stdout.write(report)
            seed += 1
    return ends


def main() -> None:
    """Read the command line, fuzz, and exit with 1 after a defect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path)
    asked = parser.parse_args()
    ends = fuzz(asked.targets, asked.seconds, asked.seed, asked.bundle)
    sys.stdout.write("\n".join(f"{end}: {count}" for end, count in sorted(ends.items())) + "\n")
    sys.exit(any(end.endswith("defect") for end in ends))


if __name__ == "__main__":
    main()
