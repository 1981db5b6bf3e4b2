"""Numbers that the authors' and other tools' code gave on the same inputs; see scripts/copy_golden.py."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.methods._ops import trim_count
from mediator_cli.methods.registry import methods, resolve_method

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
CASES = {case["id"]: case for case in INDEX["cases"]}
INPUTS = load_file(GOLDEN / "inputs.safetensors")
NAMES = list(INDEX["tensors"])
NORM = "model.norm.weight"

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
    "dare_random_mergelm": {"density": 0.7},
    "dare_ties_mergekit": {"preset": "mergekit", "density": 0.6, "lambda": 0.7},
    "dare_ties_mergelm": {"density": 0.7},
}


def average_of(case):
    return {"method": case["method"], **AVERAGE[case["id"]]}


def resolved(average):
    params = {key: value for key, value in average.items() if key not in ("method", "preset")}
    return resolve_method(average["method"], average.get("preset"), params, str)


def stored(case):
    return load_file(GOLDEN / "expected" / f"{case['id']}.safetensors")


def weights_of(case):
    return case["weights"] or [1.0] * len(case["models"])


def uniforms_of(case, model, name):
    """A number below any density where the stored mask keeps the entry, and above it where not."""
    mask = stored(case).get(f"in.mask.{model}.{name}", torch.ones(INDEX["tensors"][name], dtype=torch.uint8))
    return torch.where(mask.flatten() == 1, 0.0, 1.0 - torch.finfo(torch.float32).eps)


def n_outside(case, merged):
    """Count entries outside the tolerance over all tensors that the case stores."""
    expected = {k.removeprefix("out."): v for k, v in stored(case).items() if k.startswith("out.model.")}
    rtol, atol = case["tolerance"]["rtol"], case["tolerance"]["atol"]
    assert expected
    return sum(
        int((merged[name].view_as(value) - value).abs().gt(atol + rtol * value.abs()).sum())
        for name, value in expected.items()
    )


def call(case, names):
    """Call the method on the named tensors, concatenated to one vector."""
    average = average_of(case)
    method = resolved(average)
    inputs = torch.stack([torch.cat([INPUTS[f"{m}.{n}"].flatten() for n in names]) for m in case["models"]])
    base = torch.cat([INPUTS[f"base.{n}"].flatten() for n in names])
    uniforms = torch.stack([torch.cat([uniforms_of(case, m, n) for n in names]) for m in case["models"]])
    weights = torch.tensor(weights_of(case), dtype=torch.float64)
    is_delta = method.method.space == "delta"
    merged = method(inputs - base if is_delta else inputs, weights, None, uniforms)
    merged = merged + base if is_delta else merged
    return dict(zip(names, merged.split([INPUTS[f"base.{n}"].numel() for n in names]), strict=True))


def is_over_model(case):
    return resolved(average_of(case)).params.get("trim") == "model"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_direct_call_gives_the_golden_numbers(case):
    parts = [NAMES] if is_over_model(case) else [[name] for name in NAMES]
    merged = {name: tensor for names in parts for name, tensor in call(case, names).items()}
    assert n_outside(case, merged) == 0


@pytest.fixture
def merge_golden(tmp_path, monkeypatch):
    """Merge a case's inputs by the streaming engine, masks in place of drawn numbers."""

    def run(case):
        for model in ("base", *case["models"]):
            write_checkpoint(tmp_path / model, {n: INPUTS[f"{model}.{n}"] for n in NAMES}, {"num_hidden_layers": 1})
        monkeypatch.setattr(
            "mediator_cli.engine.streams.uniform_slab",
            lambda seed, name, piece: uniforms_of(case, name, piece.tensor)[piece.start : piece.stop],
        )
        plan = make_plan(load_recipe(write_recipe(tmp_path / "recipe.yaml", case)))
        return load_file(merge(plan, tmp_path / "out", settings=Settings(workers=2)) / "model.safetensors")

    return run


def write_recipe(file, case):
    recipe = {
        "version": 1,
        "base": "./base",
        "experts": [
            {"name": m, "model": f"./{m}", "weight": w} for m, w in zip(case["models"], weights_of(case), strict=True)
        ],
        "assign": {"rule": "none"},
        "average": average_of(case),
        "output": {"dtype": "float32"},
    }
    file.write_text(json.dumps(recipe))
    return file


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_engine_gives_the_golden_numbers(case, merge_golden):
    assert n_outside(case, merge_golden(case)) == 0


@pytest.mark.parametrize("name", methods())
def test_every_method_has_a_golden_case(name):
    assert any(case["method"] == name for case in CASES.values())


def test_every_case_is_mapped_to_a_recipe():
    assert set(AVERAGE) == set(CASES)


def test_masked_deltas_equal_those_of_the_dare_authors():
    case = CASES["dare_random_mergelm"]
    masked = {k.removeprefix("out.masked.expert0."): v for k, v in stored(case).items() if k.startswith("out.masked")}
    method = resolved({"method": "dare_linear", "density": 0.7})
    for name, expected in masked.items():
        delta = (INPUTS[f"expert0.{name}"] - INPUTS[f"base.{name}"]).flatten()[None]
        found = method(delta, torch.ones(1, dtype=torch.float64), None, uniforms_of(case, "expert0", name)[None])
        assert torch.allclose(found.view_as(expected), expected, **case["tolerance"])


def test_one_entry_too_many_is_outside_the_tolerance(monkeypatch):
    case = CASES["ties_mean_official"]
    monkeypatch.setitem(AVERAGE, case["id"], {"density": 569.5 / 2840})
    assert n_outside(case, call(case, NAMES)) >= 1


def test_mergellm_keeps_one_entry_more_of_a_small_tensor():
    params = {"density": 0.2, "keep": "dropped"}
    assert (trim_count(params, 24), trim_count({**params, "keep": "paper"}, 24)) == (6, 5)
