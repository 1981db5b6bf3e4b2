"""The router and its file."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mediator_cli.bundle.manifest import ROUTER, Manifest, SourceRecord
from mediator_cli.bundle.record import FileRecord
from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord, RouterReport
from mediator_cli.errors import BundleError, OutputError
from mediator_cli.runtime.calibrate import softmax
from mediator_cli.runtime.classify import Classifier, fit_classifier, logits, ridge_sums
from mediator_cli.runtime.outside import OutsideModel, fit_outside, outside_score
from mediator_cli.runtime.router import Router, read_ridge_sums, read_router, router_arrays, write_router

EXPERTS = ("maths", "sarcasm", "poetry")
SIZE = 6
METADATA = {"format": "mediator.router", "version": "1"}


def prompts(seed: int = 0, n_rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Draw features of three clear tasks."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n_rows) % 3
    return (draw.normal(size=(n_rows, SIZE)) + 5 * np.eye(3, SIZE)[labels]).astype(np.float32), labels


def record(**fields: Any) -> RouterRecord:
    report = RouterReport(n_fitted=1, n_held_out=1, accuracy=1, log_loss=0, calibration_error=0, confusion=())
    facts = {
        "features": "text",
        "classifier": "gaussian",
        "experts": EXPERTS,
        "size": SIZE,
        "temperature": 2.0,
        "outside_above": 1.5,
        "policy": PolicyRecord(),
        "report": report,
        "file": FileRecord(name=ROUTER, bytes=0, sha256=""),
    }
    return RouterRecord.model_validate(facts | fields)


def manifest(router: RouterRecord | None, experts: tuple[str, ...] = EXPERTS) -> Manifest:
    """A manifest of which only router and experts are read."""
    source = {"kind": "full", "path": "", "weight": None, "license": None, "files": ()}
    return Manifest.model_construct(
        router=router, experts=tuple(SourceRecord.model_validate(source | {"name": name}) for name in experts)
    )


def fitted(kind: str = "gaussian") -> Router:
    features, labels = prompts()
    return Router(record(classifier=kind), fit_classifier(kind, features, labels, 3), fit_outside(features, labels, 3))


def stored(folder: Path, kind: str = "gaussian", **fields: Any) -> Manifest:
    """Write the router's file of one kind and give the manifest that goes with it."""
    router = fitted(kind)
    ridge = ridge_sums(*prompts(), 3) if kind == "ridge" else None
    write_router(folder / ROUTER, router_arrays(router.classifier, router.outside_model, ridge))
    return manifest(record(classifier=kind, **fields))


def change(folder: Path, changes: dict[str, np.ndarray | None], metadata: dict[str, str] = METADATA) -> None:
    arrays = {**load_file(folder / ROUTER), **changes}
    save_file({k: v for k, v in arrays.items() if v is not None}, folder / ROUTER, metadata=metadata)


def test_routing_by_hand():
    """Two features, two experts; temperature 2; the second prompt is far from both tasks, the third undecided."""
    classifier = Classifier(
        np.diag([2.0, 4.0]), np.array([0.0, 1.0]), mean=np.array([1.0, 0]), scale=np.array([1, 2.0])
    )
    one = np.eye(1)
    outside = OutsideModel(
        mean=np.zeros(2),
        scale=np.ones(2),
        directions=np.array([[1.0, 0.0]]),
        whitening=one,
        background=0 * one,
        centres=np.array([[1.0], [3.0]]),
        residual_variance=np.ones(1),
        usual=np.zeros(1),
        steps=np.array([4.0, 1000.0]),
    )
    policy = PolicyRecord(sure=0.5, cover=0.6)
    router = Router(record(experts=("a", "b"), size=2, policy=policy), classifier, outside)
    found = router.route(np.array([[5, 0], [9, 0], [1.5, 0]], dtype=np.float32))
    assert found.experts == ("a", "b")
    # logits (8, 1), (16, 1), (1, 1) over temperature 2
    first, second = 1 / (1 + np.exp(-3.5)), 1 / (1 + np.exp(-7.5))
    assert found.probabilities == pytest.approx(np.array([[first, 1 - first], [second, 1 - second], [0.5, 0.5]]))
    expected = -(first * np.log2(first) + (1 - first) * np.log2(1 - first))
    assert found.entropy[[0, 2]] == pytest.approx([expected, 1.0])
    # squared distances to the nearest centre: 4, 36, 0.25
    assert found.score.tolist() == [1.0, 9.0, 0.0625]
    assert found.is_outside.tolist() == [False, True, False]
    assert found.weights.tolist() == [[1, 0], [0, 0], [0.5, 0.5]]
    assert found.weights.dtype == np.float32


def test_route_is_its_parts():
    router, (features, labels) = fitted(), prompts(seed=1)
    found = router.route(features)
    assert found.probabilities == pytest.approx(softmax(logits(router.classifier, features), 2.0))
    assert (found.score == outside_score(router.outside_model, features)).all()
    assert (found.is_outside == (found.score > 1.5)).all()
    assert (found.probabilities.argmax(axis=1) == labels).mean() > 0.9


@given(st.integers(0, 10), st.integers(1, 9))
def test_a_prompt_is_routed_alike_in_every_batch(seed, n_rows):
    router, (features, _) = fitted(), prompts(seed)
    whole, part = router.route(features), router.route(features[:n_rows])
    assert (whole.weights[:n_rows] == part.weights).all()
    assert whole.probabilities[:n_rows] == pytest.approx(part.probabilities, abs=1e-12)


def test_no_prompts_give_no_rows():
    found = fitted().route(np.zeros((0, SIZE), dtype=np.float32))
    assert found.weights.shape == found.probabilities.shape == (0, 3)
    assert found.score.shape == found.entropy.shape == (0,)


@pytest.mark.parametrize("shape", [(2, SIZE + 1), (SIZE,), (1, 1, SIZE), (0, 5)])
def test_features_of_another_size_are_refused(shape):
    with pytest.raises(BundleError, match=rf"reads 6 features of each prompt, got an array of \[{shape[0]}"):
        fitted().route(np.zeros(shape))


def test_features_that_are_not_finite_are_refused_by_prompt():
    features, _ = prompts()
    features[2, 1] = np.nan
    with pytest.raises(BundleError, match=r"features of prompt 3 hold NaN.*\n.*mediator verify"):
        fitted().route(features)


@pytest.mark.parametrize("kind", ["logistic", "gaussian", "prototype", "ridge"])
def test_a_stored_router_answers_with_the_same_bits(tmp_path, kind):
    features, _ = prompts(seed=2)
    before = fitted(kind).route(features)
    found = read_router(tmp_path, stored(tmp_path, kind))
    assert found is not None
    after = found.route(features)
    for name in ("probabilities", "entropy", "score", "is_outside", "weights"):
        assert (getattr(before, name) == getattr(after, name)).all()
    assert found.classifier.unit == (kind == "prototype")


def test_the_file_is_plain_safetensors(tmp_path):
    stored(tmp_path, "ridge")
    expected = router_arrays(fitted("ridge").classifier, fitted().outside_model, ridge_sums(*prompts(), 3))
    arrays = load_file(tmp_path / ROUTER)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == (np.float64 if name.startswith("ridge.") else np.float32)
        assert (array == expected[name]).all()
    with safe_open(tmp_path / ROUTER, "numpy") as file:
        assert file.metadata() == METADATA


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    stored(tmp_path)
    before = (tmp_path / ROUTER).read_bytes()
    with pytest.raises(OutputError, match="cannot write"):
        stored(tmp_path)
    assert (tmp_path / ROUTER).read_bytes() == before


def test_a_bundle_without_router_has_none(tmp_path):
    assert read_router(tmp_path, manifest(None)) is None
    assert read_ridge_sums(tmp_path, manifest(None)) is None


def test_sums_of_ridge_survive_the_file(tmp_path):
    sums = read_ridge_sums(tmp_path, stored(tmp_path, "ridge"))
    expected = ridge_sums(*prompts(), 3)
    assert sums is not None
    for name in ("gram", "sums", "counts"):
        assert (getattr(sums, name) == getattr(expected, name)).all()


def test_other_routers_have_no_sums(tmp_path):
    assert read_ridge_sums(tmp_path, stored(tmp_path)) is None


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BundleError, match=rf"{ROUTER}: cannot read: no such file"):
        read_router(tmp_path, manifest(record()))


@pytest.mark.parametrize("size", [0, 7, 100, -8, -1])
def test_a_truncated_file_is_named(tmp_path, size):
    described = stored(tmp_path)
    (tmp_path / ROUTER).write_bytes((tmp_path / ROUTER).read_bytes()[:size])
    with pytest.raises(BundleError, match=ROUTER):
        read_router(tmp_path, described)


@given(st.integers(0, 2000), st.integers(1, 255))
def test_a_flipped_byte_is_an_error_or_changes_numbers_only(tmp_path_factory, place, flip):
    folder = tmp_path_factory.mktemp("bundle")
    described = stored(folder)
    data = bytearray((folder / ROUTER).read_bytes())
    data[place % len(data)] ^= flip
    (folder / ROUTER).write_bytes(data)
    with suppress(BundleError):
        found = read_router(folder, described)
        assert found is not None
        assert found.classifier.coefficients.shape == (3, SIZE)
        assert np.isfinite(found.classifier.coefficients).all()


@pytest.mark.parametrize("name", sorted(router_arrays(fitted().classifier, fitted().outside_model)))
def test_every_array_must_be_there_finite_and_of_its_shape(tmp_path, name):
    described = stored(tmp_path)
    array = load_file(tmp_path / ROUTER)[name]
    bad = array.copy()
    bad.flat[-1] = np.inf
    for value, message in [
        (None, "array is missing"),
        (bad, "holds NaN or infinite values"),
        (np.concatenate([array, array]), r"is F32 \[.*\], not F32 \[.*\] as the manifest"),
        (array.astype(np.float64), "is F64 .*, not F32"),
        (array[None], r"is F32 \[1, .*\], not F32"),
    ]:
        change(tmp_path, {name: value})
        with pytest.raises(BundleError, match=rf"{ROUTER}: {name}: {message}"):
            read_router(tmp_path, described)
        change(tmp_path, {name: array})
    assert read_router(tmp_path, described) is not None


def test_an_array_of_unknown_name_is_named(tmp_path):
    described = stored(tmp_path)
    change(tmp_path, {"classifier.bias": np.zeros(3, dtype=np.float32)})
    with pytest.raises(BundleError, match=r"classifier.bias: is no array of such a router"):
        read_router(tmp_path, described)


@pytest.mark.parametrize("name", ["classifier.scale", "outside.scale", "outside.residual_variance", "outside.steps"])
def test_scales_must_be_positive(tmp_path, name):
    described = stored(tmp_path)
    array = load_file(tmp_path / ROUTER)[name]
    array.flat[0] = 0
    change(tmp_path, {name: array})
    with pytest.raises(BundleError, match=f"{name}: holds values that are not positive"):
        read_router(tmp_path, described)


@pytest.mark.parametrize("name", ["ridge.gram", "ridge.sums", "ridge.counts"])
def test_sums_of_ridge_come_together(tmp_path, name):
    described = stored(tmp_path, "ridge")
    array = load_file(tmp_path / ROUTER)[name]
    change(tmp_path, {name: array[1:]})
    with pytest.raises(BundleError, match=f"{name}: is F64"):
        read_router(tmp_path, described)
    change(tmp_path, {name: np.full_like(array, np.nan)})
    with pytest.raises(BundleError, match=f"{name}: holds NaN"):
        read_ridge_sums(tmp_path, described)
    change(tmp_path, {name: None})
    with pytest.raises(BundleError, match=f"{name}: array is missing"):
        read_router(tmp_path, described)


def test_only_ridge_has_sums(tmp_path):
    stored(tmp_path, "ridge")
    with pytest.raises(BundleError, match=r"ridge.gram: is no array of such a router"):
        read_router(tmp_path, manifest(record(classifier="logistic")))


@pytest.mark.parametrize("fields", [{"size": SIZE + 1}, {"size": 2}])
def test_the_file_must_fit_the_manifest(tmp_path, fields):
    stored(tmp_path)
    with pytest.raises(BundleError, match=r"classifier.coefficients: is F32 \[3, 6\], not F32"):
        read_router(tmp_path, manifest(record(**fields)))


@pytest.mark.parametrize("experts", [EXPERTS[:2], EXPERTS[::-1]])
def test_experts_must_be_all_of_the_bundle_in_its_order(tmp_path, experts):
    stored(tmp_path)
    with pytest.raises(BundleError, match="are not all experts of the bundle in its order"):
        read_router(tmp_path, manifest(record(experts=experts), experts=EXPERTS))


def test_experts_must_be_those_of_the_bundle(tmp_path):
    described = stored(tmp_path)
    with pytest.raises(BundleError, match=r"router.experts: the bundle has no expert 'poetry'"):
        read_router(tmp_path, manifest(described.router, experts=EXPERTS[:2]))


@pytest.mark.parametrize("metadata", [{}, {"format": "mediator.sparse", "version": "1"}, METADATA | {"version": "2"}])
def test_other_files_are_no_routers(tmp_path, metadata):
    described = stored(tmp_path)
    change(tmp_path, {}, metadata)
    with pytest.raises(BundleError, match="is not a router that this version reads"):
        read_router(tmp_path, described)


@pytest.mark.parametrize("name", ["../router.safetensors", "/etc/passwd", ""])
def test_a_name_that_leaves_the_bundle_is_refused(tmp_path, name):
    stored(tmp_path)
    with pytest.raises(BundleError, match="unsafe file name"):
        read_router(tmp_path, manifest(record(file=FileRecord(name=name, bytes=0, sha256=""))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": ()}, "at least 1 item"),
        ({"experts": ("a", "a")}, "an expert stands twice"),
        ({"policy": PolicyRecord(rule="fixed", weights={"zebra": 1.0})}, "the policy weighs 'zebra'"),
        ({"temperature": float("inf")}, "finite number"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"outside_above": float("nan")}, "finite number"),
    ],
)
def test_a_record_without_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        record(**fields)


def test_a_record_survives_json():
    assert RouterRecord.model_validate(json.loads(record().model_dump_json())) == record()
