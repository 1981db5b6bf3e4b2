"""`mediator generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediator_cli.cli.mixtures import CombineOption, ExpertOption, MixtureOption, combination, shown_mixture
from mediator_cli.cli.options import JsonOption, QuietOption
from mediator_cli.cli.output import console, print_json, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mediator_cli.runtime.generate import Sampling
    from mediator_cli.runtime.mixing import Wanted
    from mediator_cli.runtime.model import RoutedModel

TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 = the most probable token always.")]
TopPOption = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from this share of probability.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of what is drawn.")]


def generate(
    folder: Annotated[Path, typer.Argument(help="A bundle.", metavar="DIR", show_default=False)],
    texts: Annotated[list[str], typer.Argument(help="Prompts; several are answered in one batch.", metavar="TEXT…")],
    expert: ExpertOption = None,
    mixture: MixtureOption = None,
    combine: CombineOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Give the text to the model without its chat template.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer prompts with the experts that router or gates choose for each of them."""
    from mediator_cli.cli.opening import opened
    from mediator_cli.runtime.generate import Sampling
    from mediator_cli.runtime.wanted import wanted_of

    asked, how = wanted_of(folder, expert, mixture), combination(combine)
    model, tokenizer = opened(folder, how)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    started = time.monotonic()
    results = _answers(model, tokenizer, texts, asked, sampling, raw=raw, streams=not (as_json or quiet))
    if as_json:
        print_json({"answers": results, "seconds": round(time.monotonic() - started, 3)})
    elif len(texts) > 1 or quiet:
        for result in results:
            say(result["answer"])


def _answers(
    model: RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    asked: Wanted | None,
    sampling: Sampling,
    *,
    raw: bool,
    streams: bool,
) -> list[dict[str, Any]]:
    from transformers import TextStreamer

    from mediator_cli.runtime.generate import answer, check_length
    from mediator_cli.runtime.mixing import as_weights
    from mediator_cli.runtime.prompts import chat_ids

    prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}], raw=raw) for text in texts]
    for prompt in prompts:
        check_length(model, prompt)
    routing = model.route(prompts) if asked is None else None
    decided = routing.weights if routing is not None else asked or "dense"
    weights = as_weights(decided, model.expert_names, "--mixture")
    rows = weights.expand(len(prompts), -1).tolist()
    # What gates choose differs from token to token: what is shown is the mean, and nothing is decided before.
    per = model.gating.gates.rule.per if asked is None and model.gating is not None else None
    if streams:
        for row in rows:
            console(stderr=True).print(f"[dim]{shown_mixture(row, model.expert_names, per)}[/]")
    streamer = (
        TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams and len(texts) == 1 else None
    )
    said = answer(model, tokenizer, prompts, None if per else weights, sampling, streamer)
    return [
        {
            "prompt": text,
            "answer": answer_text,
            "mixture": {name: weight for name, weight in zip(model.expert_names, row, strict=True) if weight},
            "probabilities": None if routing is None else _named(routing.experts, routing.probabilities[at].tolist()),
            "uncertainty": None if routing is None else float(routing.entropy[at]),
        }
        for at, (text, answer_text, row) in enumerate(zip(texts, said, rows, strict=True))
    ]


def _named(names: tuple[str, ...], values: list[float]) -> dict[str, float]:
    return dict(zip(names, values, strict=True))
