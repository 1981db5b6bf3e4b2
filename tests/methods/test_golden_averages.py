"""Golden numbers of averages, arcs and entries that are chosen, by direct calls and by the engine."""

import pytest
from golden_cases import CASES, INPUTS, NAMES, call, call_joined, each_case, merge_case, n_outside

# How the recipe asks for what each source does.
AVERAGE = {
    "nuslerp_flat_base_mergekit": {},
    "nuslerp_flat_nobase_mergekit": {"space": "weight"},
    "nuslerp_rows_base_mergekit": {"over": "row"},
    "nuslerp_columns_base_mergekit": {"over": "column"},
    "multislerp_base_mergekit": {},
    "multislerp_nobase_mergekit": {"space": "weight"},
    "karcher_weights_mergekit": {},
    "karcher_deltas_mergekit": {"space": "delta"},
    "nearswap_mergekit": {"t": 0.004},
    "model_stock_mergekit": {"preset": "mergekit"},
    "model_stock_rows_mergekit": {"preset": "mergekit", "over": "row"},
    "model_stock_3_mergekit": {"preset": "mergekit"},
    "model_stock_fusionbench": {"preset": "fusion_bench"},
    "mi_official": {"lambda": 0.5},
    "passthrough_scale_mergekit": {"scale": 0.5},
    "arcee_fusion_mergekit": {},
    "ram_mergekit": {"epsilon": 0.008},
    "ramplus_tl_mergekit": {"epsilon": 0.008},
    "expo_fusionbench": {"preset": "fusion_bench"},
    "magmax_official": {},
    "dare_magnitude_mergelm": {"density": 0.7},
}
TOTAL = sum(INPUTS[f"base.{name}"].size for name in NAMES)
# The authors count entries; tensors after the first lie in another order there, which the split does not reach.
CROSSOVER = {"splitpoint_slerp_official": {"t": 0.3, "split": 1100 / TOTAL}}
STOCK_OF_TWO = {"model_stock_2_fusionbench": {"preset": "fusion_bench"}}
EMBEDDING = "model.embed_tokens.weight"


@each_case(AVERAGE)
def test_direct_call_gives_the_golden_numbers(case):
    assert n_outside(case, call(case)) == 0


@each_case(AVERAGE | CROSSOVER)
def test_engine_gives_the_golden_numbers(case, tmp_path, monkeypatch):
    assert n_outside(case, merge_case(case, tmp_path, monkeypatch)) == 0


@each_case(CROSSOVER)
def test_crossover_of_whole_models_gives_the_golden_numbers(case):
    assert n_outside(case, call_joined(case)) == 0


@each_case(CROSSOVER)
def test_another_split_is_outside_the_tolerance(case):
    assert n_outside(case, call_joined({**case, "average": {**case["average"], "split": 1101 / TOTAL}})) >= 1


@each_case(STOCK_OF_TWO)
def test_ignored_tensors_are_averaged(case, tmp_path, monkeypatch):
    ignored = {"match": EMBEDDING, "average": {"method": "linear"}}
    merged = merge_case({**case, "overrides": [ignored]}, tmp_path, monkeypatch)
    assert n_outside(case, merged) == 0
    assert n_outside(case, call(case) | {EMBEDDING: merged[EMBEDDING]}) == 0
    assert n_outside(case, call(case)) >= 1


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model_stock_fusionbench", {"preset": "mergekit"}),
        ("model_stock_mergekit", {"preset": "fusion_bench"}),
        ("model_stock_rows_mergekit", {}),
        ("nuslerp_rows_base_mergekit", {"over": "column"}),
        ("nuslerp_flat_base_mergekit", {"space": "weight"}),
        ("karcher_deltas_mergekit", {"space": "delta", "max_iter": 0}),
        ("ramplus_tl_mergekit", {"epsilon": 0.008, "alpha": 0.15}),
    ],
)
def test_another_choice_is_outside_the_tolerance(name, other):
    case = {**CASES[name], "average": {"method": CASES[name]["method"], **other}}
    assert n_outside(case, call(case)) >= 1
