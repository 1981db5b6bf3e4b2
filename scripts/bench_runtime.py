"""How fast a bundle answers, against its own dense expert in plain transformers: python scripts/bench_runtime.py.

Pairs are timed in turn and medians are given. Run it on an idle machine, after make demo.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from mediator_cli.cli.opening import quiet_transformers
from mediator_cli.runtime.model import RoutedModel
from mediator_cli.runtime.open import SWITCH_TOKENS, open_bundle

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NEVER = 10**9
NEW_TOKENS = 32


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("demo/bundle"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="only print the memory of this process")
    arguments = parser.parse_args()
    quiet_transformers()
    if arguments.memory:
        sys.stdout.write(json.dumps(memory(arguments.bundle, DTYPES[arguments.dtype])))
        return
    console = Console(soft_wrap=True, highlight=False)
    dtype = DTYPES[arguments.dtype]
    model = open_bundle(arguments.bundle, dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(arguments.bundle, dtype=dtype).eval()
    torch.set_grad_enabled(False)
    found: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "torch": torch.__version__,
    }
    found |= {"memory": json.loads(in_own_process(arguments))}
    for n_tokens in (64, 512):
        found[f"first token, {n_tokens} tokens"] = first_token(model, dense, n_tokens, arguments.repeats)
    found["batch of 8, 4 mixtures"] = batch(model, dense, arguments.repeats)
    found["ways"] = ways(model, arguments.repeats)
    console.print_json(json.dumps(found))


def in_own_process(arguments: argparse.Namespace) -> str:
    """Measure memory where nothing else was loaded."""
    command = [sys.executable, __file__, "--memory", "--dtype", arguments.dtype, "--bundle", str(arguments.bundle)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(bundle: Path, dtype: torch.dtype) -> dict[str, float]:
    """Return the memory beyond the bare process, in parts of one model's weights, without and with mixed batches."""
    bare = resident()
    model = open_bundle(bundle, dtype=dtype, cache_bytes=0)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    opened = resident()
    ids = torch.randint(100, 40_000, (8, 64))
    model.generate(ids, mixture=four_mixtures(model), max_new_tokens=8, do_sample=False, pad_token_id=0)
    return {
        "weights MB": round(weights / 1e6, 1),
        "opened": round((opened - bare) / weights, 3),
        "after a batch of 8": round((resident() - bare) / weights, 3),
        "stacks": round(
            sum(m.matrix.stack.n_bytes for m in model.opened.mixers if m.matrix and m.matrix.stack) / weights, 3
        ),
    }


def four_mixtures(model: RoutedModel) -> list[list[float]]:
    """Give eight rows four different mixtures: three single experts and a pair."""
    n = len(model.expert_names)
    single = [[float(at == chosen) for at in range(n)] for chosen in range(3)]
    pair = [0.5, 0.0, 0.5] + [0.0] * (n - 3)
    return [*single, pair] * 2


def timed(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time calls in turn; return the median milliseconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: round(1e3 * statistics.median(values), 3) for name, values in seconds.items()}


def first_token(model: RoutedModel, dense: torch.nn.Module, n_tokens: int, repeats: int) -> dict[str, float]:
    """Time routing and the first token of one prompt: mixture known, mixture new, plain dense expert."""
    ids = torch.randint(100, 40_000, (1, n_tokens))
    prompt = ids[0].tolist()

    def known() -> None:
        object.__setattr__(model.opened, "switch", 1)
        with model.mixing("dense" if not model.expert_names else model.expert_names[0]):
            model(ids)

    def new() -> None:
        model.opened.cache.entries.clear()
        known()

    calls = {"dense": lambda: dense(ids), "route": lambda: model.route([prompt]), "known": known, "new": new}
    found = timed(calls, repeats)
    return found | {"routing adds": round(found["route"] / found["dense"], 4)}


def batch(model: RoutedModel, dense: torch.nn.Module, repeats: int) -> dict[str, float]:
    """Generate for 8 prompts at once: four mixtures, one mixture, plain dense expert; tokens per second."""
    ids = torch.randint(100, 40_000, (8, 64))
    mixtures = four_mixtures(model)
    object.__setattr__(model.opened, "switch", SWITCH_TOKENS)
    options = {
        "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    found = timed(
        {
            "dense": lambda: dense.generate(ids, **options),
            "one mixture": lambda: model.generate(ids, mixture=model.expert_names[0], **options),
            "four mixtures": lambda: model.generate(ids, mixture=mixtures, **options),
        },
        max(3, repeats // 2),
    )
    speeds = {name: round(1e3 * 8 * NEW_TOKENS / value, 1) for name, value in found.items()}
    return speeds | {"four mixtures / dense": round(found["dense"] / found["four mixtures"], 3)}


def ways(model: RoutedModel, repeats: int) -> list[dict[str, float]]:
    """Time one pass of one mixture by products and by matrices, and building the matrices, over numbers of tokens."""
    rows = []
    opened = model.opened
    name = model.expert_names[0]
    for n_tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        ids = torch.randint(100, 40_000, (1, n_tokens))

        def run(switch: int, ids: torch.Tensor = ids) -> None:
            object.__setattr__(opened, "switch", switch)
            with model.mixing(name):
                model(ids)

        def products(run: Callable[[int], None] = run) -> None:
            opened.cache.entries.clear()
            opened.cache.waited.clear()
            run(NEVER)

        def build_and_run(run: Callable[[int], None] = run) -> None:
            opened.cache.entries.clear()
            run(1)

        calls = {"products": products, "build": build_and_run, "matrices": lambda run=run: run(1)}
        rows.append({"tokens": n_tokens} | timed(calls, repeats))
    return rows


if __name__ == "__main__":
    main()
