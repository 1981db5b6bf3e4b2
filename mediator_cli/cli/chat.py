"""`mediator chat`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.generate import SeedOption, TemperatureOption, TokensOption, TopPOption
from mediator_cli.cli.mixtures import CombineOption, ExpertOption, MixtureOption, combination, shown_mixture
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
    combine: CombineOption = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep the first turn's mixture for the conversation.")] = False,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
) -> None:
    """Talk with a bundle; every turn is routed anew unless --pin. Reads lines from standard input."""
    from mediator_cli.cli.opening import opened
    from mediator_cli.runtime.generate import Conversation, Sampling
    from mediator_cli.runtime.wanted import wanted_of

    asked, how = wanted_of(folder, expert, mixture), combination(combine)
    if pin and asked is None:
        _check_pin(folder)
    model, tokenizer = opened(folder, how)
    if _by_hand():
        say(_HELP)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    talk = Talk(Conversation(), asked)
    while (line := _read_line()) not in (None, "/quit"):
        if line and line.startswith("/"):
            talk = _command(line, folder, talk)
        elif line:
            talk = _answered(model, tokenizer, talk, line, sampling, pin=pin)


def _check_pin(folder: Path) -> None:
    from mediator_cli.bundle.manifest import read_manifest
    from mediator_cli.errors import BundleError, Problem

    if read_manifest(folder).gates is not None:
        message = "gates choose for every token, so there is no mixture to keep"
        raise BundleError(Problem("--pin", message, "leave it out, or name who answers: --expert, --mixture"))


@dataclass(frozen=True)
class Talk:
    """A conversation, who was asked to answer it, None = route, and the mixture that --pin keeps."""

    conversation: Conversation
    asked: Wanted | None
    pinned: Wanted | None = None


def _by_hand() -> bool:
    return sys.stdin.isatty()


def _read_line() -> str | None:
    try:
        return input("> " if _by_hand() else "").strip()
    except EOFError:
        return None


def _command(line: str, folder: Path, talk: Talk) -> Talk:
    from mediator_cli.cli.output import print_problems
    from mediator_cli.errors import MediatorError
    from mediator_cli.runtime.generate import Conversation
    from mediator_cli.runtime.wanted import wanted_of

    word, _, name = line.partition(" ")
    if word == "/new":
        return Talk(Conversation(), talk.asked)
    if word not in ("/auto", "/expert"):
        say(_HELP)
        return talk
    try:
        return Talk(talk.conversation, wanted_of(folder, name.strip() if word == "/expert" else None, None))
    except MediatorError as error:
        print_problems(replace(problem, place=word) for problem in error.problems)
        return talk


def _answered(
    model: RoutedModel, tokenizer: PreTrainedTokenizerBase, talk: Talk, text: str, sampling: Sampling, *, pin: bool
) -> Talk:
    """Answer a line; who types by hand reads what is wrong with it and goes on."""
    from mediator_cli.cli.output import print_problems
    from mediator_cli.errors import MediatorError

    asked = talk.pinned if talk.asked is None else talk.asked
    try:
        conversation = _turn(model, tokenizer, talk.conversation, text, asked, sampling)
    except MediatorError as error:
        if not _by_hand():
            raise
        print_problems(error.problems)
        return talk
    return Talk(conversation, talk.asked, conversation.weights if pin and talk.asked is None else None)


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
    chosen = weights[0].tolist() if weights is not None else turn.routing.weights[0].tolist() if turn.routing else []
    if chosen:
        per = model.gating.gates.rule.per if weights is None and model.gating is not None else None
        shown = shown_mixture(chosen, model.expert_names, per)
        console(stderr=True).print(f"[dim]{shown}[/]")
    return turn.conversation
