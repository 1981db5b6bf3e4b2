"""Time and peak memory of merging four bf16 fine-tunes with the shapes of Qwen2.5-0.5B, as whole processes.

Run `make bench`, or `python scripts/bench_merge.py --help`. The checkpoints (5 GB) are random and made once.
Beside each job stands the floor: reading all inputs and writing one output with `cat` and `cp`, in the same run.
With `--mergekit PATH/TO/mergekit-yaml`, from an environment of its own, that tool runs the same job in turn.
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
from statistics import median

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
    "mediator, mean_std": ["assign.rule=mean_std", "average.method=ties"],
    "all routed, density 1": ["assign.rule=all", "extract.density=1.0", "average.method=linear"],
}
PEERS = {
    "linear": {"merge_method": "linear"},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.25}},
    "ties (mergekit)": {"merge_method": "ties", "parameters": {"normalize": True}},
}
"""What mergekit calls the same job; TIES over the whole model is not among its methods."""


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


def run_peer(program: Path, work: Path, names: list[str], job: str) -> Run:
    """Run mergekit on the same checkpoints, writing bfloat16 as we do."""
    each = {"weight": 1.0, "density": 0.5} if "ties" in job else {"weight": 1.0}
    config = {"models": [{"model": str(work / name), "parameters": each} for name in names], "dtype": "bfloat16"}
    if job != "linear":
        config["base_model"] = str(work / "base")
    recipe = work / "mergekit.yaml"
    recipe.write_text(json.dumps(config | PEERS[job]))
    options = ["--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    return run([str(program), str(recipe), str(work / "peer"), *options])


def main() -> None:
    """Run every job and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench"), help="folder for checkpoints and outputs")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3, help="runs per job; the median counts")
    parser.add_argument("--mergekit", type=Path, help="path of mergekit-yaml, to run it in turn where it has the job")
    parser.add_argument("--job", choices=list(JOBS), action="append", help="only this job; repeatable")
    arguments = parser.parse_args()
    names = make_checkpoints(arguments.work, arguments.experts)
    recipe = write_recipe(arguments.work, names)
    sys.stdout.write(f"{os.cpu_count()} cores, {arguments.experts} experts of 0.49 B parameters, bf16\n\n")
    sys.stdout.write("| job | wall s | cpu s | peak MB | wall / floor | mergekit wall s | peak MB | times faster |\n")
    sys.stdout.write("|" + "---|" * 8 + "\n")
    for job in arguments.job or JOBS:
        sys.stdout.write(measure(arguments, names, recipe, job))
        sys.stdout.flush()


def measure(arguments: argparse.Namespace, names: list[str], recipe: Path, job: str) -> str:
    """Run one job, its floor and its peer in turn; return a row of the table with the medians."""
    changes = [part for change in JOBS[job] for part in ("--set", change)]
    command = [sys.executable, "-m", "mediator_cli", "merge", str(recipe), "--overwrite", "--quiet", *changes]
    ours, floors, peers = [], [], []
    for _ in range(arguments.repeat):
        ours.append(run(command))
        floors.append(floor(arguments.work, names))
        if arguments.mergekit and job in PEERS:
            peers.append(run_peer(arguments.mergekit, arguments.work, names, job))
    wall, cpu = median([r.wall for r in ours]), median([r.cpu for r in ours])
    cells = [job, f"{wall:.1f}", f"{cpu:.1f}", f"{max(r.peak for r in ours) / 1e6:.0f}"]
    cells.append(f"{wall / median([r.wall for r in floors]):.1f}")
    if peers:
        theirs = median([r.wall for r in peers])
        cells += [f"{theirs:.1f}", f"{max(r.peak for r in peers) / 1e6:.0f}", f"{theirs / wall:.1f}"]
    else:
        cells += [""] * 3
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    main()
