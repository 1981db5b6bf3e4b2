"""Fit a router: share the prompts out, fit, calibrate, and measure on prompts that the fit has not seen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import combinations, islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord, RouterReport
from mediator_cli.errors import BundleError, Problem
from mediator_cli.runtime.calibrate import calibration_error, confusion, fit_temperature, log_loss, softmax
from mediator_cli.runtime.classify import fit_classifier, logits, ridge_sums, solve_ridge
from mediator_cli.runtime.features import FeatureSpec
from mediator_cli.runtime.outside import fit_outside, outside_score
from mediator_cli.runtime.router import router_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence, Sized

    from numpy.typing import NDArray

    from mediator_cli.bundle.record import FileRecord
    from mediator_cli.runtime.classify import Classifier, Kind, RidgeSums
    from mediator_cli.runtime.features import FeatureReader

FEWEST_PROMPTS = 8
"""Of 8 prompts, 2 are held out: one to calibrate on and one to measure on."""
_MOST_SHARED = 0.5
_DOUBTFUL = 0.8


@dataclass(frozen=True)
class FitSettings:
    """How a router is fitted; `held_out` is the share of each expert's prompts that calibrate and measure it.

    `form` and `temperature` are for classifier `none`, which asks the experts and fits nothing (`unfitted.py`).
    """

    features: FeatureSpec = field(default_factory=lambda: FeatureSpec("embedding_mean"))
    classifier: Kind | Literal["none"] = "logistic"
    calibrate: Literal["temperature", "none"] = "temperature"
    held_out: float = 0.2
    max_prompts: int = 1000
    outside_quantile: float = 0.99
    policy: PolicyRecord = field(default_factory=PolicyRecord)
    form: Literal["inverse", "posterior"] | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class FittedRouter:
    """A router before it is written: all that its record says but the file, its arrays, and what is worth knowing."""

    settings: FitSettings
    experts: tuple[str, ...]
    size: int
    temperature: float
    outside_above: float | None
    report: RouterReport | None
    arrays: dict[str, NDArray[np.generic]]
    notices: tuple[str, ...]

    def record(self, file: FileRecord | None) -> RouterRecord:
        """Make the manifest's record, once the arrays are in a file; None where there are none."""
        spec = self.settings.features
        return RouterRecord(
            features=spec.kind,
            layer=spec.layer,
            reads=spec.reads,
            first_token=spec.first_token,
            form=self.settings.form,
            classifier=self.settings.classifier,
            experts=self.experts,
            size=self.size,
            temperature=self.temperature,
            outside_above=self.outside_above,
            policy=self.settings.policy,
            report=self.report,
            file=file,
        )


@dataclass(frozen=True)
class Chosen:
    """The prompts that a router is fitted on and those held out, by expert, and what was left out."""

    fitted: dict[str, tuple[str, ...]]
    held_out: dict[str, tuple[str, ...]]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Features [rows, features] and the number of the expert of each row [rows]."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]

    def halves(self) -> tuple[Rows, Rows]:
        """Share rows between two halves, each expert's in turn; rows of an expert stand together."""
        first = np.searchsorted(self.labels, self.labels)
        is_second = (np.arange(len(self.labels)) - first) % 2 == 1
        one, other = (Rows(self.features[part], self.labels[part]) for part in (~is_second, is_second))
        return one, other


def choose_prompts(
    prompts: Mapping[str, Sequence[str]], settings: FitSettings, fits: Callable[[str], bool] = bool, fewest: int = 2
) -> Chosen:
    """Choose and share out prompts by the digests of their texts, so that their order in a file does not matter.

    Prompts that several experts have, and those that do not fit, are left out. Raises BundleError, with every problem,
    for fewer than `fewest` experts, for one with too few prompts, and for experts whose prompts are much the same.
    """
    distinct = {name: {text.strip() for text in texts} - {""} for name, texts in prompts.items()}
    if len(distinct) < fewest:
        raise BundleError(Problem("prompts", "a router needs two experts to choose from", "give prompts of another"))
    shared = {pair: distinct[pair[0]] & distinct[pair[1]] for pair in combinations(distinct, 2)}
    if problems := [*_too_few(distinct), *_same_tasks(distinct, shared)]:
        raise BundleError(problems)
    common: set[str] = set().union(*shared.values())
    ordered = {name: sorted(texts - common, key=_digest) for name, texts in distinct.items()}
    drawn = {name: tuple(islice(filter(fits, texts), settings.max_prompts)) for name, texts in ordered.items()}
    if problems := list(_too_few(drawn)):
        raise BundleError(problems)
    cut = {name: _n_held_out(len(texts), settings.held_out) for name, texts in drawn.items()}
    return Chosen(
        {name: texts[cut[name] :] for name, texts in drawn.items()},
        {name: texts[: cut[name]] for name, texts in drawn.items()},
        (f"{len(common)} prompts of more than one expert are left out of the router",) if common else (),
    )


def _same_tasks(distinct: Mapping[str, set[str]], shared: Mapping[tuple[str, str], set[str]]) -> Iterator[Problem]:
    for (one, other), texts in shared.items():
        fewer = min(len(distinct[one]), len(distinct[other]))
        if len(texts) > _MOST_SHARED * fewer:
            message = f"{one} and {other} share {len(texts)} of {fewer} prompts; no router can tell them apart"
            yield Problem("prompts", message, "give each expert prompts of its own task")


def _too_few(prompts: Mapping[str, Sized]) -> Iterator[Problem]:
    for name, texts in prompts.items():
        if len(texts) < FEWEST_PROMPTS:
            message = f"{name} has {len(texts)} usable prompts of its own, a router needs {FEWEST_PROMPTS}"
            yield Problem("prompts", message, "give more; some hundreds are good")


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()


def _n_held_out(count: int, share: float) -> int:
    # Two at least, one to calibrate on and one to measure on, and two at least for the fit.
    return min(max(2, round(count * share)), count - 2)


def fit_router(
    reader: FeatureReader,
    encode: Callable[[str], list[int]],
    prompts: Mapping[str, Sequence[str]],
    settings: FitSettings,
) -> FittedRouter:
    """Fit a router on prompts by expert; `encode` gives the content ids of a text. Deterministic.

    Raises BundleError as `choose_prompts` does, and when too few prompts are short enough for the features.
    """
    if settings.classifier == "none":
        raise ValueError("classifier none fits nothing")
    chosen = choose_usable(reader, encode, prompts, settings)
    fitted, held_out = (read_rows(reader, encode, part) for part in (chosen.fitted, chosen.held_out))
    if reader.spec.asks:
        # The last column counts tokens, and how long a prompt is should not decide.
        fitted, held_out = (Rows(rows.features[:, :-1], rows.labels) for rows in (fitted, held_out))
    classifier, sums = _fit(fitted, settings, len(prompts))
    calibration, test = held_out.halves()
    temperature = 1.0
    if settings.calibrate == "temperature":
        temperature = fit_temperature(logits(classifier, calibration.features), calibration.labels)
    probabilities = softmax(logits(classifier, test.features), temperature)
    report = report_of(probabilities, test.labels, len(fitted.labels))
    outside = fit_outside(fitted.features, fitted.labels, len(prompts))
    return FittedRouter(
        settings=settings,
        experts=tuple(prompts),
        size=fitted.features.shape[1],
        temperature=temperature,
        outside_above=float(np.quantile(outside_score(outside, held_out.features), settings.outside_quantile)),
        report=report,
        arrays=router_arrays(classifier, outside, sums),
        notices=(*chosen.notices, *doubts(report)),
    )


def choose_usable(
    reader: FeatureReader,
    encode: Callable[[str], list[int]],
    prompts: Mapping[str, Sequence[str]],
    settings: FitSettings,
    fewest: int = 2,
) -> Chosen:
    """Choose prompts as `choose_prompts` does, those alone that the features can be read of."""
    unfit: set[str] = set()

    def fits(text: str) -> bool:
        ids = encode(text)
        if is_fit := bool(ids) and not reader.is_too_long(ids):
            return is_fit
        unfit.add(text)
        return False

    chosen = choose_prompts(prompts, settings, fits, fewest)
    if not unfit:
        return chosen
    more = f" or of more than {reader.limit}" if reader.limit else ""
    return replace(chosen, notices=(*chosen.notices, f"{len(unfit)} prompts without tokens{more} are left out"))


def read_rows(reader: FeatureReader, encode: Callable[[str], list[int]], texts: Mapping[str, Sequence[str]]) -> Rows:
    """Read the features of texts by expert."""
    features = reader.read([encode(text) for group in texts.values() for text in group])
    return Rows(features, np.repeat(np.arange(len(texts)), [len(group) for group in texts.values()]))


def _fit(rows: Rows, settings: FitSettings, n_experts: int) -> tuple[Classifier, RidgeSums | None]:
    if settings.classifier != "ridge" and settings.classifier != "none":
        return fit_classifier(settings.classifier, rows.features, rows.labels, n_experts), None
    sums = ridge_sums(rows.features, rows.labels, n_experts)
    return solve_ridge(sums), sums


def report_of(probabilities: NDArray[np.float64], labels: NDArray[np.int64], n_fitted: int) -> RouterReport:
    """Measure probabilities [rows, experts] of prompts that the fit has not seen against the right experts [rows]."""
    chosen = probabilities.argmax(axis=1)
    counts = confusion(labels, chosen, probabilities.shape[1])
    return RouterReport(
        n_fitted=n_fitted,
        n_held_out=len(labels),
        accuracy=float((chosen == labels).mean()),
        log_loss=log_loss(probabilities, labels),
        calibration_error=calibration_error(probabilities, labels),
        confusion=tuple(tuple(int(n) for n in row) for row in counts),
    )


def doubts(report: RouterReport) -> Iterator[str]:
    """Warn of a router that is often wrong."""
    if report.accuracy < _DOUBTFUL:
        yield f"the router is right on only {report.accuracy:.0%} of {report.n_held_out} held-out prompts"
