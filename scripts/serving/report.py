"""Put results.json into the README beside this file: python -m scripts.serving.report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")
RESULTS = README.with_name("results.json")
BEGIN, END = "<!-- begin tables -->", "<!-- end tables -->"
TITLES = {
    "dense": "the bundle's dense expert alone, `mediator serve`",
    "ours": "the bundle, routed, `mediator serve`",
    "four": "four complete experts, four `mediator serve`, right one given",
    "vllm": "vLLM, adapters of rank 32, mediator's router as middleware",
}

EXPORTS = {
    "expert": "offline: the bundle's own experts, right one given (`--to dense --expert`)",
    "static": "offline: the dense expert (`--to dense --static`)",
    "lora-32": "offline: adapters of rank 32 (`--to lora --rank 32`)",
    "lora-energy": "offline: adapters of rank 256 (`--to lora --energy 0.9`)",
    "shira": "offline: sparse adapters (`--to shira`)",
    "moe": "offline: one Mixture of Experts (`--to moe`)",
}


def main() -> None:
    """Write the tables."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    README.write_text(with_tables(README.read_text(encoding="utf-8"), results), encoding="utf-8")


def with_tables(text: str, results: Mapping[str, Any]) -> str:
    """Put the tables between their marks."""
    head, _, rest = text.partition(BEGIN)
    tables = f"Machine: {results['machine']}.\n\n{speeds(results)}\n\n{accuracies(results)}"
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


def speeds(results: Mapping[str, Any]) -> str:
    """Lay out what clients saw."""
    rows = []
    for name, title in TITLES.items():
        for level in results.get(name, {}).get("levels", ()):
            base = _level(results, "dense", level["clients"])
            share = f"{level['tokens_per_second'] / base:.2f}" if base else ""
            rows.append(
                f"| {title} | {level['clients']} | {level['tokens_per_second']:.0f} | {share} | "
                f"{1000 * level['first_p50']:.0f} | {1000 * level['first_p95']:.0f} | "
                f"{level['memory_bytes'] / 1e9:.2f} |"
            )
    head = "| server | clients | tokens/s | of the dense | first token p50, ms | p95, ms | peak memory, GB |"
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|---:|", *rows])


def _level(results: Mapping[str, Any], name: str, clients: int) -> float:
    levels = results.get(name, {}).get("levels", ())
    return next((level["tokens_per_second"] for level in levels if level["clients"] == clients), 0.0)


def accuracies(results: Mapping[str, Any]) -> str:
    """Lay out what was answered rightly."""
    found = {title: results[name]["right"] for name, title in TITLES.items() if name in results}
    exports = results.get("exports", {}).get("right", {})
    found |= {title: exports[name] for name, title in EXPORTS.items() if name in exports}
    tasks = list(next(iter(found.values())))
    rows = [
        f"| {title} | {' | '.join(f'{right[task]:.1f}' for task in tasks)} | {sum(right.values()) / len(right):.1f} |"
        for title, right in found.items()
    ]
    head = f"| exact answers, % | {' | '.join(tasks)} | mean |"
    return "\n".join([head, "|---|" + "---:|" * (len(tasks) + 1), *rows])


if __name__ == "__main__":
    main()
