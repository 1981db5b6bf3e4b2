"""Time and peak memory of merging four bf16 fine-tunes with the shapes of Qwen2.5-0.5B, as whole processes.

Run `make bench`, or `python scripts/bench_merge.py --help`. The checkpoints (5 GB) are random and made once.
Beside each job stands the floor: reading all inputs and writing one output with `cat` and `cp`, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCAB, KV = 896, 4864, 24, 151936, 128
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
}  # fmt: skip
JOBS = {
    "linear": ["assign.rule=none", "average.method=linear"],
    "task_arithmetic": ["assign.rule=none", "average.method=task_arithmetic", "average.lambda=0.25"],
    "ties (paper)": ["assign.rule=none", "average.method=ties"],
    "ties (mergekit)": ["assign.rule=none", "average.method=ties", "average.preset=mergekit", "average.density=0.5"],
    "dare_ties (mergekit)": ["assign.rule=none", "average.method=dare_ties", "average.preset=mergekit"],
    "mediator, mean_std": ["average.method=ties"],
    "all routed, density 1": ["assign.rule=all", "extract.density=1.0", "average.method=linear"],
}


@dataclass(frozen=True)
class Run:
    """What a process took: seconds on the wall, seconds of processor, peak resident bytes."""

    wall: float
    cpu: float
    peak: int


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of Qwen2.5-0.5B, tied embeddings."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            found[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        found[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        found |= {f"{layer}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,)}


def make_checkpoints(work: Path, n_experts: int) -> list[str]:
    """Write base and experts once; return the experts' names."""
    names = [f"expert{n}" for n in range(n_experts)]
    for seed, name in enumerate(["base", *names]):
        folder = work / name
        if (folder / "config.json").exists():
            continue
        sys.stderr.write(f"making {folder}\n")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(random_tensors(seed)), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return names


def random_tensors(seed: int) -> list[tuple[str, torch.Tensor]]:
    """Draw the base (seed 0), or the base plus a small change."""
    first, change = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = []
    for name, shape in shapes().items():
        tensor = 0.02 * torch.randn(shape, generator=first)
        if seed:
            tensor += 0.001 * torch.randn(shape, generator=change)
        tensors.append((name, tensor.bfloat16()))
    return tensors


def run(command: list[str]) -> Run:
    """Run a process to its end; raise when it fails."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed with exit code {process.returncode}: {' '.join(command)}")
    return Run(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def floor(work: Path, names: list[str]) -> Run:
    """Read all inputs and write one output of the same size, with nothing in between."""
    inputs = " ".join(f"'{work / name / 'model.safetensors'}'" for name in ["base", *names])
    output = work / "floor.safetensors"
    script = f"cat {inputs} > /dev/null && cp '{work / 'base' / 'model.safetensors'}' '{output}' && rm '{output}'"
    return run(["sh", "-c", script])


def write_recipe(work: Path, names: list[str]) -> Path:
    """Write the recipe that all jobs change by --set."""
    experts = "\n".join(f"  - {{name: {name}, model: ./{name}}}" for name in names)
    recipe = work / "recipe.yaml"
    recipe.write_text(f"version: 1\nbase: ./base\nexperts:\n{experts}\noutput: {{path: ./out}}\n")
    return recipe


def main() -> None:
    """Run every job and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench"), help="folder for checkpoints and outputs")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3, help="runs per job; the median counts")
    parser.add_argument("--job", choices=list(JOBS), action="append", help="only this job; repeatable")
    arguments = parser.parse_args()
    names = make_checkpoints(arguments.work, arguments.experts)
    recipe = write_recipe(arguments.work, names)
    sys.stdout.write(f"{os.cpu_count()} cores, {arguments.experts} experts of 0.49 B parameters, bf16\n\n")
    sys.stdout.write("| job | wall s | cpu s | peak MB | wall / floor |\n|---|---|---|---|---|\n")
    for job in arguments.job or JOBS:
        changes = [part for change in JOBS[job] for part in ("--set", change)]
        command = [sys.executable, "-m", "mediator_cli", "merge", str(recipe), "--overwrite", "--quiet", *changes]
        pairs = [(run(command), floor(arguments.work, names)) for _ in range(arguments.repeat)]
        took, least = sorted(pairs, key=lambda pair: pair[0].wall)[len(pairs) // 2]
        peak = max(pair[0].peak for pair in pairs) / 1e6
        sys.stdout.write(f"| {job} | {took.wall:.1f} | {took.cpu:.1f} | {peak:.0f} | {took.wall / least.wall:.1f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
