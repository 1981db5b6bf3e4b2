"""A router with one expert more or less, from what it keeps: in closed form, without the prompts of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.runtime.classify import RidgeSums, as_stored, unit_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mediator_cli.runtime.classify import Classifier
    from mediator_cli.runtime.outside import OutsideModel

    Floats = NDArray[np.float64]

_ALIKE = 1e-6
"""Relative distance of sums of the same rows; they were summed in another order."""


def remove_task(sums: RidgeSums, at: int, features: NDArray[np.floating] | None = None) -> RidgeSums:
    """Take an expert, by its number, out of the sums of ridge.

    `features` [rows, features] are its prompts'; the result is then what `ridge_sums` gives for those of the others.
    Without them its class mean is taken out exactly, and its scatter about that mean as the mean of all experts'.
    """
    rest = np.delete(sums.sums, at, axis=0), np.delete(sums.counts, at)
    if features is not None:
        x = features.astype(np.float64)
        return RidgeSums(sums.gram - x.T @ x, *rest)
    means = rest[0] / rest[1][:, None]
    between = (means * rest[1][:, None]).T @ means
    return RidgeSums(between + _scatter(sums) * rest[1].sum() / sums.counts.sum(), *rest)


def _scatter(sums: RidgeSums) -> Floats:
    """Sum up the scatter [features, features] of all experts' rows about their own means."""
    means = sums.sums / sums.counts[:, None]
    scatter: Floats = sums.gram - (means * sums.counts[:, None]).T @ means
    return scatter


def are_rows_of(sums: RidgeSums, at: int, features: NDArray[np.floating]) -> bool:
    """Whether features [rows, features] are those that an expert, by its number, was fitted with."""
    if len(features) != int(sums.counts[at]):
        return False
    gap = np.linalg.norm(features.astype(np.float64).sum(axis=0) - sums.sums[at])
    return bool(gap <= _ALIKE * (np.linalg.norm(sums.sums[at]) + 1e-12))


def add_prototype(classifier: Classifier, features: NDArray[np.floating]) -> Classifier:
    """Add the direction of one more expert's rows [rows, features]; how features are standardised stays as it was."""
    z = unit_rows((features.astype(np.float64) - classifier.mean) / classifier.scale)
    direction = as_stored(unit_rows(z.mean(axis=0, keepdims=True)))
    coefficients = np.vstack([classifier.coefficients, direction])
    return replace(classifier, coefficients=coefficients, intercepts=np.append(classifier.intercepts, 0.0))


def drop_row(classifier: Classifier, at: int) -> Classifier:
    """Leave an expert's logit out: softmax then shares its probability among the others in proportion to theirs."""
    coefficients = np.delete(classifier.coefficients, at, axis=0)
    return replace(classifier, coefficients=coefficients, intercepts=np.delete(classifier.intercepts, at))


def add_centre(outside: OutsideModel, features: NDArray[np.floating]) -> OutsideModel:
    """Add one more expert's class mean, of rows [rows, features]; covariances stay those of the old experts."""
    z = (features.astype(np.float64) - outside.mean) / outside.scale
    centre = as_stored(z.mean(axis=0) @ outside.directions.T @ outside.whitening.T)
    return replace(outside, centres=np.vstack([outside.centres, centre]))


def drop_centre(outside: OutsideModel, at: int) -> OutsideModel:
    """Leave an expert's class mean out."""
    return replace(outside, centres=np.delete(outside.centres, at, axis=0))
