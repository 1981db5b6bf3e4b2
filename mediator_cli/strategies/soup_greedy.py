"""One model: the mean of a few experts, chosen one by one."""

from __future__ import annotations

from collections import Counter
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mediator_cli.strategies._fitting import TuningRows, largest_rank, names_of, rows_to_fit
from mediator_cli.strategies.library import summed
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.library import Change

Most = Annotated[int, Field(ge=1, description="How many experts are chosen at most, those chosen again included.")]


@strategy(group="merge", reference="https://arxiv.org/abs/2203.05482", needs=("rows",))
def soup_greedy(bench: Bench, *, most: Most = 8, tuning_rows: TuningRows = 4) -> Fitted:
    """Add the expert whose mean with those chosen so far has the least validation loss, as long as it falls.

    W + Σ cₜ bₜaₜ / Σ cₜ, where cₜ counts how often an expert was chosen. It starts with the best single expert, even
    where the base has less loss: of many tasks each expert alone may do harm, and a few of them together none. Each
    choice tries all experts, each in a pass over the rows. Of equal ones the first is taken. The soups of fine-tuned
    models choose each once, in the order of their own losses.
    """
    started, names = perf_counter(), names_of(bench)
    rows = rows_to_fit(bench, tuning_rows)
    chosen: list[str] = []
    losses, n_tries = [bench.loss(Fitted(), rows)], 1
    while len(chosen) < most:
        tried = {name: bench.loss(Fitted(folded=(_mean(bench, [*chosen, name]),)), rows) for name in names}
        n_tries += len(tried)
        best = min(tried, key=lambda name: tried[name])
        bench.progress("add experts", len(chosen) + 1, most)
        if chosen and tried[best] >= losses[-1]:
            break
        chosen.append(best)
        losses.append(tried[best])
    change = _mean(bench, chosen)
    facts = {
        "weights": {name: chosen.count(name) / max(len(chosen), 1) for name in names},
        "chosen": chosen,
        "losses": losses,
        "tries": n_tries,
        "rank": largest_rank(change),
        "seconds": perf_counter() - started,
    }
    return Fitted(folded=(change,) if chosen else (), facts=facts)


def _mean(bench: Bench, chosen: list[str]) -> Change:
    counts = Counter(chosen)
    return summed([(bench.library.experts[name], count / len(chosen)) for name, count in counts.items()])
