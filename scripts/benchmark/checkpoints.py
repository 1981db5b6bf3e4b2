"""The checkpoints that are merged: made once, in a process of their own. Standard library only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmark.shapes import SIZES

SCRIPTS = Path(__file__).resolve().parent.parent
WEIGHTS = "model.safetensors"
OWN_AT_MOST = 4
CACHED_SHARE = 0.6
"""Share of the memory that the inputs may take, so that they stay in the page cache."""


@dataclass(frozen=True)
class Inputs:
    """A base and its experts, as folders of `folder`; experts named link... share their bytes with others."""

    folder: Path
    size: str
    experts: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, the base's first."""
        return tuple(self.folder / name / WEIGHTS for name in ("base", *self.experts))

    @property
    def n_bytes(self) -> int:
        """Bytes of all weight files; linked ones count like others."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def n_links(self) -> int:
        """Number of experts that are hard links."""
        return sum(name.startswith("link") for name in self.experts)


def make_inputs(work: Path, size: str, n_experts: int, memory: int) -> Inputs:
    """Make what is not there yet; end with a message when the disk has too little room.

    Experts beyond those that `own_experts` allows are hard links: they share the page cache, and pieces of them that
    are read at the same time share the processor's.
    """
    folder, n_own = work / size, own_experts(SIZES[size].n_bytes, n_experts, memory)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["base", *(f"expert{n}" for n in range(n_own))]
    missing = [seed for seed, name in enumerate(names) if not (folder / name / "config.json").exists()]
    check_room(folder, len(missing), SIZES[size].n_bytes)
    if missing:
        sys.stderr.write(f"making {len(missing)} checkpoints in {folder}\n")
        command = [sys.executable, "-m", "benchmark.draw", size, str(folder.resolve()), *map(str, missing)]
        subprocess.run(command, check=True, cwd=SCRIPTS)
    links = [link(folder, f"expert{n % n_own}", f"link{n}-{n_own}") for n in range(n_own, n_experts)]
    return Inputs(folder, size, (*names[1:], *links))


def own_experts(n_bytes: int, n_experts: int, memory: int) -> int:
    """How many experts get bytes of their own, so that these and the base stay cached.

    >>> own_experts(10, 8, 1000), own_experts(10, 2, 1000), own_experts(10, 8, 51), own_experts(10, 8, 1)
    (4, 2, 2, 1)
    """
    return max(1, min(OWN_AT_MOST, n_experts, int(CACHED_SHARE * memory / n_bytes) - 1))


def check_room(folder: Path, n_missing: int, n_bytes: int) -> None:
    """End with a message if the checkpoints to be made and one output, at most twice a model, have no room."""
    needed, free = (n_missing + 2) * n_bytes, shutil.disk_usage(folder).free
    if needed > free:
        message = f"{folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise SystemExit(f"{message}; choose another disk by --work, a smaller --size, or fewer --experts")


def link(folder: Path, source: str, name: str) -> str:
    """Make an expert whose files are those of another; return its name."""
    (folder / name).mkdir(exist_ok=True)
    for file in (WEIGHTS, "config.json"):
        (folder / name / file).unlink(missing_ok=True)
        os.link(folder / source / file, folder / name / file)
    return name


def write_recipe(inputs: Inputs) -> Path:
    """Write the recipe that all jobs change by --set."""
    experts = "\n".join(f"  - {{name: {name}, model: ./{name}}}" for name in inputs.experts)
    recipe = inputs.folder / f"recipe-{len(inputs.experts)}.yaml"
    recipe.write_text(f"version: 1\nbase: ./base\nexperts:\n{experts}\n")
    return recipe
