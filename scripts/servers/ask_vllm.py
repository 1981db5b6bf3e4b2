"""Answer prompts with vLLM; runs in the servers' own environment: python ask_vllm.py FOLDER ...

Each folder has a request.json: a model folder, prompts and answers as token ids, and how many tokens to add. Beside it
comes answers.json: vLLM's own greedy tokens, and the log probability that it gives each token of the answers that were
sent; or the error with which it refused the model. One process asks several models: vLLM takes longer to start than to
answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import RequestOutput

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def main(folders: list[str]) -> None:
    """Answer the requests, one after another."""
    for folder in map(Path, folders):
        request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        try:
            answers = ask(request)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
            answers = {"error": f"{type(error).__name__}: {error}"}
        (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Load one model, answer, and let it go."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    model = LLM(
        request["model"],
        dtype="float32",
        max_model_len=request["longest"],
        max_num_seqs=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )
    try:
        greedy = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False)
        scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        prompts, given = request["prompts"], request["answers"]
        whole = [{"prompt_token_ids": [*ids, *tokens]} for ids, tokens in zip(prompts, given, strict=True)]
        own = model.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
        seen = model.generate(whole, scored, use_tqdm=False)
    finally:
        del model
        cleanup_dist_env_and_memory()
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in own],
        "logprobs": [_logprobs(one, len(ids)) for one, ids in zip(seen, prompts, strict=True)],
    }


def _logprobs(output: RequestOutput, start: int) -> list[float]:
    ids = output.prompt_token_ids
    return [output.prompt_logprobs[place][ids[place]].logprob for place in range(start, len(ids))]


if __name__ == "__main__":
    main(sys.argv[1:])
