"""Golden numbers of methods that score, mask or weigh single entries, by direct calls and by the engine."""

import numpy as np
import pytest
from golden_cases import (
    CASES,
    INPUTS,
    NAMES,
    call,
    call_joined,
    each_case,
    merge_case,
    moments_of,
    n_outside,
    resolved,
    stored,
)

# How the recipe asks for what each source does.
AVERAGE = {
    "pcb_official": {},
    "pcb_nlp_official": {"preset": "nlp"},
    "pcb_vision_official": {"preset": "vision"},
    "tatr_zero_shot_fusionbench": {"preset": "fusion_bench", "density": 0.95},
    "consensus_k1_official": {"k": 1},
    "consensus_k2_official": {},
    "consensus_k3_official": {"k": 3},
    "ota_base_masked_official": {"preset": "ota_merge", "threshold": 1e-7, "fallback": "base"},
    "ota_nobase_official": {"preset": "ota_merge"},
}
# The authors call weights lambda1 and lambda2.
CABS = {
    "cabs_nm_official": {"n": 3, "m": 8},
    "cabs_magnitude_official": {"prune": "magnitude", "density": 0.5},
    "cabs_7b_nm_official": {"n": 2, "m": 8},
}
EMR = ["emr_official", "emr_global_scale_official"]


def is_over_model(case):
    return case["method"] in ("pcb", "tatr")


def moments_by_tensor(case):
    """Second moments [n, m] by tensor, in the way of a statistic."""
    each = [moments_of(case, model) for model in case["models"]]
    return {name: {"moments": np.stack([m[name].ravel() for m in each])} for name in NAMES if each[0]}


@each_case(AVERAGE)
def test_direct_call_gives_the_golden_numbers(case):
    merged = call_joined(case) if is_over_model(case) else call(case, found=moments_by_tensor(case))
    assert n_outside(case, merged) == 0


@each_case(AVERAGE)
def test_engine_gives_the_golden_numbers(case, tmp_path, monkeypatch):
    assert n_outside(case, merge_case(case, tmp_path, monkeypatch)) == 0


@each_case(CABS, weights=[0.9, 0.7])
def test_direct_call_of_cabs_gives_the_golden_numbers(case):
    assert n_outside(case, call(case)) == 0


@each_case(CABS, weights=[0.9, 0.7])
def test_engine_gives_the_golden_numbers_of_cabs(case, tmp_path, monkeypatch):
    assert n_outside(case, merge_case(case, tmp_path, monkeypatch)) == 0


@pytest.mark.parametrize(("place", "kept"), [(0, "first"), (1, "second")])
@each_case({name: CABS[name] for name in ("cabs_nm_official", "cabs_magnitude_official")}, weights=[1.0, 0.0])
def test_pruned_deltas_are_those_of_the_cabs_authors(case, place, kept):
    pruned = {k.removeprefix(f"out.pruned_{kept}."): v for k, v in stored(case).items() if f"pruned_{kept}" in k}
    assert pruned
    alone = {**case, "weights": np.eye(2)[place].tolist()}
    for name, delta in call(alone, names=list(pruned)).items():
        np.testing.assert_allclose(delta - INPUTS[f"base.{name}"], pruned[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cabs_nm_official", "cabs_magnitude_official", "ota_base_masked_official"])
def test_another_choice_is_outside_the_tolerance(name):
    other = {"cabs_nm_official": {"n": 2, "m": 8}, "cabs_magnitude_official": {"prune": "magnitude", "density": 0.51}}
    average = {"method": CASES[name]["method"], **other.get(name, {**AVERAGE.get(name, {}), "fallback": "mean"})}
    case = {**CASES[name], "average": average, "weights": [0.9, 0.7] if "cabs" in name else None}
    assert n_outside(case, call(case, found=moments_by_tensor(case))) > 5


def deltas_of(case):
    """Deltas of a case's models, all tensors joined [n, m] in the order of NAMES."""
    joined = {m: np.concatenate([INPUTS[f"{m}.{n}"].ravel() for n in NAMES]) for m in ("base", *case["models"])}
    return np.stack([joined[m] - joined["base"] for m in case["models"]])


def joined(case, prefix):
    expected = stored(case)
    return np.concatenate([expected[f"{prefix}{name}"].ravel() for name in NAMES])


@pytest.mark.parametrize("name", EMR)
def test_the_unified_delta_is_that_of_the_emr_authors(name):
    case = CASES[name]
    deltas = deltas_of(case)
    found = resolved({"method": "emr"})(deltas, np.ones(4))
    np.testing.assert_allclose(found, joined(case, "out.unified."), **case["tolerance"])
