"""How many experts are enough: every selection at every size, answering in every way; results are kept on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mediator_cli.compare.paired import Mean, mean_of
from mediator_cli.compare.result import Kept, NotKept
from mediator_cli.compare.store import save
from mediator_cli.compare.strategies_run import FORMAT, rows_digest
from mediator_cli.errors import CheckpointError, MediatorError, Problem, RecipeError
from mediator_cli.strategies.selection.curve import curve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mediator_cli.compare.strategies_run import Contest
    from mediator_cli.recipe.compare import LoadedCompare, SelectionSpec
    from mediator_cli.strategies.selection.curve import Point

CLUSTERING = ("mbc", "outputs")


@dataclass(frozen=True)
class Ask:
    """One selection at one size; `representative` is of selectors that make clusters."""

    selector: str
    representative: str | None
    k: int

    @property
    def shown(self) -> str:
        """What it is called."""
        return f"{self.selector}{f' ({self.representative})' if self.representative else ''}, {self.k} kept"


def sizes_of(loaded: LoadedCompare) -> tuple[int, ...]:
    """Give the numbers of experts that are kept; without a list 1, 2, 4 and so on, and all.

    Raises RecipeError for more than there are.
    """
    spec, total = loaded.recipe.selection, len(loaded.recipe.experts)
    if spec is None:
        return ()
    if spec.k is None:
        return tuple(sorted({2**n for n in range(total.bit_length()) if 2**n < total} | {total}))
    if too_many := [(at, k) for at, k in enumerate(spec.k) if k > total]:
        at, k = too_many[0]
        place = loaded.place("selection", "k", at)
        raise RecipeError(Problem(place, f"there are {total} experts, {k} cannot be kept", f"at most {total}"))
    return tuple(dict.fromkeys(spec.k))


def asks_of(spec: SelectionSpec, sizes: Sequence[int]) -> list[Ask]:
    """List all selections, size by size of each."""
    return [
        Ask(name, how, k)
        for name in spec.selectors
        for how in (spec.representatives if name in CLUSTERING else (None,))
        for k in sizes
    ]


def run_selections(contest: Contest, spec: SelectionSpec, sizes: Sequence[int]) -> Iterator[Kept | NotKept]:
    """Score all selections one by one; what an earlier run found is taken from disk, what cannot be done is told."""
    asks = asks_of(spec, sizes)
    for at, ask in enumerate(asks, 1):
        file = _file_of(contest, spec, ask)
        if file.is_file():
            yield from _load(file)
        else:
            contest.say(f"selection {at} of {len(asks)}: {ask.shown}")
            yield from _run(contest, spec, ask, file)
        contest.progress("selections", at, len(asks))


def _run(contest: Contest, spec: SelectionSpec, ask: Ask, file: Path) -> Iterator[Kept | NotKept]:
    try:
        found = [_kept(contest, ask, point) for point in _points(contest, spec, ask)]
    except MediatorError as error:
        yield NotKept(ask.shown, error.problems)
        return
    save(file, [asdict(each) for each in found])
    yield from found


def _points(contest: Contest, spec: SelectionSpec, ask: Ask) -> Iterator[Point]:
    how = ask.representative or "medoid"
    return curve(contest.bench, [ask.selector], [ask.k], spec.kinds, representative=how)  # type: ignore[arg-type]


def _kept(contest: Contest, ask: Ask, point: Point) -> Kept:
    scores = {task: tuple(rows) for task, rows in point.by_task.items()}
    return Kept(
        ask.selector,
        ask.representative,
        point.kind,
        point.k,
        tuple(point.experts),
        mean_of(scores, [task.name for task in contest.tasks if not task.is_held_out]),
        mean_of(scores, [task.name for task in contest.tasks if task.is_held_out]),
        point.valid_loss,
        point.n_bytes,
    )


def _file_of(contest: Contest, spec: SelectionSpec, ask: Ask) -> Path:
    key = [FORMAT, contest.version, contest.seed, contest.sources.digest, rows_digest(contest), list(spec.kinds)]
    digest = hashlib.sha256(json.dumps([key, asdict(ask)]).encode()).hexdigest()[:16]
    return contest.folder / "selections" / f"{ask.selector}-{ask.k}-{digest}.json"


def _load(file: Path) -> Iterator[Kept]:
    try:
        for data in json.loads(file.read_text(encoding="utf-8")):
            means = {name: Mean(**data[name]) if data[name] else None for name in ("seen", "held_out")}
            yield Kept(**{**data, **means, "experts": tuple(data["experts"])})
    except (ValueError, TypeError, KeyError):
        hint = "remove it, its selection runs again"
        raise CheckpointError(Problem(str(file), "holds no results", hint)) from None
