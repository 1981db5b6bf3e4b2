"""What does it cost to serve four experts? python -m scripts.serving [--servers ours …] [--rows 40] [--quick].

The same prompts of the demo's four tasks are sent to the demo's bundle in `mediator serve`, to its dense expert alone,
to the four complete experts in four servers, and to vLLM with adapters and mediator's router, by 1, 4 and 16 clients at
once. Then all test rows asked for are answered once, for accuracy. Wants `make demo`; vLLM wants `make test-vllm` too.
All servers run on this machine, one after the other, and listen on 127.0.0.1 alone.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from scripts.servers.environment import FOLDER
from scripts.servers.serving_processes import vllm_settings
from scripts.serving.load import Ask, Told, as_json, ask_all, read_asks, speed
from scripts.serving.targets import all_running, free_port, memory_of, peak_memory

CHECKOUT = Path(__file__).parents[2]
DEMO = CHECKOUT / "demo"
WORK = DEMO / "serving"
RESULTS = Path(__file__).with_name("results.json")
MEDIATOR = Path(sys.executable).with_name("mediator")
TASKS = ("maths", "language", "sarcasm", "sentiment")
LEVELS = {1: 16, 4: 32, 16: 64}
"""Requests by the number of clients."""
TOKENS = 32
ANSWER_TOKENS = 12
SERVERS = ("ours", "dense", "four", "vllm")


@dataclass(frozen=True)
class Server:
    """Running processes, and where each task is sent under which name."""

    pids: Sequence[int]
    places: Mapping[str, tuple[str, str]]

    def aim(self, asks: Sequence[Ask]) -> list[Ask]:
        """Send every prompt to its server."""
        return [replace(ask, url=self.places[ask.task][0], model=self.places[ask.task][1]) for ask in asks]


def main() -> None:
    """Measure the servers that are asked for and put them into results.json."""
    parser = argparse.ArgumentParser(prog="python -m scripts.serving", description=__doc__)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--rows", type=int, default=40, help="test rows of each task for accuracy")
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests, and nothing is noted")
    chosen = parser.parse_args()
    say = Console(highlight=False, soft_wrap=True).print
    WORK.mkdir(exist_ok=True)
    for name in chosen.servers:
        say(f"{name}: starting", markup=False)
        with MAKERS[name]() as server:
            found = measure(server, chosen.rows, 4 if chosen.quick else 1)
        say(f"{name}: {json.dumps(found)}", markup=False)
        if not chosen.quick:
            note(name, found)


def measure(server: Server, n_rows: int, divisor: int) -> dict[str, Any]:
    """Ask as more and more clients, and then for accuracy."""
    held = memory_of(server.pids)
    asks = server.aim(read_asks(DEMO / "data", TASKS, max(n_rows, 16)))
    ask_all(asks[:8], 2, max_tokens=4)
    levels = []
    for clients, n_requests in LEVELS.items():
        with peak_memory(server.pids) as peak:
            told, seconds = ask_all(asks[: n_requests // divisor], clients, max_tokens=TOKENS, ignore_eos=True)
        levels.append(as_json(speed(told, clients, seconds, peak[0])))
    told, _ = ask_all(asks[: n_rows * len(TASKS)], 8, max_tokens=ANSWER_TOKENS)
    return {"started_bytes": held, "levels": levels, "right": right(told), "mixtures": mixtures(told)}


def right(told: Sequence[Told]) -> dict[str, float]:
    """Give the share of right answers of each task, in per cent."""
    by_task = {task: [one.is_right for one in told if one.ask.task == task] for task in TASKS}
    return {task: round(100 * sum(each) / len(each), 1) for task, each in by_task.items()}


def mixtures(told: Sequence[Told]) -> dict[str, int]:
    """Count how many answers which experts gave, whatever their weights."""
    counts: dict[str, int] = {}
    for one in told:
        names = "+".join(sorted(part.partition("=")[0] for part in one.mixture.split(",") if part)) or "dense"
        counts[names] = counts.get(names, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def note(name: str, found: Mapping[str, Any]) -> None:
    """Put one server's numbers beside those of the others."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[name] = found
    results["machine"] = machine()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """Say what this runs on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    cores = sum(line.startswith("processor") for line in lines)
    return f"{cores} cores, {name}"


@contextmanager
def ours(model: str = "auto") -> Iterator[Server]:
    """Serve the demo's bundle."""
    port = free_port()
    command = [MEDIATOR, "serve", DEMO / "bundle", "--port", str(port), "--rows", "16", "--quiet"]
    with all_running([(command, port, {})]) as pids:
        yield Server(pids, dict.fromkeys(TASKS, (f"http://127.0.0.1:{port}", model)))


@contextmanager
def four() -> Iterator[Server]:
    """Serve each complete expert by itself; every task is sent to its own, as if by a perfect router."""
    ports = {task: free_port() for task in TASKS}
    commands = [
        ([MEDIATOR, "serve", complete(task), "--port", str(port), "--rows", "16", "--quiet"], port, {})
        for task, port in ports.items()
    ]
    with all_running(commands) as pids:
        yield Server(pids, {task: (f"http://127.0.0.1:{port}", "dense") for task, port in ports.items()})


def complete(task: str) -> Path:
    """Write an expert as a model of its own: a merge of this one expert."""
    folder, recipe = WORK / task, WORK / f"{task}.yaml"
    if not folder.exists():
        expert = {"name": task, "model": str(DEMO / "experts" / task)}
        recipe.write_text(
            f"version: 1\nbase: {DEMO / 'base'}\nexperts: [{json.dumps(expert)}]\nassign: {{rule: none}}\n"
            f"average: {{method: task_arithmetic}}\noutput: {{path: {folder}}}\n",
            encoding="utf-8",
        )
        subprocess.run([MEDIATOR, "merge", recipe, "--quiet"], check=True)
    return folder


@contextmanager
def vllm() -> Iterator[Server]:
    """Serve the bundle's dense expert and its adapters in vLLM, with mediator's router as its middleware."""
    folder, port = WORK / "vllm", free_port()
    if not folder.exists():
        export = [MEDIATOR, "export", DEMO / "bundle", "--to", "vllm", "-o", folder, "--rank", "32", "--quiet"]
        subprocess.run(export, check=True)
    if not FOLDER.exists():
        raise SystemExit("vLLM is not installed: python -m scripts.servers.environment")
    settings = vllm_settings(WORK)
    command = ["sh", folder / "serve.sh", "--port", str(port), "--enforce-eager", "--max-num-seqs", "16"]
    with all_running([(command, port, settings)]) as pids:
        yield Server(pids, dict.fromkeys(TASKS, (f"http://127.0.0.1:{port}", "auto")))


MAKERS = {"ours": ours, "dense": lambda: ours("dense"), "four": four, "vllm": vllm}


if __name__ == "__main__":
    main()
