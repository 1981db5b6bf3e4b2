"""The router of a bundle whose experts become one more or one less: in closed form where that is possible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.errors import BundleError, MediatorError, Problem
from mediator_cli.pipeline.change.new_router import NewRouter
from mediator_cli.pipeline.router import RouterJob, find_prompts, fit_job, fit_settings
from mediator_cli.plan.prompts import read_prompts
from mediator_cli.recipe.router import RouterSpec
from mediator_cli.runtime.ask import text_ids
from mediator_cli.runtime.calibrate import fit_temperature, softmax
from mediator_cli.runtime.classify import add_task, logits, solve_ridge
from mediator_cli.runtime.dense_features import folder_reader
from mediator_cli.runtime.extend import (
    add_centre,
    add_prototype,
    are_rows_of,
    drop_centre,
    drop_row,
    remove_task,
)
from mediator_cli.runtime.features import spec_of
from mediator_cli.runtime.fit import (
    FittedRouter,
    Rows,
    choose_prompts,
    choose_usable,
    doubts,
    read_rows,
    report_of,
)
from mediator_cli.runtime.outside import outside_score
from mediator_cli.runtime.prompts import load_tokenizer, prompt_reader
from mediator_cli.runtime.router import read_ridge_sums, read_router, router_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.bundle.manifest import Manifest, SourceRecord
    from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord
    from mediator_cli.recipe.schema import Recipe
    from mediator_cli.runtime.classify import Classifier, RidgeSums
    from mediator_cli.runtime.features import FeatureReader
    from mediator_cli.runtime.fit import FitSettings
    from mediator_cli.runtime.outside import OutsideModel
    from mediator_cli.runtime.router import Router

_LEFT = "the router is not measured: the prompts that the other experts were fitted with are not all there"
_LATER = "`mediator fit-router` fits and measures it anew"


def router_with(
    folder: Path, manifest: Manifest, recipe: Recipe, added: SourceRecord, texts: Sequence[str] | None
) -> NewRouter:
    """Give a bundle's router one more expert; `texts` are the newcomer's prompts, None where none are given.

    The bundle has one. Raises BundleError where that is not possible, or its prompts are too few or not its own.
    """
    record = _record_of(manifest)
    if record.classifier == "none":
        return _unfitted(record, (*record.experts, added.name))
    old = _Old(folder, manifest, record, _settings(record, recipe))
    if texts is None:
        message = f"the router is fitted ({record.classifier}), so it needs prompts of the newcomer's task"
        raise BundleError(
            Problem("--prompts", message, "give --prompts FILE, or --no-router to leave the bundle without")
        )
    if record.classifier == "ridge" and (sums := read_ridge_sums(folder, manifest)) is not None and not record.asks:
        return _add_to_ridge(old, sums, added.name, texts)
    known = _known_prompts(old, manifest.experts)
    if known is not None:
        return _refitted(old, {**known, added.name: texts}, (*manifest.experts, added))
    if record.classifier == "prototype" and not record.asks:
        return _add_prototype(old, added.name, texts)
    message = f"a {record.classifier} router is fitted on the prompts of all experts, and {_missing(old)} not there"
    hint = "give --prompts NAME=FILE for each of them too, or --no-router and fit one later; ridge routers need none"
    raise BundleError(Problem("--prompts", message, hint))


def router_without(folder: Path, manifest: Manifest, recipe: Recipe, name: str) -> NewRouter:
    """Take an expert out of the router that a bundle has; raise BundleError where that is not possible."""
    record = _record_of(manifest)
    rest = tuple(source for source in manifest.experts if source.name != name)
    at = record.experts.index(name)
    if record.classifier == "none":
        return _unfitted(record, tuple(source.name for source in rest))
    old = _Old(folder, manifest, record, _settings(record, recipe))
    if record.classifier == "ridge" and (sums := read_ridge_sums(folder, manifest)) is not None and not record.asks:
        return _remove_from_ridge(old, sums, at)
    known = _known_prompts(old, rest)
    if known is not None and len(rest) > 1:
        return _refitted(old, known, rest)
    if record.asks:
        message = "its router is fitted to what all experts say of a prompt, and not all of their prompts are there"
        raise BundleError(Problem(str(folder), message, "give --no-router, then fit one: mediator fit-router"))
    return _drop_row(old, at)


@dataclass(frozen=True)
class _Old:
    """The router as it is: the bundle, its record, and the settings it was fitted with as far as they are known."""

    folder: Path
    manifest: Manifest
    record: RouterRecord
    settings: FitSettings

    def loaded(self) -> tuple[Router, Classifier, OutsideModel]:
        router = read_router(self.folder, self.manifest)
        if router is None or router.classifier is None or router.outside_model is None:
            raise RuntimeError("a router without classifier")
        return router, router.classifier, router.outside_model

    def reading(self) -> tuple[FeatureReader, Callable[[str], list[int]]]:
        """Give what reads features of the dense expert, and what turns a text into tokens for it."""
        tokenizer, spec = load_tokenizer(self.folder), spec_of(self.record)
        return folder_reader(self.folder, tokenizer, spec), partial(text_ids, prompt_reader(tokenizer), spec)


def _record_of(manifest: Manifest) -> RouterRecord:
    if manifest.router is None:
        raise ValueError("a bundle without router")
    return manifest.router


def _settings(record: RouterRecord, recipe: Recipe) -> FitSettings:
    """Take the settings of the recipe's router where it is this one, else defaults, and what the record says."""
    spec = recipe.router or RouterSpec()
    if (spec.features, spec.classifier) != (record.features, record.classifier):
        chosen = {"features": record.features, "layer": record.layer, "classifier": record.classifier}
        spec = RouterSpec.model_validate(chosen)
    return replace(fit_settings(spec), features=spec_of(record), policy=record.policy)


def _policy(old: PolicyRecord, experts: Sequence[str]) -> tuple[PolicyRecord, tuple[str, ...]]:
    """Keep a policy for other experts: fixed weights stay, and no more experts are mixed than there are."""
    update: dict[str, object] = {}
    notices: list[str] = []
    if old.k is not None and old.k > len(experts):
        update["k"] = len(experts)
        notices.append(f"policy top_k mixes {len(experts)} experts now, not {old.k}")
    if old.weights is not None:
        update["weights"] = {name: weight for name, weight in old.weights.items() if name in experts}
        without = [name for name in experts if name not in old.weights]
        if without:
            notices.append(f"policy fixed gives weight 0 to {', '.join(without)}: the weights stay as they were given")
        if gone := [name for name in old.weights if name not in experts]:
            notices.append(f"policy fixed loses the weight of {gone[0]}; the others stay as they were given")
    if old.rule == "uniform":
        notices.append(f"policy uniform gives each expert 1/{len(experts)} now")
    return old.model_copy(update=update), tuple(notices)


def _with_policy(old: _Old, experts: Sequence[str]) -> tuple[FitSettings, tuple[str, ...]]:
    policy, notices = _policy(old.record.policy, experts)
    return replace(old.settings, policy=policy), notices


def _unfitted(record: RouterRecord, experts: tuple[str, ...]) -> NewRouter:
    policy, notices = _policy(record.policy, experts)
    update = {"experts": experts, "policy": policy, "report": None}
    if record.asks:
        update["size"] = len(experts)
    how = f"the experts are asked ({record.features}), so nothing had to be fitted; temperature kept"
    if not record.asks:
        how = f"policy {policy.rule}, which reads no input"
    return NewRouter(None, how, notices, bare=record.model_copy(update=update))


def _known_prompts(old: _Old, sources: Iterable[SourceRecord]) -> dict[str, tuple[str, ...]] | None:
    """Read the prompts that the manifest notes of experts; None unless all are there as they were."""
    try:
        return {source.name: read_prompts(find_prompts(old.folder, source)) for source in sources}
    except MediatorError:
        return None


def _missing(old: _Old) -> str:
    lost = [source.name for source in old.manifest.experts if _known_prompts(old, [source]) is None]
    return f"those of {', '.join(lost)} are"


def _refitted(old: _Old, prompts: Mapping[str, Sequence[str]], sources: Sequence[SourceRecord]) -> NewRouter:
    names = tuple(source.name for source in sources)
    settings, notices = _with_policy(old, names)
    if old.record.asks:
        choose_prompts(prompts, settings)
        how = f"{old.record.classifier} fitted anew to what all experts say of the prompts noted"
        return NewRouter(None, how, notices, RouterJob(names, prompts, settings))
    fitted = fit_job(old.folder, RouterJob(names, prompts, settings))
    how = f"{old.record.classifier} fitted anew on the prompts of all experts"
    return NewRouter(fitted, how, (*notices, *fitted.notices))


def _add_to_ridge(old: _Old, sums: RidgeSums, name: str, texts: Sequence[str]) -> NewRouter:
    reader, encode = old.reading()
    known = _known_prompts(old, old.manifest.experts)
    everyone = {**(known or {}), name: texts}
    chosen = choose_usable(reader, encode, everyone, old.settings, fewest=1)
    rows = read_rows(reader, encode, {name: chosen.fitted[name]})
    grown = add_task(sums, rows.features)
    outside = add_centre(old.loaded()[2], rows.features)
    own = read_rows(reader, encode, {name: chosen.held_out[name]}).features
    others = _held_out(old, reader, encode, known, sums)
    how = "ridge solved again with the sums of the newcomer's prompts, without those of the others"
    new = _finished(old, _Parts((*old.record.experts, name), solve_ridge(grown), outside, grown), how, others, own)
    return replace(new, notices=(*chosen.notices, *new.notices))


def _add_prototype(old: _Old, name: str, texts: Sequence[str]) -> NewRouter:
    reader, encode = old.reading()
    _, classifier, outside = old.loaded()
    chosen = choose_usable(reader, encode, {name: texts}, old.settings, fewest=1)
    fitted, held_out = (
        read_rows(reader, encode, {name: part[name]}).features for part in (chosen.fitted, chosen.held_out)
    )
    grown = add_prototype(classifier, fitted)
    how = "prototype of the newcomer added; features are standardised as before"
    names = (*old.record.experts, name)
    new = _finished(old, _Parts(names, grown, add_centre(outside, fitted)), how, None, held_out)
    return replace(new, notices=(*chosen.notices, *new.notices))


def _remove_from_ridge(old: _Old, sums: RidgeSums, at: int) -> NewRouter:
    record = old.record
    rest = tuple(name for name in record.experts if name != record.experts[at])
    known = _known_prompts(old, old.manifest.experts)
    rows, others = None, None
    if known is not None:
        reader, encode = old.reading()
        others = _held_out(old, reader, encode, known, sums)
        chosen = choose_usable(reader, encode, known, old.settings)
        rows = read_rows(reader, encode, {record.experts[at]: chosen.fitted[record.experts[at]]}).features
    is_exact = rows is not None and are_rows_of(sums, at, rows)
    left = remove_task(sums, at, rows if is_exact else None)
    how = "ridge solved again without the sums of its prompts" + (
        "" if is_exact else "; their scatter about their mean was taken to be that of all, for want of the prompts"
    )
    if others is not None:
        others = Rows(others.features[others.labels != at], np.delete(others.labels, others.labels == at))
        others = Rows(others.features, others.labels - (others.labels > at))
    outside = drop_centre(old.loaded()[2], at)
    return _finished(old, _Parts(rest, solve_ridge(left), outside, left), how, others)


def _drop_row(old: _Old, at: int) -> NewRouter:
    names = tuple(name for name in old.record.experts if name != old.record.experts[at])
    _, classifier, outside = old.loaded()
    how = f"its logit is left out of the {old.record.classifier} router: the others share its probability in proportion"
    return _finished(old, _Parts(names, drop_row(classifier, at), drop_centre(outside, at)), how)


def _held_out(
    old: _Old,
    reader: FeatureReader,
    encode: Callable[[str], list[int]],
    known: Mapping[str, Sequence[str]] | None,
    sums: RidgeSums,
) -> Rows | None:
    """Read the prompts of all experts that their fit has not seen; None unless it is certain which these were."""
    if known is None:
        return None
    chosen = choose_usable(reader, encode, known, old.settings)
    counts = [len(chosen.fitted[name]) for name in old.record.experts]
    if counts != sums.counts.astype(int).tolist():
        return None
    return read_rows(reader, encode, {name: chosen.held_out[name] for name in old.record.experts})


@dataclass(frozen=True)
class _Parts:
    """A router in parts: its experts in order, classifier, outside model, and the sums of ridge."""

    experts: tuple[str, ...]
    classifier: Classifier
    outside: OutsideModel
    sums: RidgeSums | None = None

    def fitted(self, old: _Old, settings: FitSettings) -> FittedRouter:
        """Put them together, with the temperature and the threshold of the old router."""
        return FittedRouter(
            settings=settings,
            experts=self.experts,
            size=old.record.size,
            temperature=old.record.temperature,
            outside_above=old.record.outside_above,
            report=None,
            arrays=router_arrays(self.classifier, self.outside, self.sums),
            notices=(),
        )


def _finished(
    old: _Old, parts: _Parts, how: str, others: Rows | None = None, own: NDArray[np.float32] | None = None
) -> NewRouter:
    """Calibrate and measure a router where held-out prompts of all experts are there; `own` are a newcomer's.

    Else its temperature stays. The threshold of what is unlike all tasks stays, or rises where a newcomer needs it.
    """
    settings, notices = _with_policy(old, parts.experts)
    fitted = parts.fitted(old, settings)
    if own is not None:
        # The spread of a newcomer's prompts is in no covariance of the outside model.
        least = float(np.quantile(outside_score(parts.outside, own), settings.outside_quantile))
        fitted = replace(fitted, outside_above=max(old.record.outside_above or 0.0, least))
    if others is not None:
        fitted = _measured(fitted, parts, _joined(others, own, len(parts.experts)))
        told = tuple(doubts(fitted.report)) if fitted.report is not None else ()
        return NewRouter(fitted, f"{how}; temperature set on held-out prompts of all", (*notices, *told))
    if own is not None:
        right = int((logits(parts.classifier, own).argmax(axis=1) == len(parts.experts) - 1).sum())
        notices = (*notices, f"{right} of {len(own)} held-out prompts of {parts.experts[-1]} are taken for its own")
    return NewRouter(fitted, f"{how}; temperature kept", (*notices, f"{_LEFT}; {_LATER}"))


def _joined(others: Rows, own: NDArray[np.float32] | None, n_experts: int) -> Rows:
    if own is None:
        return others
    labels = np.append(others.labels, np.full(len(own), n_experts - 1))
    return Rows(np.concatenate([others.features, own]), labels)


def _measured(fitted: FittedRouter, parts: _Parts, rows: Rows) -> FittedRouter:
    """Set the temperature on held-out rows, and measure, as a fit from scratch does."""
    calibration, test = rows.halves()
    temperature = 1.0
    if fitted.settings.calibrate == "temperature":
        temperature = fit_temperature(logits(parts.classifier, calibration.features), calibration.labels)
    n_fitted = int(parts.sums.counts.sum()) if parts.sums is not None else 0
    report = report_of(softmax(logits(parts.classifier, test.features), temperature), test.labels, n_fitted)
    return replace(fitted, temperature=temperature, report=report)
