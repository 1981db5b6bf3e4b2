"""What a library of many adapters costs: merged, opened, and answering rows of different adapters in one batch.

python scripts/bench_library.py makes 64 adapters by moving the factors of those in --adapters, merges them with
`extract: {mode: factors}`, and counts processor seconds, which other work on the machine changes less than the clock's.
Needs 2 GB of disk in --work for 64 adapters of the 135M model, and 2 GB of memory.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import copy
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mediator_cli.checkpoint.source import is_adapter
from mediator_cli.cli.opening import quiet_transformers
from mediator_cli.runtime.mixing import Wanted
from mediator_cli.runtime.open import load_dense, open_bundle

ROWS, PROMPT, NEW_TOKENS, REPEATS = 8, 64, 16, 2
MERGE = """
import atexit, re
from pathlib import Path
from mediator_cli.cli.app import main
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
main()
"""
"""Prints the most memory that it held, in KiB: what the system counts of a child begins with the parent's."""
MOVED = 0.01
"""By what share of its size each number of a factor is moved, times a standard normal draw."""


def main() -> None:
    """Make, merge and measure a library; print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=Path, default=Path("demo/tradeoffs/adapters"))
    parser.add_argument("--base", type=Path, default=Path("demo/base"))
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--work", type=Path, help="where adapters and bundle are made for a while")
    parser.add_argument("--bundle", type=Path, help="only measure answers of this one, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    if arguments.bundle is not None:
        sys.stdout.write(json.dumps(answer(arguments.bundle)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        found: dict[str, Any] = {"experts": arguments.count, "torch": torch.__version__}
        make_adapters(arguments.adapters, Path(folder) / "adapters", arguments.count)
        found["merge"] = merge(arguments.base, Path(folder))
        answers = [sys.executable, __file__, "--bundle", f"{folder}/bundle"]
        found["answers"] = json.loads(subprocess.run(answers, check=True, capture_output=True, text=True).stdout)
    Console(soft_wrap=True, highlight=False).print_json(json.dumps(found))


def make_adapters(source: Path, target: Path, count: int) -> None:
    """Make so many adapters out of those in a folder, each with its own small random changes."""
    known = sorted(folder for folder in source.iterdir() if is_adapter(folder))
    for number in range(count):
        like, folder = known[number % len(known)], target / f"a{number:02d}"
        folder.mkdir(parents=True)
        copy(like / "adapter_config.json", folder)
        generator = torch.Generator().manual_seed(number)
        tensors = load_file(like / "adapter_model.safetensors")
        moved = {
            name: tensor * (1 + MOVED * torch.randn(tensor.shape, generator=generator))
            for name, tensor in tensors.items()
        }
        save_file(moved, folder / "adapter_model.safetensors")


def merge(base: Path, folder: Path) -> dict[str, float]:
    """Merge all of a folder's adapters without a router, in a process of its own."""
    recipe = {
        "version": 1, "base": str(base.absolute()), "experts": {"from": "./adapters"}, "assign": {"rule": "all"},
        "extract": {"mode": "factors"}, "output": {"path": "./bundle"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", MERGE, "merge", "recipe.yaml", "--workers", "1", "--quiet"]
    done = subprocess.run(command, check=True, cwd=folder, stdout=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    adapters = sum(file.stat().st_size for file in (folder / "adapters").rglob("*.safetensors"))
    return {
        "seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mb": int(done.stdout) * 1024 / 1e6,
        "adapters_mb": adapters / 1e6,
        "experts_mb": sum(file.stat().st_size for file in (folder / "bundle/experts").iterdir()) / 1e6,
        "dense_mb": sum(file.stat().st_size for file in (folder / "bundle").glob("model*.safetensors")) / 1e6,
    }


def answer(bundle: Path) -> dict[str, Any]:
    """Generate with mixtures of several kinds, and with the dense expert in plain transformers at the end."""
    start = time.process_time()
    model = open_bundle(bundle)
    found: dict[str, Any] = {"open_seconds": time.process_time() - start, "opened_mb": resident_mb()}
    n = len(model.expert_names)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (ROWS, PROMPT), generator=generator)
    pairs = torch.zeros(ROWS, n)
    for row in pairs:
        row[torch.randperm(n, generator=generator)[:2]] = 0.5
    mixtures: dict[str, Wanted] = {
        "dense": "dense",
        "one adapter": model.expert_names[0],
        "an adapter a row": torch.eye(n)[:ROWS],
        "two adapters a row": pairs,
        "all adapters, weights by row": torch.rand(ROWS, n, generator=generator),
    }
    for kind, mixture in mixtures.items():
        with model.mixing(mixture):
            found[kind] = speed(model, ids) | {"mb": resident_mb()}
    found["plain transformers"] = speed(load_dense(bundle), ids)
    return found


def speed(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    """Time a batch: seconds for the prompt, tokens a second after it, and with it; the best of some repeats."""
    first, whole = (min(_seconds(model, ids, n) for _ in range(REPEATS)) for n in (1, NEW_TOKENS))
    return {
        "prompt_seconds": first,
        "tokens_per_second": ROWS * (NEW_TOKENS - 1) / (whole - first),
        "with_prompt": ROWS * NEW_TOKENS / whole,
    }


def _seconds(model: PreTrainedModel, ids: torch.Tensor, n_tokens: int) -> float:
    start = time.process_time()
    model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return time.process_time() - start


def resident_mb() -> float:
    """Tell the most memory that this process has held."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0


if __name__ == "__main__":
    main()
