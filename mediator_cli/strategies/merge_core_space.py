"""One model: adapters merged as small matrices in a basis that all of them share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mediator_cli.strategies._catalogue import fit_merge, merge_factors
from mediator_cli.strategies._fitting import Scale, TuningRows, names_of
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Merge = Annotated[
    Literal["tsv", "ties", "cart", "mean", "sum"], Field(description="How the small matrices are merged.")
]
Isotropize = Annotated[bool, Field(description="Give all directions of the result their mean singular value.")]


@strategy(group="merge", reference="https://github.com/apanariello4/core-space-merging", needs=("rows",))
def merge_core_space(
    bench: Bench,
    *,
    merge: Merge = "tsv",
    isotropize: Isotropize = False,
    scale: Scale = None,
    tuning_rows: TuningRows = 16,
) -> Fitted:
    """Merge experts in the smallest basis that holds all of them, where each is a small matrix, and go back.

    It is the catalogue's `core_space` with `lambda: 1`, and the weights 1 / T where it sums (`tsv`, `sum`), else 1; the
    rank is at most the sum of the ranks.
    """
    given = {"merge": merge, "isotropize": isotropize}
    weight = 1 / len(names_of(bench)) if merge in ("tsv", "sum") else 1.0
    return fit_merge(bench, partial(merge_factors, bench, "core_space", given), weight, scale, tuning_rows)
