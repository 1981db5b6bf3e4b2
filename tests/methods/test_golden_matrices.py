"""Golden numbers of the methods that optimise, order or align whole matrices, by direct calls and by the engine."""

from golden_cases import INPUTS, NAMES, call, each_case, merge_case, n_outside, statistics_of

# The sources see two layers, the engine all tensors: those that no adapter changes count where entries are ranked.
LAYERS = [name for name in NAMES if ".self_attn." in name or ".mlp." in name]
N_LAYERS, N_ALL = (sum(INPUTS[f"base.{name}"].size for name in names) for names in (LAYERS, NAMES))
# How the recipe asks for what each source does.
AVERAGE = {
    "wudi_official": {"iterations": 30},
    "wudi_fusionbench": {"preset": "fusion_bench", "iterations": 30},
    "doge_ta_20_fusionbench": {"iterations": 20},
    "doge_ta_400_fusionbench": {"preset": "fusion_bench"},
    "opcm_fusionbench": {"preset": "fusion_bench"},
    "opcm_official": {"preset": "official"},
    "opcm_reordered_fusionbench": {"alpha": 0.7},
    "opcm_reordered_official": {"preset": "official", "alpha": 0.7},
    "widen_official": {},
    "widen_calibrated_official": {"ratio": 1.3, "calibration": 0.9},
    "knots_ties_official": {"preset": "vision"},
    "knots_ties_notrim_official": {"merge": "sum", "lambda": 0.6},
    "knots_sum_official": {"combine": "sum", "lambda": 0.6},
    "knots_ties_transposed_official": {"density": 0.2, "lambda": 0.6, "concat": "input"},
    "knots_perlayer_ties_corespace": {"method": "knots", "preset": "core_space", "lambda": 0.4},
    "full_space_ties_perlayer_official": {"method": "ties", "density": 0.1, "lambda": 0.4, "trim": "tensor"},
    "lora_ties_vector_official": {
        "method": "ties",
        "density": (int(0.2 * N_LAYERS) + 0.5) / N_ALL,
        "lambda": 0.6,
    },
}


@each_case(AVERAGE)
def test_direct_calls_give_the_golden_numbers(case):
    assert n_outside(case, call(case, found=statistics_of(case))) == 0


@each_case(AVERAGE)
def test_engine_gives_the_golden_numbers(case, tmp_path, monkeypatch):
    assert n_outside(case, merge_case(case, tmp_path, monkeypatch)) == 0
