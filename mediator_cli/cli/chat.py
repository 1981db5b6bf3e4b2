"""`mediator chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.generate import SeedOption, TemperatureOption, TokensOption, TopPOption
from mediator_cli.cli.mixtures import ExpertOption, MixtureOption, mixture_text, wanted
from mediator_cli.cli.output import console, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mediator_cli.runtime.generate import Conversation, Sampling
    from mediator_cli.runtime.mixing import Wanted
    from mediator_cli.runtime.model import RoutedModel

_HELP = "/new starts over, /expert NAME or /auto choose who answers, /quit ends"


def chat(
    folder: Annotated[Path, typer.Argument(help="A bundle.", metavar="DIR", show_default=False)],
    expert: ExpertOption = None,
    mixture: MixtureOption = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep the first turn's mixture for the conversation.")] = False,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
) -> None:
    """Talk with a bundle; every turn is routed anew unless --pin. Reads lines from standard input."""
    from mediator_cli.cli.opening import opened
    from mediator_cli.runtime.generate import Conversation, Sampling

    asked = wanted(expert, mixture)
    model, tokenizer = opened(folder)
    if sys.stdin.isatty():
        say(_HELP)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    conversation = Conversation()
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if line == "/quit":
                return
            conversation, asked = _command(line, model, conversation, asked)
        elif line:
            kept = conversation.weights if pin and asked is None else asked
            conversation = _turn(model, tokenizer, conversation, line, kept, sampling)


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _command(
    line: str, model: RoutedModel, conversation: Conversation, asked: Wanted | None
) -> tuple[Conversation, Wanted | None]:
    from mediator_cli.cli.output import print_problems
    from mediator_cli.errors import MediatorError
    from mediator_cli.runtime.generate import Conversation
    from mediator_cli.runtime.mixing import as_weights

    word, _, name = line.partition(" ")
    if word == "/new":
        return Conversation(), asked
    if word == "/auto":
        return conversation, None
    if word == "/expert":
        try:
            as_weights(name.strip(), model.expert_names, "/expert")
            return conversation, name.strip()
        except MediatorError as error:
            print_problems(error.problems)
            return conversation, asked
    say(_HELP)
    return conversation, asked


def _turn(
    model: RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    text: str,
    asked: Wanted | None,
    sampling: Sampling,
) -> Conversation:
    from transformers import TextStreamer

    from mediator_cli.runtime.generate import reply

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    turn = reply(model, tokenizer, conversation, text, sampling, mixture=asked, streamer=streamer)
    weights = turn.conversation.weights
    if weights is not None:
        console(stderr=True).print(f"[dim]{mixture_text(weights[0].tolist(), model.expert_names)}[/]")
    return turn.conversation
