"""`mediator route`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediator_cli.cli.options import JsonOption
from mediator_cli.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.runtime.router import Routing

_BAR = 20
_SHOWN = 72


def route(
    folder: Annotated[Path, typer.Argument(help="A bundle with a router or gates.", metavar="DIR", show_default=False)],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Prompts, each in quotes.", metavar="TEXT…", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="JSON lines with a `prompt` each.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which experts would answer a prompt: probabilities, uncertainty, how unlike the tasks it is, mixture."""
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.errors import BundleError, Problem
    from mediator_cli.plan.prompts import read_prompts

    prompts = [*(texts or ()), *(read_prompts(file) if file is not None else ())]
    if not prompts:
        raise BundleError(Problem("", "there is no prompt to route", "give a text in quotes, or --file prompts.jsonl"))
    quiet_transformers()
    from mediator_cli.pipeline.router import route_texts

    record, routing = route_texts(folder, prompts)
    rows = [_facts(prompt, row, record, routing) for row, prompt in enumerate(prompts)]
    if as_json:
        print_json({"prompts": rows})
        return
    for facts in rows:
        _print(facts)


def _facts(prompt: str, row: int, record: RouterRecord | None, routing: Routing) -> dict[str, Any]:
    """Gather what the router made of one prompt; of gates, what they chose on average over tokens and layers."""
    if record is None:
        return {
            "prompt": prompt,
            "gates": _by_expert(routing, routing.weights[row].tolist()),
            "shares": _by_expert(routing, routing.probabilities[row].tolist()),
            "uncertainty": float(routing.entropy[row]),
        }
    return {
        "prompt": prompt,
        "probabilities": _by_expert(routing, routing.probabilities[row].tolist()),
        "uncertainty": float(routing.entropy[row]),
        "score": float(routing.score[row]),
        "outside_above": record.outside_above,
        "is_outside": bool(routing.is_outside[row]),
        "mixture": _by_expert(routing, routing.weights[row].tolist()),
        **({"is_blind": True} if record.features == "none" else {}),
        **_answers(row, record, routing),
    }


def _answers(row: int, record: RouterRecord, routing: Routing) -> dict[str, Any]:
    """Gather what the experts said where they were asked; nothing of a prompt that is too short for that."""
    if routing.answers is None or routing.is_silent is None:
        return {}
    said = None if routing.is_silent[row] else _by_expert(routing, routing.answers[row].tolist())
    return {record.features: said}


def _by_expert(routing: Routing, values: list[float]) -> dict[str, float]:
    return dict(zip(routing.experts, values, strict=True))


def _print(facts: dict[str, Any]) -> None:
    from mediator_cli.cli.mixtures import mixture_text

    text = " ".join(facts["prompt"].split())
    say(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
    if "gates" in facts:
        _print_gates(facts)
        return
    if "is_blind" in facts:
        say(f"mixture       {mixture_text(list(facts['mixture'].values()), list(facts['mixture']))}, for every prompt")
        say()
        return
    asked = next((name for name in ("perplexity", "gradient") if name in facts), "")
    rows = [(name, f"{p:.3f}", "█" * round(p * _BAR)) for name, p in facts["probabilities"].items()]
    if asked and facts[asked]:
        said = [f"{value:.1f}" if asked == "perplexity" else f"{value:+.5f}" for value in facts[asked].values()]
        heading = "perplexity#" if asked == "perplexity" else "cosine#"
        rows = [(name, value, *rest) for (name, *rest), value in zip(rows, said, strict=True)]
        print_table(("expert", heading, "probability#", ""), rows)
    else:
        print_table(("expert", "probability#", ""), rows)
    say(f"uncertainty   {facts['uncertainty']:.3f}")
    say(f"unlike tasks  {_unlike(facts, is_silent=bool(asked) and not facts[asked])}")
    say(f"mixture       {mixture_text(list(facts['mixture'].values()), list(facts['mixture']))}")
    say()


def _print_gates(facts: dict[str, Any]) -> None:
    rows = [(n, f"{w:.3f}", "█" * round(facts["shares"][n] * _BAR)) for n, w in facts["gates"].items()]
    print_table(("expert", "weight#", ""), rows)
    say(f"uncertainty   {facts['uncertainty']:.3f}")
    say("gates choose inside the model; these are means over the prompt's tokens and all gates")
    say()


def _unlike(facts: dict[str, Any], *, is_silent: bool) -> str:
    if is_silent:
        return "not known: a prompt of one token cannot be predicted, so the experts were not asked"
    if facts["outside_above"] is None:
        return f"{facts['score']:.4g}, without a limit: the router was measured on no prompts"
    against = "above" if facts["is_outside"] else "within"
    return f"{facts['score']:.2f}, {against} the limit of {facts['outside_above']:.2f}"
