"""Do real servers answer from an export of the demo's bundle as transformers does? python -m scripts.servers.serving.

Exports demo/bundle for vLLM and llama.cpp, asks both through the `openai` client for rows of the four tasks: the model
`auto` with the router inside vLLM and before it, every expert by its name, mixtures on a grid, and exact ones. Writes
serving.json. Wants `make demo` and `python -m scripts.servers.environment`; some ten minutes of one core.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from rich.console import Console

from mediator_cli.export.folder import open_for_export
from mediator_cli.export.gguf import GgufJob, export_gguf, find_converter
from mediator_cli.export.lora import LoraJob
from mediator_cli.export.settings import Run
from mediator_cli.export.vllm import export_vllm
from mediator_cli.serve.router.proxy import Upstream
from scripts.servers.environment import CHECKOUT, FOLDER
from scripts.servers.serving_offline import TOKENS, Mixture, Offline, top_one
from scripts.servers.serving_processes import llama_cpp, proxy, vllm

DEMO = CHECKOUT / "demo"
WORK = DEMO / "servers" / "serving"
RESULTS = Path(__file__).with_name("serving.json")
TASKS = ("maths", "language", "sarcasm", "sentiment")
RANK = 32
MIXTURES: tuple[Mixture, ...] = (
    {"maths": 0.75, "language": 0.25},
    {"sarcasm": 0.5, "sentiment": 0.5},
    {"maths": 0.25, "sentiment": 0.5},
)
"""Those that a server is asked for by name; all lie on the grid."""
Row = Mapping[str, str]
Result = dict[str, Any]
_say = Console(soft_wrap=True, highlight=False).print


def main() -> None:
    """Export, ask, compare, and write down what came of it; exit 1 where a server answers otherwise."""
    parser = argparse.ArgumentParser(prog="python -m scripts.servers.serving", description=__doc__)
    parser.add_argument("--rows", type=int, default=20, help="rows of each task")
    n_rows = parser.parse_args().rows
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    export()
    rows = [{**row, "task": task} for task in TASKS for row in read_rows(task, n_rows)]
    offline = Offline(WORK / "vllm", TASKS)
    found = [
        *in_vllm(rows, offline),
        *before_vllm(rows, offline),
        *before_llama_cpp(rows[:: max(1, n_rows // 5)], offline),
    ]
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if wrong := [one["what"] for one in found if one["equal"] < one["least"]]:
        raise SystemExit(f"not as transformers: {', '.join(wrong)}")


def export() -> None:
    """Write both folders, unless they are of the bundle that lies there now."""
    bundle = open_for_export(DEMO / "bundle")
    for name in ("vllm", "gguf"):
        report = WORK / name / "export.json"
        if report.is_file() and json.loads(report.read_text())["bundle"] == bundle.manifest.digest:
            continue
        shutil.rmtree(WORK / name, ignore_errors=True)
        if name == "vllm":
            export_vllm(DEMO / "bundle", WORK / name, LoraJob(rank=RANK), Run())
        else:
            converter = find_converter(FOLDER / "llama.cpp", str(FOLDER / "bin" / "python"))
            job = GgufJob(lora=LoraJob(rank=RANK), out_type="f32")
            export_gguf(bundle, WORK / name, job, converter, Run())


def read_rows(task: str, n: int) -> Iterator[Row]:
    """Read the first rows of a task's test set."""
    with (DEMO / "data" / f"{task}.test.jsonl").open(encoding="utf-8") as lines:
        for _, line in zip(range(n), lines, strict=False):
            yield json.loads(line)


def in_vllm(rows: Sequence[Row], offline: Offline) -> Iterator[Result]:
    """Ask vLLM with the router inside it."""
    with vllm(WORK / "vllm", WORK) as address:
        chosen = top_one(WORK / "vllm" / "router", [row["prompt"] for row in rows])
        yield compared("vLLM, router inside, auto", address, rows, chosen, offline, lambda row: "auto")
        own: list[Mixture] = [{row["task"]: 1.0} for row in rows]
        yield compared("vLLM, expert by name", address, rows, own, offline, lambda row: row["task"])
        yield compared("vLLM, dense by name", address, rows, [{}] * len(rows), offline, lambda row: "dense")


def before_vllm(rows: Sequence[Row], offline: Offline) -> Iterator[Result]:
    """Ask vLLM through the proxy, which builds mixtures and has them loaded."""
    folder = WORK / "vllm"
    with vllm(folder, WORK, MEDIATOR_ROUTER="", MEDIATOR_MIXTURES="grid") as address:
        with proxy(folder / "router", Upstream(address)) as front:
            chosen = top_one(folder / "router", [row["prompt"] for row in rows])
            yield compared("vLLM behind the proxy, auto", front, rows, chosen, offline, lambda row: "auto")
        grid = Upstream(address, mixtures="grid", adapters=folder / "adapters", built=WORK)
        with proxy(folder / "router", grid) as front:
            yield mixed("vLLM behind the proxy, mixtures on the grid", front, rows, offline)


def before_llama_cpp(rows: Sequence[Row], offline: Offline) -> Iterator[Result]:
    """Ask llama.cpp through the proxy, which turns mixtures into scales of its adapters."""
    with (
        llama_cpp(WORK / "gguf", WORK) as address,
        proxy(WORK / "vllm" / "router", Upstream(address, kind="llama.cpp")) as front,
    ):
        own: list[Mixture] = [{row["task"]: 1.0} for row in rows]
        yield compared("llama.cpp behind the proxy, expert by name", front, rows, own, offline, lambda row: row["task"])
        yield mixed("llama.cpp behind the proxy, mixtures by scales", front, rows, offline)


def mixed(what: str, address: str, rows: Sequence[Row], offline: Offline) -> Result:
    """Ask for mixtures by their weights, one after another."""
    some = rows[:: max(1, len(rows) // 12)]
    wanted = [MIXTURES[at % len(MIXTURES)] for at in range(len(some))]
    names = {
        id(row): ",".join(f"{n}={w}" for n, w in mixture.items()) for row, mixture in zip(some, wanted, strict=True)
    }
    return compared(what, address, some, wanted, offline, lambda row: names[id(row)])


def compared(
    what: str,
    address: str,
    rows: Sequence[Row],
    mixtures: Sequence[Mixture],
    offline: Offline,
    name: Callable[[Row], str],
) -> Result:
    """Ask a server and compare it with what transformers answers from the same mixtures."""
    start = time.monotonic()
    asked = [ask(address, name(row), row["prompt"]) for row in rows]
    seconds = time.monotonic() - start
    wanted = [offline.answer(row["prompt"], mixture) for row, mixture in zip(rows, mixtures, strict=True)]
    told = [header == in_words(mixture) for (_, header), mixture in zip(asked, mixtures, strict=True)]
    given = [text for text, _ in asked]
    result = {
        "what": what,
        "rows": len(rows),
        "accuracy": share(text == row["answer"] for text, row in zip(given, rows, strict=True)),
        "offline_accuracy": share(text == row["answer"] for text, row in zip(wanted, rows, strict=True)),
        "equal": share(text == other for text, other in zip(given, wanted, strict=True)),
        "routed_alike": share(told),
        "by_task": {
            task: share(t == row["answer"] for t, row in zip(given, rows, strict=True) if row["task"] == task)
            for task in TASKS
        },
        "seconds_each": round(seconds / len(rows), 3),
        "least": 0.95,
    }
    right = f"right {result['accuracy']:.3f}, offline {result['offline_accuracy']:.3f}"
    _say(f"{what:45} equal {result['equal']:.3f}  {right}")
    return result


def ask(address: str, model: str, prompt: str) -> tuple[str, str]:
    """Ask one question by the official client; give the answer and the mixture that the header tells."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    with client:
        reply = client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=TOKENS
        )
    answer = reply.parse().choices[0].message.content or ""
    return answer.strip(), reply.headers.get("x-mediator-mixture", "")


def in_words(mixture: Mixture) -> str:
    """Write a mixture as the header does."""
    return ",".join(f"{name}={weight:g}" for name, weight in mixture.items()) or "dense"


def share(truths: Iterable[bool]) -> float:
    """Give the share of what is true."""
    found = list(truths)
    return round(sum(found) / len(found), 4) if found else 0.0


if __name__ == "__main__":
    main()
