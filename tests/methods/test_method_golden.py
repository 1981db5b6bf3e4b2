"""Numbers that the authors' and other tools' code gave on the same inputs; see scripts/copy_golden.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.numpy import load_file

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.methods._ops import trim_count
from mediator_cli.methods._ranks import middle_ranks
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
    "breadcrumbs_mergekit": {"preset": "mergekit", "density": 0.6, "gamma": 0.05, "lambda": 0.7},
    "breadcrumbs_default_gamma_mergekit": {"preset": "mergekit", "density": 0.9},
    "breadcrumbs_ties_mergekit": {"preset": "mergekit", "density": 0.6, "gamma": 0.05},
    "breadcrumbs_mergellm": {"preset": "mergellm", "density": 0.75, "gamma": 0.15},
    "breadcrumbs_official": {},
    "breadcrumbs_keep_first_official": {"density": 0.5, "gamma": 0.15, "lambda": 0.6, "keep": "first"},
    "della_mergekit": {"preset": "mergekit", "density": 0.6, "lambda": 0.7},
    "della_linear_mergekit": {"preset": "mergekit", "density": 0.5, "epsilon": 0.1, "lambda": 0.7},
    "della_official": {},
    "della_noelect_official": {},
    "sce_dense_mergekit": {"preset": "mergekit"},
    "sce_topk_mergekit": {"preset": "mergekit", "select_topk": 0.3},
    "sce_tiny_deltas_mergekit": {"preset": "mergekit"},
    "sce_dense_fuseai": {"preset": "fusechat", "select_topk": 1.0},
    "sce_topk_fuseai": {"preset": "fusechat", "select_topk": 0.3},
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


def tensor_of(case, model, name):
    """A case's own input where it has one, else the common one."""
    return stored(case).get(f"in.{model}.{name}", INPUTS[f"{model}.{name}"])


def uniforms_of(case, model, name):
    """A number below any density where the stored mask keeps the entry, and above it where not."""
    mask = stored(case).get(f"in.mask.{model}.{name}", np.ones(INDEX["tensors"][name], np.uint8))
    return np.where(mask.ravel() == 1, np.float32(0), np.float32(1) - np.finfo(np.float32).eps)


def n_outside(case, merged):
    """Count entries outside the tolerance over all tensors that the case stores."""
    expected = {k.removeprefix("out."): v for k, v in stored(case).items() if k.startswith("out.model.")}
    rtol, atol = case["tolerance"]["rtol"], case["tolerance"]["atol"]
    assert expected
    return sum(
        int((abs(merged[name].reshape(value.shape) - value) > atol + rtol * abs(value)).sum())
        for name, value in expected.items()
    )


def call(case, names):
    """Call the method on the named tensors, concatenated to one vector; rows are those of the first."""
    method = resolved(average_of(case))
    joined = {m: np.concatenate([tensor_of(case, m, n).ravel() for n in names]) for m in ("base", *case["models"])}
    base, inputs = joined["base"], np.stack([joined[m] for m in case["models"]])
    uniforms = np.stack([np.concatenate([uniforms_of(case, m, n) for n in names]) for m in case["models"]])
    inputs = inputs - base if method.method.space == "delta" else inputs
    in_rows = method.find_in_rows(inputs, INDEX["tensors"][names[0]][-1]) if method.needs_rows else {}
    merged = method(inputs, np.array(weights_of(case)), in_rows, uniforms)
    merged = merged + base if method.method.space == "delta" else merged
    cuts = np.cumsum([INPUTS[f"base.{n}"].size for n in names])[:-1]
    return dict(zip(names, np.split(merged, cuts), strict=True))


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
            tensors = {name: torch.from_numpy(tensor_of(case, model, name)) for name in NAMES}
            write_checkpoint(tmp_path / model, tensors, {"num_hidden_layers": 1})

        def draw(seed, name, piece, out):
            out[:] = uniforms_of(case, name, piece.tensor)[piece.start : piece.stop]

        monkeypatch.setattr("mediator_cli.engine.streams.draw", draw)
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
    n_compared = 0
    for key, expected in chances.items():
        delta = INPUTS[key] - INPUTS["base." + key.partition(".")[2]]
        found = resolved(average_of(case)).find_in_rows(delta.reshape(1, -1), delta.shape[-1])["chances"]
        # Entries that did not change are equal, so their ranks are arbitrary.
        changed = delta != 0
        n_compared += changed.sum()
        np.testing.assert_allclose(found.reshape(expected.shape)[changed], expected[changed], rtol=1e-6)
    assert n_compared > 5000


def test_one_entry_too_many_is_outside_the_tolerance(monkeypatch):
    case = CASES["ties_mean_official"]
    monkeypatch.setitem(AVERAGE, case["id"], {"density": 569.5 / 2840})
    assert n_outside(case, call(case, NAMES)) >= 1


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
