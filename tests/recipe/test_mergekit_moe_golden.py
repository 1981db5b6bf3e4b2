"""mergekit-moe's configurations, carried out here: its numbers, of version 0.1.5 (scripts/mergekit_moe_golden.py)."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mediator_cli import Settings, load_recipe, make_plan, merge

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "mergekit_moe"
CASES = sorted(GOLDEN.glob("*/*.yaml"))
FORMATS = {"llama": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def golden_script():
    spec = importlib.util.spec_from_file_location("moe_golden_script", ROOT / "scripts" / "mergekit_moe_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of base, a and b for each kind of model, written once."""
    folder, script = tmp_path_factory.mktemp("mergekit_moe"), golden_script()
    for kind in FORMATS:
        script.write_models(ROOT / "tests" / "golden" / "mergekit" / "inputs", folder / kind, kind)
    return folder


def as_mergekit(name):
    """Name a tensor of Mixtral as mergekit-moe does, up to its packing."""
    name = name.replace("block_sparse_moe", "mlp")
    for ours, theirs in MATRICES.items():
        name = name.replace(f".{ours}.weight", f".{theirs}.weight")
    return name


def merged(recipe, out):
    merge(make_plan(load_recipe(recipe)), out, settings=Settings(workers=1))
    found = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {as_mergekit(name): tensor for name, tensor in found.items() if "shared_expert" not in name}


@pytest.mark.parametrize("case", CASES, ids=[f"{case.parent.name}-{case.stem}" for case in CASES])
def test_a_configuration_gives_what_mergekit_moe_gives(models, tmp_path, case):
    kind = case.parent.name
    recipe = shutil.copyfile(case, models / kind / case.name)
    found, expected = merged(recipe, tmp_path / "out"), load_file(case.with_suffix(".safetensors"))
    if len(expected) > 3:
        assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].dtype == wanted.dtype
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if wanted.dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
        if not name.endswith("mlp.gate.weight"):
            tolerance = {"rtol": 0, "atol": 0}
        np.testing.assert_allclose(found[name].float(), wanted.float(), err_msg=name, **tolerance)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == FORMATS[kind]
    assert config["num_experts_per_tok"] == (1 if case.stem == "hidden_last" else 2)
