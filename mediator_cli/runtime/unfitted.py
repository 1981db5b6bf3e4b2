"""Routers that fit nothing: the experts are asked, and softmax makes probabilities of what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.runtime.calibrate import fit_temperature, softmax
from mediator_cli.runtime.fit import FittedRouter, choose_usable, doubts, read_rows, report_of
from mediator_cli.runtime.router import scores_of, unlikeness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mediator_cli.bundle.router_record import RouterReport
    from mediator_cli.runtime.features import FeatureReader, Kind
    from mediator_cli.runtime.fit import FitSettings, Rows

TEMPERATURES: dict[Kind, float] = {"perplexity": 1.0, "gradient": 0.001}
"""MergeME's own for perplexity; cosines of 10^8 numbers are so small that softmax makes equal shares of them at 1. On
the demo's prompts 0.001 had the least log loss for the gradient: 0.92 nats, against 1.39 at 1 (40 prompts)."""


def unmeasured(settings: FitSettings, experts: Sequence[str]) -> FittedRouter:
    """Make a router that asks the experts, without any prompt to measure it on."""
    return FittedRouter(
        settings=settings,
        experts=tuple(experts),
        size=len(experts),
        temperature=settings.temperature or TEMPERATURES[settings.features.kind],
        outside_above=None,
        report=None,
        arrays={},
        notices=(),
    )


def measured(
    reader: FeatureReader,
    encode: Callable[[str], list[int]],
    prompts: Mapping[str, Sequence[str]],
    settings: FitSettings,
) -> FittedRouter:
    """Make a router that asks the experts, and measure it on prompts by expert; set its temperature if that is wanted.

    Only held-out prompts are asked about. Raises BundleError as `choose_prompts` does.
    """
    plain = unmeasured(settings, tuple(prompts))
    chosen = choose_usable(reader, encode, prompts, settings)
    rows = read_rows(reader, encode, chosen.held_out)
    temperature, test = plain.temperature, rows
    if settings.calibrate == "temperature":
        calibration, test = rows.halves()
        temperature = fit_temperature(_scores(plain, calibration), calibration.labels)
    report = report_of(softmax(_scores(plain, test), temperature), test.labels, 0)
    spoken = rows.features[rows.features[:, -1] > 0, :-1]
    strangest = unlikeness(settings.features.kind, spoken)
    return FittedRouter(
        settings=settings,
        experts=plain.experts,
        size=plain.size,
        temperature=temperature,
        outside_above=float(np.quantile(strangest, settings.outside_quantile)) if len(spoken) else None,
        report=report,
        arrays={},
        notices=(*chosen.notices, *_advice(report)),
    )


def _scores(router: FittedRouter, rows: Rows) -> NDArray[np.float64]:
    return scores_of(router.record(None), rows.features[:, :-1], rows.features[:, -1])


def _advice(report: RouterReport) -> Iterator[str]:
    for doubt in doubts(report):
        yield f"{doubt}; a classifier can be fitted to what experts say: router.classifier: logistic"
