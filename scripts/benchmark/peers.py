"""mergekit in an environment of its own, so that its requirements meet none of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmark.checkpoints import Inputs
    from benchmark.jobs import Job

NEEDED = (
    "torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0", "pydantic==2.14.3", "click==8.5.1",
    "immutables==0.21", "tqdm==4.70.1", "psutil==7.2.2",
)  # fmt: skip
ALONE = ("accelerate==1.15.0", "peft==0.21.2", "mergekit==0.1.5")
"""Installed without what they ask for: datasets, scipy, sentencepiece and protobuf are not used by these merges."""

OPTIONS = ("--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
ASK = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('mergekit', 'torch')), sep=', ')"


def make_environment(folder: Path) -> Path:
    """Install mergekit once; return its program."""
    program = folder / "bin" / "mergekit-yaml"
    if not program.exists():
        sys.stderr.write(f"installing mergekit in {folder}\n")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *NEEDED], check=True)
        subprocess.run([*pip, "--no-deps", *ALONE], check=True)
    return program


def peer_versions(program: Path) -> str:
    """Ask the environment of mergekit for its versions."""
    command = [str(program.parent / "python"), "-c", ASK]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def peer_command(program: Path, inputs: Inputs, job: Job, output: Path) -> list[str]:
    """Write mergekit's recipe of a job, and its command line."""
    recipe = inputs.folder / "mergekit.yaml"
    folders = [str(inputs.folder / name) for name in ("base", *inputs.experts)]
    recipe.write_text(json.dumps(job.peer_recipe(folders[0], folders[1:])))
    return [str(program), str(recipe), str(output), *OPTIONS]
