"""Put results.json into the README beside this file: python -m scripts.servers.report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.servers.ask import SERVERS
from scripts.servers.results import read_results

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- begin tables -->", "<!-- end tables -->"
TITLES = {
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "granitemoeshared": "GraniteMoeShared",
    "ernie4_5_moe": "Ernie 4.5 MoE",
}
SAID = {
    "Failed to init server": "it does not load",
    "named 'model.layers.0.mlp.shared_expert'": "it knows no empty tensors",
    "mlp.down_proj": "it wants experts in every layer",
    "parameter named": "it knows no such tensor names",
    "Can not map tensor": "the converter knows no such tensor names",
    "Unprocessed experts": "the converter knows no such tensor names",
    "ROPE_FREQS": "the converter cannot say it",
    "'output.weight' not found": "it wants a head of its own",
    "attn_q.weight' has wrong shape": "it wants head_dim to be width / heads",
    "shexp.weight' has wrong shape": "it wants one",
    "wrong number of tensors": "it has no place for them",
    "tokenizer.model": "the converter wants a SentencePiece tokenizer",
}
"""Words of an error, and what it means."""


def main() -> None:
    """Write the tables."""
    README.write_text(with_tables(README.read_text(encoding="utf-8"), read_results()), encoding="utf-8")


def with_tables(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Put the tables between their marks."""
    head, _, rest = text.partition(BEGIN)
    tables = "\n\n".join(f"### {title}\n\n{table(_of(kind, results))}" for kind, title in TITLES.items())
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


def _of(kind: str, results: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [result for result in results.values() if result["format"] == kind]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Lay the results of one format out."""
    rows = [f"| {result['feature']} | {' | '.join(cell(result[name]) for name in SERVERS)} |" for result in results]
    return "\n".join(["| the model has | vLLM | llama.cpp |", "|---|---|---|", *rows])


def cell(reading: Mapping[str, Any]) -> str:
    """Say how a server reads a model, in a few words.

    >>> cell({"status": "right", "apart": 1e-5}), cell({"status": "wrong", "apart": 0.93, "equal": 0.25})
    ('right', '**wrong**: 25% of the answers equal')
    """
    if reading["status"] == "right":
        return "right"
    if reading["status"] == "wrong":
        return f"**wrong**: {reading['equal']:.0%} of the answers equal"
    why = next((meaning for words, meaning in SAID.items() if words in reading["why"]), reading["why"][:80])
    return f"refused: {why}"


if __name__ == "__main__":
    main()
