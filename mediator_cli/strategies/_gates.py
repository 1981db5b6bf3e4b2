"""What all strategies of gates share: where gates stand, how experts look from there, and gates made of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from mediator_cli.runtime.gates import Gate, as_read
from mediator_cli.runtime.gating import gate_places, gate_sizes, states_of
from mediator_cli.strategies.batches import Example, make_batch, read_examples

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.bundle.gates_record import GateRule
    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.strategies.batches import Batch
    from mediator_cli.strategies.bench import Bench

At = Literal["module", "layer"]
AtParameter = Annotated[At, Field(description="A gate for each matrix, or one for all matrices of a decoder layer.")]
Seen = Literal["last", "prompt"]
_ROWS = 8
_LEAST_SPREAD = 1e-6


@dataclass(frozen=True, eq=False)
class Averages:
    """What a place reads on average: `own` [experts, in] of each expert's prompts, `spread` [in] over all tokens."""

    own: torch.Tensor
    spread: torch.Tensor


def places_of(bench: Bench, at: At) -> dict[str, int]:
    """List where gates stand, with the width of what they read: matrices that experts change, or decoder layers."""
    changed = {name for change in bench.library.experts.values() for name in change}
    if at == "layer":
        return gate_places(bench.model)
    return {name: size for name, size in gate_sizes(bench.model).items() if name in changed}


def average_states(
    bench: Bench, rule: GateRule, rows: Mapping[str, Sequence[Row]], most: int, seen: Seen
) -> dict[str, Averages]:
    """Read at most so many prompts of each expert with the base, and average what each place reads of them.

    Of a prompt, either its last token counts or the mean of all. `rows` are those of each expert, in their order.
    """
    examples = {name: _prompts(bench, own[:most]) for name, own in rows.items()}
    sums = {name: _Sums(rule, seen) for name in places_of(bench, rule.at)}
    done, total = 0, sum(map(len, examples.values()))
    for own in examples.values():
        for each in sums.values():
            each.start()
        for start in range(0, len(own), _ROWS):
            _read(bench, rule, sums, make_batch(own[start : start + _ROWS]))
            done += len(own[start : start + _ROWS])
            bench.progress("reading prompts", done, total)
    return {name: each.averages() for name, each in sums.items()}


def _prompts(bench: Bench, rows: Sequence[Row]) -> list[Example]:
    # One target, which is not fed: the pass ends with the prompt.
    return [Example(example.prompt, (0,)) for example in read_examples(bench.model, bench.tokenizer, rows)]


@dataclass
class _Sums:
    """Running sums of what one place reads."""

    rule: GateRule
    seen: Seen
    own: list[list[torch.Tensor]] = None  # type: ignore[assignment]
    tokens: list[torch.Tensor] = None  # type: ignore[assignment]

    def start(self) -> None:
        """Begin with the next expert."""
        self.own = [*(self.own or []), []]

    def add(self, states: torch.Tensor, mask: torch.Tensor) -> None:
        """Take in states [rows, tokens, in], padded at the left."""
        raw, share = states.float(), mask[..., None].float()
        read = as_read(raw, self.rule)
        if self.seen == "last":
            found = read[:, -1]
        elif self.rule.per == "sequence":
            found = as_read((raw * share).sum(1) / share.sum(1), self.rule)
        else:
            found = (read * share).sum(1) / share.sum(1)
        self.own[-1].append(found)
        flat = read[mask.bool()]
        moments = torch.stack([torch.ones_like(flat[0]) * len(flat), flat.sum(0), (flat**2).sum(0)])
        self.tokens = [*(self.tokens or []), moments.double()]

    def averages(self) -> Averages:
        """Finish."""
        count, total, squares = torch.stack(self.tokens).sum(0)
        variance = (squares / count - (total / count) ** 2).clamp(min=0).float()
        spread = (variance + _LEAST_SPREAD * variance.mean() + torch.finfo(torch.float32).tiny).sqrt()
        return Averages(torch.stack([torch.cat(part).mean(0) for part in self.own]), spread)


@torch.no_grad()
def _read(bench: Bench, rule: GateRule, sums: Mapping[str, _Sums], batch: Batch) -> None:
    hooks = [
        module.register_forward_pre_hook(_adder(sums[name], batch.mask), with_kwargs=True)
        for name, module in _modules(bench, rule.at)
        if name in sums
    ]
    try:
        with bench.model.mixing("dense"):
            bench.model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=(batch.mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=1,
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()


def _modules(bench: Bench, at: At) -> Iterator[tuple[str, torch.nn.Module]]:
    if at == "layer":
        yield from ((path, bench.model.get_submodule(path)) for path in gate_places(bench.model))
        return
    for module, mixer in zip(bench.model.opened.modules, bench.model.opened.mixers, strict=True):
        yield mixer.name, module


def _adder(sums: _Sums, mask: torch.Tensor) -> Any:  # noqa: ANN401 - a hook
    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sums.add(states_of(args, kwargs), mask)

    return hook


def contrast(averages: Averages, margin: float) -> Gate:
    """Make a gate of averages: how far a state lies from the middle of all experts towards each one's own average.

    Every number that is read counts in units of its spread over tokens, so that the few huge ones that all prompts
    share do not decide. Scores are scaled so that at its own average an expert is `margin` above the others' mean.
    """
    middle = averages.own.mean(0)
    away = torch.nn.functional.normalize((averages.own - middle) / averages.spread, dim=-1) / averages.spread
    scores = (averages.own - middle) @ away.t()
    n_experts = len(scores)
    others = (scores.sum(1) - scores.diagonal()) / max(n_experts - 1, 1)
    typical = (scores.diagonal() - others).mean()
    directions = away * (margin / typical if typical > 0 else 0.0)
    return Gate(directions[:, None].contiguous(), -directions @ middle)
