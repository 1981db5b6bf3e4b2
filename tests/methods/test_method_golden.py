"""Golden numbers of the methods that work on single entries of task vectors, by direct calls and by the engine."""

import numpy as np
import pytest
from golden_cases import (
    CASES,
    INPUTS,
    call,
    call_joined,
    each_case,
    merge_case,
    n_outside,
    resolved,
    stored,
    uniforms_of,
)

from mediator_cli.methods._ops import trim_count
from mediator_cli.methods._ranks import middle_ranks

# How the recipe asks for what each source does.
AVERAGE = {
    "linear_mergekit": {},
    "linear_nonormalize_mergekit": {"normalize": False},
    "average_fusionbench": {},
    "slerp_mergekit": {"t": 0.3},
    "task_arithmetic_mergekit": {"preset": "mergekit", "lambda": 0.7},
    "task_arithmetic_normalize_mergekit": {"preset": "mergekit", "normalize": True},
    "task_arithmetic_sum_fusionbench": {"preset": "fusion_bench"},
    "ties_mergekit": {"preset": "mergekit", "density": 0.3},
    "ties_nonormalize_mergekit": {"preset": "mergekit", "density": 0.5, "lambda": 0.7, "merge": "sum"},
    "ties_dense_mergekit": {"preset": "mergekit", "lambda": 0.7},
    "ties_mean_official": {},
    "ties_sum_official": {"merge": "sum"},
    "ties_max_official": {"merge": "max"},
    "ties_sum_fusionbench_default": {"preset": "fusion_bench"},
    "ties_mergelm": {"preset": "mergelm"},
    "ties_mergellm": {"preset": "mergellm", "lambda": 0.5},
    "dare_linear_mergekit": {"preset": "mergekit", "density": 0.5, "lambda": 0.7},
    "dare_linear_norescale_mergekit": {"preset": "mergekit", "density": 0.5, "lambda": 0.7, "rescale": "none"},
    "dare_task_arithmetic_fusionbench": {"preset": "fusion_bench"},
    "dare_random_mergelm": {"method": "dare_linear", "density": 0.7},
    "dare_ties_mergekit": {"preset": "mergekit", "density": 0.6, "lambda": 0.7},
    "dare_ties_mergelm": {"density": 0.7},
    "breadcrumbs_mergekit": {"preset": "mergekit", "density": 0.6, "gamma": 0.05, "lambda": 0.7},
    "breadcrumbs_default_gamma_mergekit": {"preset": "mergekit", "density": 0.9},
    "breadcrumbs_ties_mergekit": {"preset": "mergekit", "density": 0.6, "gamma": 0.05},
    "breadcrumbs_mergellm": {"preset": "mergellm", "density": 0.75, "gamma": 0.15},
    "breadcrumbs_official": {},
    "breadcrumbs_keep_first_official": {"density": 0.5, "gamma": 0.15, "lambda": 0.6, "keep": "first"},
    "della_mergekit": {"preset": "mergekit", "density": 0.6, "lambda": 0.7},
    "della_linear_mergekit": {"preset": "mergekit", "density": 0.5, "epsilon": 0.1, "lambda": 0.7},
    "della_official": {},
    "della_noelect_official": {"method": "della_linear"},
    "sce_dense_mergekit": {"preset": "mergekit"},
    "sce_topk_mergekit": {"preset": "mergekit", "select_topk": 0.3},
    "sce_tiny_deltas_mergekit": {"preset": "mergekit"},
    "sce_dense_fuseai": {"preset": "fusechat", "select_topk": 1.0},
    "sce_topk_fuseai": {"preset": "fusechat", "select_topk": 0.3},
}


def is_over_model(case):
    return resolved(case["average"]).params.get("trim") == "model"


@each_case(AVERAGE)
def test_direct_call_gives_the_golden_numbers(case):
    assert n_outside(case, call_joined(case) if is_over_model(case) else call(case)) == 0


@each_case(AVERAGE)
def test_engine_gives_the_golden_numbers(case, tmp_path, monkeypatch):
    assert n_outside(case, merge_case(case, tmp_path, monkeypatch)) == 0


def test_masked_deltas_equal_those_of_the_dare_authors():
    case = CASES["dare_random_mergelm"]
    masked = {k.removeprefix("out.masked.expert0."): v for k, v in stored(case).items() if k.startswith("out.masked")}
    assert masked
    method = resolved({"method": "dare_linear", "density": 0.7})
    for name, expected in masked.items():
        delta = (INPUTS[f"expert0.{name}"] - INPUTS[f"base.{name}"]).reshape(1, -1)
        found = method(delta, np.ones(1), None, uniforms_of(case, "expert0", name)[None])
        np.testing.assert_allclose(found.reshape(expected.shape), expected, **case["tolerance"])


@pytest.mark.parametrize(
    "name", ["della_official", "della_noelect_official", "della_mergekit", "della_linear_mergekit"]
)
def test_chances_to_stay_are_those_of_the_della_authors(name):
    case = CASES[name]
    chances = {k.removeprefix("in.prob."): v for k, v in stored(case).items() if k.startswith("in.prob.")}
    method = resolved({"method": case["method"].replace("noelect", "linear"), **AVERAGE[name]})
    n_compared = 0
    for key, expected in chances.items():
        delta = INPUTS[key] - INPUTS["base." + key.partition(".")[2]]
        found = method.find_in_rows(delta.reshape(1, -1), delta.shape[-1])["chances"]
        # Entries that did not change are equal, so their ranks are arbitrary.
        changed = delta != 0
        n_compared += changed.sum()
        np.testing.assert_allclose(found.reshape(expected.shape)[changed], expected[changed], rtol=1e-6)
    assert n_compared > 5000


def test_one_entry_too_many_is_outside_the_tolerance():
    case = CASES["ties_mean_official"]
    assert n_outside(case, call_joined({**case, "average": {"method": "ties", "density": 569.5 / 2840}})) >= 1


def test_mergellm_keeps_one_entry_more_of_a_small_tensor():
    params = {"density": 0.2, "keep": "dropped"}
    assert (trim_count(params, 24), trim_count({**params, "keep": "paper"}, 24)) == (6, 5)


@pytest.mark.parametrize(
    ("density", "gamma", "keep", "expected"),
    [
        (0.75, 0.15, "paper", (14, 3)),
        (0.75, 0.15, "exact", (14, 3)),
        (0.75, 0.15, "first", (12, 3)),
        (0.75, 0.15, "dropped", (16, 4)),
        (0.9, 0.3, "paper", (18, 5)),
        (0.9, 0.3, "exact", (16, 3)),
        (0.05, 0.3, "paper", (0, 5)),
        (0.75, 0.0, "paper", (12, 0)),
        (1.0, 0.3, "exact", (16, 0)),
    ],
)
def test_the_middle_of_sixteen_is_counted_as_each_source_does(density, gamma, keep, expected):
    assert middle_ranks({"density": density, "gamma": gamma, "keep": keep}, 16) == expected


def test_shares_that_binary_numbers_miss_are_counted_as_written():
    # MergeLLM is told the smallest share, 0.05, which 1 - 0.9 - 0.05 falls short of.
    assert middle_ranks({"density": 0.9, "gamma": 0.05, "keep": "dropped"}, 100) == (96, 5)
