"""Answer prompts with llama.cpp; runs in the servers' own environment: python ask_llama_cpp.py FOLDER ...

Requests and answers are those of ask_vllm.py, but the model is a GGUF file. Everything is computed in float32, the
cache of keys and values too, where llama.cpp would by itself round to 16 bits.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xllamacpp import Server

CANDIDATES = 64
"""The most likely tokens of which llama.cpp gives the log probability; one that is not among them counts as FAR."""
FAR = -1e3


def main(folders: list[str]) -> None:
    """Answer the requests, one after another."""
    for folder in map(Path, folders):
        request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        try:
            with (folder / "log").open("w", encoding="utf-8") as log:
                for stream in (1, 2):
                    os.dup2(log.fileno(), stream)
            answers = ask(request)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
            answers = {"error": _logged(folder / "log") or f"{type(error).__name__}: {error}"}
        (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


def _logged(log: Path) -> str:
    """Find why llama.cpp did not load a model: it writes that down, and tells its caller nothing."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition("error loading model: ")[2] for line in lines if "error loading model: " in line), "")


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Load one model and answer."""
    server = start(request["model"], request["longest"])
    pairs = list(zip(request["prompts"], request["answers"], strict=True))
    return {
        "tokens": [[token for token, _ in steps(server, ids, request["tokens"])] for ids, _ in pairs],
        "logprobs": [
            [steps(server, [*ids, *tokens[:place]], 1)[0][1].get(tokens[place], FAR) for place in range(len(tokens))]
            for ids, tokens in pairs
        ],
    }


def start(model: str, longest: int) -> Server:
    """Load a GGUF file into a server of one slot."""
    import xllamacpp as cpp

    settings = cpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = longest, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup, settings.verbosity = False, 1
    return cpp.Server(settings)


def steps(server: Server, ids: list[int], tokens: int) -> list[tuple[int, dict[int, float]]]:
    """Give each greedy token with the log probabilities of the most likely ones.

    Of a token that ends the answer nothing is told, so a single one is asked for as if it could not be the last; what
    that does comes after log probabilities are taken.
    """
    asked = {"prompt": ids, "n_predict": tokens, "temperature": 0.0, "n_probs": CANDIDATES, "ignore_eos": tokens == 1}
    answer = server.handle_completions(asked)
    found = (answer["choices"][0]["logprobs"] or {"content": []})["content"]
    return [(step["id"], {one["id"]: one["logprob"] for one in step["top_logprobs"]}) for step in found]


if __name__ == "__main__":
    main(sys.argv[1:])
