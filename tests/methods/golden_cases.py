"""Golden numbers that the authors' and other tools' code gave on the same inputs; see scripts/copy_golden.py.

A test file maps cases to what a recipe says under `average`, the method only where the case calls it otherwise.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.numpy import load_file

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.methods.registry import resolve_method

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
CASES = {case["id"]: case for case in INDEX["cases"]}
INPUTS = load_file(GOLDEN / "inputs.safetensors")
NAMES = list(INDEX["tensors"])
ROLES = {"model.embed_tokens.weight": "embedding"}


def each_case(averages):
    """Parametrize a test over cases: ids to what a recipe says under `average`."""
    cases = [{**CASES[name], "average": {"method": CASES[name]["method"], **how}} for name, how in averages.items()]
    return pytest.mark.parametrize("case", cases, ids=list(averages))


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


def call(case, names=NAMES):
    """Call the method on each named tensor by itself, whole or entry by entry as it wants it; merged tensors."""
    method = resolved(case["average"])
    weights = np.array(weights_of(case))
    is_delta = method.method.space == "delta"
    merged = {}
    for name in names:
        base = INPUTS[f"base.{name}"]
        inputs = np.stack([tensor_of(case, m, name) - (base if is_delta else 0) for m in case["models"]])
        uniforms = np.stack([uniforms_of(case, m, name).reshape(base.shape) for m in case["models"]])
        view = method.view_of(base.shape, ROLES.get(name, "linear"))
        if view == "elements":
            inputs, uniforms = inputs.reshape(len(inputs), -1), uniforms.reshape(len(inputs), -1)
        elif view == "transposed":
            inputs, uniforms = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (inputs, uniforms))
        in_rows = method.find_in_rows(inputs, base.shape[-1]) if method.needs_rows else {}
        found = method(inputs, weights, in_rows, uniforms)
        found = found.T if view == "transposed" else found
        merged[name] = found.reshape(base.shape) + (base if is_delta else 0)
    return merged


def call_joined(case):
    """Call an element-scoped method on all tensors as one vector, as a statistic over the model wants it."""
    method = resolved(case["average"])
    joined = {m: np.concatenate([tensor_of(case, m, n).ravel() for n in NAMES]) for m in ("base", *case["models"])}
    base, inputs = joined["base"], np.stack([joined[m] for m in case["models"]])
    uniforms = np.stack([np.concatenate([uniforms_of(case, m, n) for n in NAMES]) for m in case["models"]])
    is_delta = method.method.space == "delta"
    found = method(inputs - base if is_delta else inputs, np.array(weights_of(case)), {}, uniforms)
    cuts = np.cumsum([INPUTS[f"base.{n}"].size for n in NAMES])[:-1]
    return dict(zip(NAMES, np.split(found + base if is_delta else found, cuts), strict=True))


def merge_case(case, folder, monkeypatch):
    """Merge a case's inputs by the streaming engine, stored masks in place of drawn numbers."""
    for model in ("base", *case["models"]):
        tensors = {name: torch.from_numpy(tensor_of(case, model, name)) for name in NAMES}
        write_checkpoint(folder / model, tensors, {"num_hidden_layers": 1, "vocab_size": 50})

    def draw(seed, name, piece, out):
        out[:] = uniforms_of(case, name, piece.tensor)[piece.start : piece.stop]

    monkeypatch.setattr("mediator_cli.engine.streams.draw", draw)
    plan = make_plan(load_recipe(write_recipe(folder / "recipe.yaml", case)))
    return load_file(merge(plan, folder / "out", settings=Settings(workers=2)) / "model.safetensors")


def write_recipe(file, case):
    recipe = {
        "version": 1,
        "base": "./base",
        "experts": [
            {"name": m, "model": f"./{m}", "weight": w} for m, w in zip(case["models"], weights_of(case), strict=True)
        ],
        "assign": {"rule": "none"},
        "average": case["average"],
        "output": {"dtype": "float32"},
    }
    file.write_text(json.dumps(recipe))
    return file
