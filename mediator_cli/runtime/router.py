"""The router: from prompt features to task probabilities, uncertainty and the mixture, and its file.

The file is a plain safetensors file of the arrays of classifier and outside model, never a pickle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.manifest import MANIFEST, bundle_file
from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.read import open_files, read_slab
from mediator_cli.errors import BundleError, CheckpointError, Problem
from mediator_cli.runtime.arrays_file import write_arrays
from mediator_cli.runtime.calibrate import softmax
from mediator_cli.runtime.classify import Classifier, RidgeSums, logits
from mediator_cli.runtime.outside import MOST_DIRECTIONS, OutsideModel, outside_score
from mediator_cli.runtime.policy import BLIND_RULES, entropy, mix

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.bundle.record import FileRecord
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.checkpoint.header import TensorInfo

    Floats = NDArray[np.float64]
    Shape = tuple[int, ...]

FORMAT = "mediator.router"
FORMAT_VERSION = "1"
_DAMAGED = "the router is damaged; fetch the bundle again or fit the router again"
_POSITIVE = ("classifier.scale", "outside.scale", "outside.residual_variance", "outside.steps")


@dataclass(frozen=True, eq=False)
class Routing:
    """What a router made of prompts: probabilities and mixture weights [rows, experts], the rest [rows].

    `entropy` is the uncertainty in [0, 1], `score` how unlike all tasks a prompt is; a row of zero weights is the
    dense expert alone. Where the experts were asked, `answers` [rows, experts] are perplexities or cosines, and
    `is_silent` marks prompts too short to ask about, which the dense expert answers.
    """

    experts: tuple[str, ...]
    probabilities: Floats
    entropy: Floats
    score: Floats
    is_outside: NDArray[np.bool_]
    weights: NDArray[np.float32]
    answers: Floats | None = None
    is_silent: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Router:
    """Reads prompt features and decides on mixtures; its record says which features and which policy.

    Without classifier the probabilities are made of what the experts say themselves. `sums` are those that a ridge
    classifier was solved from, where they are at hand: a bundle read to answer leaves them on disk.
    """

    record: RouterRecord
    classifier: Classifier | None
    outside_model: OutsideModel | None
    sums: RidgeSums | None = None

    def route(self, features: NDArray[np.floating]) -> Routing:
        """Decide the mixture of each row of features [rows, features], or of what experts said [rows, experts + 1].

        Raises BundleError when the features are not those that the router was fitted on, or not finite.
        """
        if self.record.features == "none":
            return self._blind(len(features))
        lengths = None
        if self.record.asks:
            features, lengths = features[:, :-1], features[:, -1]
        if features.ndim != 2 or features.shape[1] != self.record.size:
            message = f"reads {self.record.size} features of each prompt, got an array of {list(features.shape)}"
            raise BundleError(Problem("router", message, "was it fitted for another model? fit the router again"))
        if not np.isfinite(features).all():
            row = int(np.argmin(np.isfinite(features).all(axis=1)))
            message = f"the features of prompt {row + 1} hold NaN or infinite values"
            raise BundleError(Problem("router", message, "is the dense expert sound? `mediator verify` checks it"))
        if self.classifier is None or self.outside_model is None:
            probabilities = softmax(scores_of(self.record, features, lengths), self.record.temperature)
            score = unlikeness(self.record.features, features)
        else:
            probabilities = softmax(logits(self.classifier, features), self.record.temperature)
            score = outside_score(self.outside_model, features)
        above = math.inf if self.record.outside_above is None else self.record.outside_above
        routing = self._decide(probabilities, score, score > above)
        return routing if lengths is None else self._with_answers(routing, features, lengths == 0)

    def _blind(self, n_rows: int) -> Routing:
        """Give all inputs the policy's mixture."""
        n_experts = len(self.record.experts)
        return self._decide(np.full((n_rows, n_experts), 1 / n_experts), np.zeros(n_rows), np.zeros(n_rows, bool))

    def _decide(self, probabilities: Floats, score: Floats, is_outside: NDArray[np.bool_]) -> Routing:
        experts = self.record.experts
        weights = mix(probabilities, is_outside, self.record.policy, experts)
        return Routing(experts, probabilities, entropy(probabilities), score, is_outside, weights)

    def _with_answers(self, routing: Routing, values: NDArray[np.floating], is_silent: NDArray[np.bool_]) -> Routing:
        """Add what experts said, and leave prompts of which they could say nothing to the dense expert."""
        n_experts = len(routing.experts)
        silent = is_silent[:, None]
        probabilities = np.where(silent, 1 / n_experts, routing.probabilities)
        is_blind = self.record.policy.rule in BLIND_RULES
        answers = values.astype(np.float64)
        return replace(
            routing,
            probabilities=probabilities,
            entropy=entropy(probabilities),
            is_outside=routing.is_outside | is_silent,
            weights=routing.weights if is_blind else np.where(silent, np.float32(0), routing.weights),
            answers=np.exp(answers) if self.record.features == "perplexity" else answers,
            is_silent=is_silent,
        )


def scores_of(record: RouterRecord, values: NDArray[np.floating], lengths: NDArray[np.floating] | None) -> Floats:
    """Give the scores [rows, experts] of which softmax makes probabilities, where no classifier is fitted.

    For perplexity 1 / PPL (form inverse) or ln p of the whole prompt, -t · ln PPL (form posterior); else the cosines.
    """
    exact = values.astype(np.float64)
    if record.form == "posterior" and lengths is not None:
        return -exact * lengths.astype(np.float64)[:, None]
    scores: Floats = np.exp(-exact) if record.features == "perplexity" else exact
    return scores


def unlikeness(features: str, values: NDArray[np.floating]) -> Floats:
    """Score how little even the nearest expert has to do with a prompt [rows]: its ln PPL, or minus its cosine."""
    exact = values.astype(np.float64)
    nearest: Floats = exact.min(axis=1) if features == "perplexity" else -exact.max(axis=1)
    return nearest


def router_arrays(
    classifier: Classifier, outside_model: OutsideModel, ridge: RidgeSums | None = None
) -> dict[str, NDArray[np.generic]]:
    """Name the arrays of a router's file: float32, the sums of a ridge classifier float64.

    Of the symmetric gram of ridge [features, features] the upper triangle is stored, row by row.
    """
    arrays: dict[str, NDArray[np.generic]] = {
        "classifier.coefficients": classifier.coefficients,
        "classifier.intercepts": classifier.intercepts,
        "classifier.mean": classifier.mean,
        "classifier.scale": classifier.scale,
        "outside.mean": outside_model.mean,
        "outside.scale": outside_model.scale,
        "outside.directions": outside_model.directions,
        "outside.whitening": outside_model.whitening,
        "outside.background": outside_model.background,
        "outside.centres": outside_model.centres,
        "outside.residual_variance": outside_model.residual_variance,
        "outside.usual": outside_model.usual,
        "outside.steps": outside_model.steps,
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    if ridge is None:
        return arrays
    gram = ridge.gram[np.triu_indices(len(ridge.gram))]
    return {"ridge.gram": gram, "ridge.sums": ridge.sums, "ridge.counts": ridge.counts} | arrays


def write_router(file: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write the arrays of a router to a new file and wait until the disk has them.

    Raises OutputError when the file exists or the disk refuses.
    """
    write_arrays(file, arrays, {"format": FORMAT, "version": FORMAT_VERSION})


def read_router(folder: Path, manifest: Manifest) -> Router | None:
    """Read the router of a bundle; None when its manifest has none.

    Raises BundleError naming file and array when the file is missing, damaged, or not what the manifest says.
    """
    if manifest.router is None:
        return None
    record = manifest.router
    if unknown := [name for name in record.experts if name not in {source.name for source in manifest.experts}]:
        place = f"{folder / MANIFEST} router.experts"
        raise BundleError(Problem(place, f"the bundle has no expert {unknown[0]!r}", _DAMAGED))
    # Mixtures are rows in this order, from the router to the mixed layers.
    if record.experts != tuple(source.name for source in manifest.experts):
        place = f"{folder / MANIFEST} router.experts"
        raise BundleError(Problem(place, "are not all experts of the bundle in its order", _DAMAGED))
    return read_recorded(folder, record)


def read_recorded(folder: Path, record: RouterRecord) -> Router:
    """Read the router that a record describes from the folder of its file; raise BundleError as `read_router` does."""
    if record.file is None:
        return Router(record, None, None)
    places = _checked_places(folder, record, record.file)
    arrays = {name: _read(info) for name, info in places.items() if not name.startswith("ridge.")}
    for name, array in arrays.items():
        _check_values(places[name], array)
    return make_router(record, arrays)


def make_router(record: RouterRecord, arrays: Mapping[str, NDArray[np.generic]]) -> Router:
    """Make a router of a record and the arrays of its file, as `router_arrays` names them."""
    parts: dict[str, dict[str, Floats]] = {"classifier": {}, "outside": {}}
    for name, array in arrays.items():
        part, _, field = name.partition(".")
        if part in parts:
            parts[part][field] = array.astype(np.float64)
    classifier = Classifier(**parts["classifier"], unit=record.classifier == "prototype")
    return Router(record, classifier, OutsideModel(**parts["outside"]), _sums_of(arrays, record.size))


def _sums_of(arrays: Mapping[str, NDArray[np.generic]], size: int) -> RidgeSums | None:
    """Unpack the sums of a ridge classifier, whose gram [size, size] is stored as its upper triangle."""
    if "ridge.gram" not in arrays:
        return None
    upper = np.zeros((size, size))
    upper[np.triu_indices(size)] = arrays["ridge.gram"]
    counts, sums = (arrays[f"ridge.{name}"].astype(np.float64) for name in ("counts", "sums"))
    return RidgeSums(upper + np.triu(upper, 1).T, sums, counts)


def read_ridge_sums(folder: Path, manifest: Manifest) -> RidgeSums | None:
    """Read the sums to which an expert can be added; None when the bundle's router has none.

    Raises BundleError as `read_router` does.
    """
    file = manifest.router.file if manifest.router is not None else None
    if manifest.router is None or file is None:
        return None
    places = _checked_places(folder, manifest.router, file)
    if "ridge.gram" not in places:
        return None
    arrays = {name: _read(info) for name, info in places.items() if name.startswith("ridge.")}
    for name, array in arrays.items():
        _check_values(places[name], array)
    return _sums_of(arrays, manifest.router.size)


def _checked_places(folder: Path, record: RouterRecord, stored: FileRecord) -> dict[str, TensorInfo]:
    """Read the header of a router's file and compare names, dtypes and shapes with the manifest's record."""
    file = bundle_file(folder, stored.name)
    try:
        header = read_header(file)
    except CheckpointError as error:
        raise BundleError(error.problems) from None
    if header.metadata.get("format") != FORMAT or header.metadata.get("version") != FORMAT_VERSION:
        hint = f"expected {FORMAT} version {FORMAT_VERSION}; was it written by a newer mediator?"
        raise BundleError(Problem(str(file), "is not a router that this version reads", hint))
    places = {info.name: info for info in header.tensors}
    expected = _expected_shapes(places, record)
    for name in [*expected, *places]:
        if name not in places or name not in expected:
            message = "array is missing" if name not in places else "is no array of such a router"
            raise BundleError(Problem(f"{file}: {name}", message, _DAMAGED))
        _check_form(places[name], expected[name])
    return places


def _expected_shapes(places: Mapping[str, TensorInfo], record: RouterRecord) -> dict[str, Shape]:
    n_experts, size = len(record.experts), record.size
    directions = places.get("outside.directions")
    k = directions.shape[0] if directions is not None and directions.shape else 1
    k = min(max(k, 1), size, MOST_DIRECTIONS)
    shapes: dict[str, Shape] = {
        "classifier.coefficients": (n_experts, size),
        "classifier.intercepts": (n_experts,),
        "classifier.mean": (size,),
        "classifier.scale": (size,),
        "outside.mean": (size,),
        "outside.scale": (size,),
        "outside.directions": (k, size),
        "outside.whitening": (k, k),
        "outside.background": (k, k),
        "outside.centres": (n_experts, k),
        "outside.residual_variance": (1,),
        "outside.usual": (1,),
        "outside.steps": (2,),
    }
    if record.classifier == "ridge" and any(name.startswith("ridge.") for name in places):
        shapes["ridge.gram"] = (math.comb(size + 1, 2),)
        shapes["ridge.sums"] = (n_experts, size)
        shapes["ridge.counts"] = (n_experts,)
    return shapes


def _check_form(info: TensorInfo, shape: Shape) -> None:
    dtype = "F64" if info.name.startswith("ridge.") else "F32"
    if (info.dtype, info.shape) != (dtype, shape):
        message = f"is {info.dtype} {list(info.shape)}, not {dtype} {list(shape)} as the manifest's router needs"
        raise BundleError(Problem(f"{info.file}: {info.name}", message, _DAMAGED))


def _read(info: TensorInfo) -> Floats:
    try:
        with open_files([info.file]) as descriptors:
            array: Floats = read_slab(descriptors, info, 0, info.size).astype(np.float64).reshape(info.shape)
    except CheckpointError as error:
        raise BundleError(error.problems) from None
    return array


def _check_values(info: TensorInfo, array: Floats) -> None:
    message = ""
    if not np.isfinite(array).all():
        message = "holds NaN or infinite values"
    elif info.name in _POSITIVE and not (array > 0).all():
        message = "holds values that are not positive"
    if message:
        raise BundleError(Problem(f"{info.file}: {info.name}", message, _DAMAGED))
