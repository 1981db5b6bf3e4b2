"""One model: the mean of all experts' changes, cut to a rank."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mediator_cli.strategies._catalogue import fit_merge, merge_and_cut
from mediator_cli.strategies._fitting import Scale, TuningRows, names_of
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Rank = Annotated[int, Field(ge=0, description="Rank of the result, at most; 0: the largest of the adapters'.")]


@strategy(group="merge", reference="https://huggingface.co/docs/peft/developer_guides/model_merging", needs=("rows",))
def merge_svd(bench: Bench, *, rank: Rank = 0, scale: Scale = None, tuning_rows: TuningRows = 16) -> Fitted:
    """Average the experts' changes and keep the largest singular directions: the nearest adapter of that rank.

    It is the catalogue's `lora_svd` with the weights 1 / T; `facts` tell the share of energy that is left.
    """
    merge = partial(merge_and_cut, bench, "lora_svd", {}, lambda ranks: rank or max(ranks))
    return fit_merge(bench, merge, 1 / len(names_of(bench)), scale, tuning_rows)
