"""Golden numbers of the methods that look at whole matrices through their singular vectors."""

import numpy as np
import pytest
from golden_cases import (
    CASES,
    INPUTS,
    NAMES,
    call,
    each_case,
    merge_case,
    n_outside,
    resolved,
    weights_of,
)

from mediator_cli.methods.registry import methods

# How the recipe asks for what each source does: the authors' rules see embeddings as matrices, unless told otherwise.
ALL = {"embeddings": "matrix"}
AVERAGE = {
    "iso_c_official": ALL,
    "iso_c_exclude_fusionbench": {},
    "iso_cts_official": ALL,
    "iso_cts_half_official": {**ALL, "common_share": 0.5},
    "tsv_m_official": ALL,
    "tsv_m_eigen_official": ALL,
    "tsv_m_weighted_fusionbench": {},
    "tsv_lowrank_sum_official": {**ALL, "method": "tsv_m", "decorrelate": False},
    "tsv_m_lossless_official": {**ALL, "method": "tsv_m", "rank": "full"},
    "svc_fusionbench": {**ALL, "alpha": 1.0, "lambda": 0.5, "normalize": False},
    "drm_horizontal_official": {},
    "drm_vertical_official": {"direction": "vertical"},
    "drm_horizontal_light_official": {"density": 0.7, "vector_density": 0.6},
    "drm_rate0_official": {"direction": "none", "density": 1.0},
}
ENTRIES_TRIMMED_TOGETHER = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight"]


def call_with_threshold(case):
    """Call the method as `call` does, but all that is no matrix with the threshold over its concatenation."""
    method, weights = resolved(case["average"]), np.array(weights_of(case))
    names = ENTRIES_TRIMMED_TOGETHER
    deltas = {n: np.stack([(INPUTS[f"{m}.{n}"] - INPUTS[f"base.{n}"]).ravel() for m in case["models"]]) for n in names}
    joined = np.abs(np.hstack(list(deltas.values())))
    k = round(joined.shape[1] * method.params["vector_density"]) + 1
    thresholds = -np.sort(-joined, axis=1)[:, k - 1]
    found = {n: method(deltas[n], weights, {"thresholds": thresholds}) for n in names}
    return {n: INPUTS[f"base.{n}"] + found[n].reshape(INPUTS[f"base.{n}"].shape) for n in names}


@each_case(AVERAGE)
def test_direct_call_gives_the_golden_numbers(case):
    merged = call(case)
    if resolved(case["average"]).params.get("vector_density", 1) < 1:
        merged |= call_with_threshold(case)
    assert n_outside(case, merged) == 0


@each_case(AVERAGE)
def test_engine_gives_the_golden_numbers(case, tmp_path, monkeypatch):
    assert n_outside(case, merge_case(case, tmp_path, monkeypatch)) == 0


def test_all_cases_of_these_methods_are_used():
    names = {average.get("method", CASES[case]["method"]) for case, average in AVERAGE.items()}
    aliases = {"tsv_lowrank_sum", "tsv_m_lossless"}
    assert names <= set(methods())
    assert {case for case, facts in CASES.items() if facts["method"] in names | aliases} == set(AVERAGE)


@pytest.mark.parametrize("name", ["iso_c_official", "tsv_m_official"])
def test_a_wrong_parameter_is_outside_the_tolerance(name):
    case = {**CASES[name], "average": {"method": CASES[name]["method"], **ALL, "lambda": 1.001}}
    assert n_outside(case, call(case, NAMES)) > 100
