"""The text of a drafted recipe: what was chosen, and beside each choice what else there is and what it costs."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, get_args

import yaml

from mediator_cli.recipe.extract import ExtractSpec
from mediator_cli.recipe.schema import Rule
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.pipeline.draft.choose import Choices, DraftExpert, DraftReport, SourceFacts

_PLAIN = re.compile(r"([A-Za-z]|\.{0,2}/)[\w./@-]*", re.ASCII)
_NOT_TEXTS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
_LINE = 118
_SHOWN = 6


def scalar(text: str) -> str:
    """Write a text so that YAML reads the same text back.

    >>> scalar("./maths"), scalar("1e3"), scalar("no"), scalar("a: b #c")
    ('./maths', '"1e3"', '"no"', '"a: b #c"')
    """
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXTS:
        return text
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=1_000_000)).strip()


def comment(text: str) -> str:
    r"""Write a line that is a comment whatever the text holds: configs of others must not add fields.

    >>> comment("llama\nbase: /elsewhere")
    '# llama base: /elsewhere'
    """
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return f"# {plain}" if len(plain) <= _LINE else f"# {plain[: _LINE - 1]}…"


def recipe_text(choices: Choices, report: DraftReport) -> str:
    """Write the recipe with its comments."""
    blocks = (_head(report), _sources(choices, report), _stages(choices, report), _settings(choices, report))
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _head(report: DraftReport) -> Iterator[str]:
    sparse = human_bytes(report.sparse_bytes)
    disk = f"{human_bytes(report.dense_bytes + report.sparse_bytes)} of disk for the bundle"
    parts = f" ({human_bytes(report.dense_bytes)} dense, {sparse} sparse experts)" if report.rule != "none" else ""
    yield comment(
        "Drafted by `mediator init` from headers and configs alone. It merges as it is; change what you like."
    )
    down = f"{human_bytes(report.download_bytes)} of downloads, " if report.download_bytes else ""
    yield comment(f"Needs:  {down}{disk}{parts},")
    yield comment(
        f"        {human_bytes(report.peak_memory)} of memory; reads {human_bytes(report.read_bytes)} in all passes."
    )
    yield comment(f"Run:    mediator merge {report.recipe}")
    yield comment("Fields: `mediator schema`; --set FIELD=VALUE tries another value without changing this file.")
    for notice in report.notices[:_SHOWN]:
        yield comment(f"Note:   {notice}")
    if len(report.notices) > _SHOWN:
        yield comment(
            f"        and {len(report.notices) - _SHOWN} notes more; `mediator validate {report.recipe}` has all"
        )
    yield "version: 1"


def _about(facts: SourceFacts) -> str:
    kind = "full checkpoint" if facts.kind == "full" else "LoRA adapter"
    rank = f" of rank {facts.rank}" if facts.rank else ""
    tokens = f", {facts.n_tokens} tokens" if facts.n_tokens else ""
    return f"{kind}{rank}, {facts.n_tensors} tensors, {human_bytes(facts.n_bytes)} in {facts.dtype}{tokens}"


def _sources(choices: Choices, report: DraftReport) -> Iterator[str]:
    kind = f"{report.base.model_type}, " if report.base.model_type else ""
    yield comment(f"What all experts were tuned from: {kind}{report.n_layers} layers; {_about(report.base)}.")
    yield f"base: {scalar(choices.base)}"
    yield comment("Each expert may have a `weight: 1.0`, its share where layers are averaged.")
    if report.missing_prompts and report.rule != "none":
        yield comment(
            '`prompts` is a file of JSON lines such as {"prompt": "How many are left?"}, some hundreds of the'
        )
        yield comment("expert's task, best its training data. With prompts of every expert, a router is fitted.")
    yield "experts:"
    known = list(zip(choices.experts, report.experts, strict=True))
    for folder, group in groupby(known, key=lambda pair: pair[0].folder):
        if folder:
            yield from _folder(folder, [facts for _, facts in group], is_routed=report.rule != "none")
            continue
        for expert, facts in group:
            yield from _expert(expert, facts, is_routed=report.rule != "none")


def _folder(folder: str, experts: Sequence[SourceFacts], *, is_routed: bool) -> Iterator[str]:
    names = ", ".join(facts.name for facts in experts[:_SHOWN]) + (", …" if len(experts) > _SHOWN else "")
    yield comment(f"Every adapter or model in the folder, {len(experts)} now: {names}.")
    yield f"  - from: {scalar(folder)}  {comment(f'the first: {_about(experts[0])}')}"
    if is_routed:
        yield '    # prompts: "{name}.train.jsonl"'


def _expert(expert: DraftExpert, facts: SourceFacts, *, is_routed: bool) -> Iterator[str]:
    yield f"  - name: {scalar(expert.name)}  {comment(_about(facts))}"
    yield f"    model: {scalar(expert.model)}"
    if expert.prompts is not None:
        yield f"    prompts: {scalar(expert.prompts)}"
    elif is_routed:
        yield f"    # prompts: {expert.name}.train.jsonl"


def _stages(choices: Choices, report: DraftReport) -> Iterator[str]:
    if report.rule == "none":
        yield comment(f"A plain merge: {choices.why_none}.")
        yield "assign: {rule: none}"
    else:
        yield comment(
            "Which layers are routed, kept for each expert: `all` measured best; `mean_std` those where experts"
        )
        others = ", ".join(rule for rule in get_args(Rule) if rule not in ("all", "mean_std", "none"))
        yield comment(f"disagree more than on the mean; `none` makes a plain merge; others: {others}.")
        yield "assign: {rule: all, candidates: layers}"
    yield comment(
        "How the experts are averaged: linear, task_arithmetic, ties, dare_ties, …; `mediator methods` lists them."
    )
    yield "average: {method: linear}"
    if report.rule != "none":
        default = ExtractSpec()
        yield comment(
            "Share of each routed tensor's entries that a sparse expert keeps, and how a value is stored. All sparse"
        )
        yield comment(f"experts take {human_bytes(report.sparse_bytes)}; {_prices(report)}.")
        yield f"extract: {{density: {default.density}, values: {default.values}}}"


def _prices(report: DraftReport) -> str:
    told = [f"{p.density:g} with {p.values} {human_bytes(p.sparse_bytes)}" for p in report.prices]
    return f"density {', '.join(told)}, which gives routed layers back bit for bit"


def _settings(choices: Choices, report: DraftReport) -> Iterator[str]:
    yield comment("Whose tokenizer, chat template, token ids and generation config the result has: base, expert:NAME,")
    yield comment("or union: the base's and what experts added to it.")
    for item in report.differences[:_SHOWN]:
        yield comment(f"  differs: {item.setting}, {item.winner} wins over {', '.join(item.others)}")
    if len(report.differences) > _SHOWN:
        yield comment(f"  and {len(report.differences) - _SHOWN} more; `mediator plan {report.recipe}` lists them")
    yield f"tokenizer: {scalar(choices.tokenizer)}"
    yield comment("Where the bundle goes (-o wins). dtype: base, bfloat16, float16 or float32; shard_size: 5GB.")
    yield f"output: {{path: {scalar(choices.output)}, dtype: base}}"
