"""A router that reads the prompt, fitted on the prompts of a library's tasks, in memory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.manifest import ROUTER
from mediator_cli.bundle.record import FileRecord
from mediator_cli.runtime.ask import asking_reader, text_ids
from mediator_cli.runtime.features import model_reader
from mediator_cli.runtime.fit import fit_router
from mediator_cli.runtime.prompts import prompt_reader
from mediator_cli.runtime.router import Router, make_router

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.runtime.fit import FitSettings, FittedRouter
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.strategy import Fitted


def fit_on_prompts(
    bench: Bench, answered: Fitted, rows: Mapping[str, Sequence[Row]], settings: FitSettings
) -> tuple[Router, dict[str, Any]]:
    """Fit a router on the prompts of rows by expert, read with the model as `answered` leaves it; router and facts.

    Raises BundleError for too few prompts of an expert, or experts whose prompts are the same.
    """
    prompts = {name: [row.prompt for row in own] for name, own in rows.items()}
    bench.progress("fitting the router", 0, 1)
    turns = prompt_reader(bench.tokenizer)
    with bench.answering(answered) as model, model.mixing("dense"):
        read = asking_reader(model, turns, settings.features) if settings.features.asks else None
        reader = read or model_reader(model, bench.tokenizer, settings.features)
        fitted = fit_router(reader, partial(text_ids, turns, settings.features), prompts, settings)
    bench.progress("fitting the router", 1, 1)
    return _in_memory(fitted), _facts(fitted)


def _in_memory(fitted: FittedRouter) -> Router:
    # What a bundle of it would be written to; the digest is known only then.
    return make_router(fitted.record(FileRecord(name=ROUTER, bytes=0, sha256="")), fitted.arrays)


def _facts(fitted: FittedRouter) -> dict[str, Any]:
    facts: dict[str, Any] = {"temperature": fitted.temperature, "notices": list(fitted.notices)}
    if fitted.report is not None:
        facts |= {name: getattr(fitted.report, name) for name in ("n_fitted", "n_held_out", "accuracy", "log_loss")}
    return facts
