"""Methods on adapters against PEFT, the authors of Core Space and those of RobustMerge."""

import json

import numpy as np
import torch
from conftest import edit_json, write_checkpoint
from golden_cases import INPUTS, NAMES, each_case, resolved, stored, weights_of, write_recipe
from safetensors.numpy import load_file, save_file

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.kernels.factors import Factors

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
TIES, PRUNE = {"density": 0.4}, {"density": 0.4}
CORE = {"lambda": 0.4}
AVERAGE = {
    "peft_linear": {},
    "peft_linear_scaled": {},
    "peft_cat": {},
    "peft_cat_scaled": {},
    "peft_svd": {"rank": 4},
    "peft_svd_scaled": {},
    "peft_ties": {"method": "lora_ties", **TIES},
    "peft_ties_scaled": {"method": "lora_ties", **TIES},
    "peft_ties_frequency": {"method": "lora_ties", **TIES, "sign": "frequency"},
    "peft_ties_svd": {"method": "lora_ties", **TIES, "act_on": "delta", "rank": 6},
    "peft_magnitude_prune": PRUNE,
    "peft_magnitude_prune_svd": {"method": "lora_magnitude_prune", **PRUNE, "act_on": "delta", "rank": 6},
    "peft_dare_linear": {"density": 0.6},
    "peft_dare_ties": {"density": 0.6},
    "core_space_sum_official": {**CORE, "merge": "sum"},
    "core_space_mean_official": {**CORE, "merge": "mean"},
    "core_space_ties_official": {**CORE, "merge": "ties"},
    "core_space_sum_iso_official": {**CORE, "merge": "sum", "isotropize": True},
    "core_space_tsv_official": {"preset": "official", "lambda": 0.4},
    "core_space_tsv_iso_official": {**CORE, "isotropize": True},
    "core_space_cart_official": {**CORE, "merge": "cart"},
    "robustmerge_official": {},
}


def factors_of(case, model, module, scaling):
    """The adapter of one model on one module: the case's own where it has one, else the common one."""
    own = stored(case)
    keys = (f"{model.removeprefix('in.')}.{module}.{which}" for which in "AB")
    return Factors(*(own[f"in.{key}"] if f"in.{key}" in own else INPUTS[key] for key in keys), scaling)


def adapters_of(case, module):
    scalings = case["parameters"].get("lora_alpha_over_r", [1.0] * len(case["models"]))
    return [factors_of(case, *pair) for pair in zip(case["models"], [module] * 9, scalings, strict=False)]


def masks_of(case, module):
    """A number below any density where the stored mask keeps the entry, and above it where not."""
    own = stored(case)

    def uniforms(n, which, shape):
        mask = own[f"in.mask.{case['models'][n]}.{module}.{which}"]
        return np.where(mask == 1, np.float32(0), np.float32(1) - np.finfo(np.float32).eps).reshape(shape)

    return uniforms


def n_outside(case, merged):
    """Count entries outside the tolerance over all that the case stores; it must store something of each module."""
    rtol, atol = case["tolerance"]["rtol"], case["tolerance"]["atol"]
    found = {}
    for module, factors in merged.items():
        delta = factors.scaling * factors.b.astype(np.float64) @ factors.a
        found |= {f"out.{module}.A": factors.a, f"out.{module}.B": factors.b, f"out.delta.{module}": delta}
        found |= {f"out.{module}.weight": INPUTS[f"base.{module}.weight"] + delta}
    expected = {key: value for key, value in stored(case).items() if key.startswith("out.")}
    assert all(any(module in key for key in expected) for module in MODULES)
    return sum(int((abs(found[key] - x) > atol + rtol * abs(x)).sum()) for key, x in expected.items())


def write_adapters(case, folder):
    """Write base and adapters as folders, and the recipe."""
    base = {name: torch.from_numpy(INPUTS[f"base.{name}"]) for name in NAMES}
    write_checkpoint(folder / "base", base, {"num_hidden_layers": 1, "vocab_size": 50})
    for index, model in enumerate(case["models"]):
        tensors, scaling = {}, 1.0
        for module in MODULES:
            factors = adapters_of(case, module)[index]
            tensors[f"base_model.model.{module}.lora_A.weight"] = factors.a
            tensors[f"base_model.model.{module}.lora_B.weight"] = factors.b
            scaling, rank = factors.scaling, factors.rank
        (folder / model).mkdir()
        save_file(tensors, folder / model / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": scaling * rank, "task_type": "CAUSAL_LM"}
        (folder / model / "adapter_config.json").write_text(json.dumps(config))
    return write_recipe(folder / "recipe.yaml", case)


def read_factors(folder):
    """Read the factors of a written adapter; its scaling must be 1."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (config["lora_alpha"], config["alpha_pattern"])
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key}
    key = "base_model.model.{}.lora_{}.weight"
    return {name: Factors(*(tensors[key.format(name, which)] for which in "AB")) for name in names}


def call_on_factors(case):
    method, weights = resolved(case["average"]), np.array(weights_of(case))
    return {m: method.merge_factors(adapters_of(case, m), weights, masks_of(case, m)) for m in MODULES}


@each_case(AVERAGE)
def test_a_direct_call_gives_the_golden_numbers(case):
    assert n_outside(case, call_on_factors(case)) == 0


@each_case(AVERAGE)
def test_merged_folders_give_the_golden_numbers(case, tmp_path, monkeypatch):
    case = {**case, "models": [model.removeprefix("in.") for model in case["models"]]}
    recipe = write_adapters(case, tmp_path)

    def draw(seed, name, piece, out):
        module, which = piece.tensor.rsplit(".", 1)
        out[:] = masks_of(case, module)(case["models"].index(name), which, (piece.size,))

    monkeypatch.setattr("mediator_cli.pipeline.adapters.draw", draw)
    folder = merge(make_plan(load_recipe(recipe)), tmp_path / "out", settings=Settings(workers=2))
    assert n_outside(case, read_factors(folder)) == 0


INTO_A_MODEL = {
    "lora_ties_vector_official": {"method": "ties", "lambda": 0.6},
    "full_space_ties_perlayer_official": {"method": "ties", "density": 0.1, "lambda": 0.4, "trim": "tensor"},
}


@each_case(INTO_A_MODEL)
def test_adapters_merged_into_a_full_model_give_the_golden_numbers(case, tmp_path):
    # Counted are the entries of adapted matrices alone, in which TIES keeps a share of all.
    kept = [name for name in NAMES if name.removesuffix(".weight") not in MODULES]
    recipe = write_adapters(case, tmp_path)
    edit_json(recipe, keep_base=kept)
    plan = make_plan(load_recipe(recipe))
    merged = load_file(merge(plan, tmp_path / "out", settings=Settings(workers=2)) / "model.safetensors")
    expected = {key.removeprefix("out."): value for key, value in stored(case).items()}
    assert len(expected) == len(MODULES)
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, **case["tolerance"])
