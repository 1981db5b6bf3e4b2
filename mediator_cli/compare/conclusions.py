"""The questions that a contest is held for, answered from its numbers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.compare.paired import difference_of, is_level

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.compare.contest import Scores
    from mediator_cli.compare.result import Result
    from mediator_cli.evaluate.report import Difference

NEAR = 0.01
"""How far from the best is near enough to ask for the cheapest: one point."""


@dataclass(frozen=True)
class Conclusion:
    """One question with its answer; `one` against `other` where two strategies were compared."""

    question: str
    answer: str
    one: str | None = None
    other: str | None = None
    difference: Difference | None = None


def conclude(
    results: Sequence[Result],
    scores: Mapping[str, Scores],
    seen: Sequence[str],
    held_out: Sequence[str],
    seed: int = 0,
) -> Iterator[Conclusion]:
    """Answer the questions for which there are strategies to compare, in the order in which people ask them.

    Who speaks for a group is chosen on validation rows, so that test rows decide nothing twice.
    """
    rows = _Rows(results, scores, seed)
    for group in ("ensemble", "merge"):
        yield from rows.uniform(group, seen)
    yield from rows.routing(seen)
    yield from _cheapest(results)
    if held_out:
        yield from rows.held_out(held_out)


@dataclass(frozen=True)
class _Rows:
    results: Sequence[Result]
    scores: Mapping[str, Scores]
    seed: int

    def first(self, group: str, *, uniform: bool | None = None) -> Result | None:
        """Find who speaks for a group: the most exact on validation rows, of several the one with the smaller loss."""
        own = [each for each in self.results if each.group == group and each.valid and each.seen]
        own = [each for each in own if uniform is None or is_uniform(each) == uniform]
        return max(own, key=_on_valid, default=None)

    def against(self, question: str, one: Result, other: Result, tasks: Sequence[str], what: str = "") -> Conclusion:
        """Compare two strategies on test rows, in words."""
        found = difference_of(self.scores[one.name], self.scores[other.name], tasks, self.seed, one.name)
        points = (
            f"{100 * found.difference:+.1f} points, 95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"
        )
        verdict = "not told apart by these rows" if is_level(found) else "yes" if found.difference > 0 else "no, worse"
        answer = f"{verdict}: {one.name} against {other.name}{what} {points}"
        return Conclusion(question, answer, one.name, other.name, found)

    def uniform(self, group: str, seen: Sequence[str]) -> Iterator[Conclusion]:
        even, other = self.first(group, uniform=True), self.first(group, uniform=False)
        if even is not None and other is not None:
            said = "ensembling" if group == "ensemble" else "merging"
            yield self.against(f"Does non-uniform beat uniform {said}?", other, even, seen)

    def routing(self, seen: Sequence[str]) -> Iterator[Conclusion]:
        route = self.first("route")
        for group in ("ensemble", "merge"):
            other = self.first(group)
            if route is not None and other is not None:
                said = "ensembling" if group == "ensemble" else "merging"
                yield self.against(f"Does routing beat {said}?", route, other, seen)

    def held_out(self, tasks: Sequence[str]) -> Iterator[Conclusion]:
        base = next((each for each in self.results if each.strategy == "base" and each.held_out), None)
        for group in ("ensemble", "merge", "route"):
            one = self.first(group)
            if base is not None and one is not None and one.held_out is not None:
                yield self.against(f"Does the best {group} help on held-out tasks?", one, base, tasks)


def is_uniform(result: Result) -> bool:
    """Whether a strategy gives all experts the same say."""
    return result.strategy.endswith("_uniform")


def _on_valid(result: Result) -> tuple[float, float]:
    return (result.valid.accuracy, -result.valid.loss) if result.valid else (-1.0, 0.0)


def _cheapest(results: Sequence[Result]) -> Iterator[Conclusion]:
    name = best_of(results)
    known = {each.name: each.seen.accuracy for each in results if each.seen and not each.is_reference}
    if name is None or len(known) < 2:
        return
    near = [each for each in results if each.name in known and known[each.name] >= known[name] - NEAR]
    cheap = min(near, key=lambda each: (round(each.cost.passes, 3), each.cost.n_bytes, -known[each.name], each.name))
    answer = (
        f"{cheap.name}: {100 * known[cheap.name]:.1f} % (best {100 * known[name]:.1f} %, {name}), "
        f"{cheap.cost.passes:.2f} passes, {cheap.cost.n_bytes / 1e6:.1f} MB beside the base"
    )
    yield Conclusion("What is the cheapest within one point of the best?", answer, cheap.name, name)


def best_of(results: Sequence[Result]) -> str | None:
    """Name the best on test rows that is no reference, of several the one with the smaller loss."""
    known = [
        (each.seen.accuracy, -each.seen.loss, each.name) for each in results if each.seen and not each.is_reference
    ]
    return max(known)[2] if known else None
