"""Golden numbers that the authors' and other tools' code gave on the same inputs; see scripts/copy_golden.py.

A test file maps cases to what a recipe says under `average`, the method only where the case calls it otherwise.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.numpy import load_file, save_file

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.methods._ops import kth_magnitudes
from mediator_cli.methods.registry import resolve_method
from mediator_cli.methods.statistics import Slab, Sum

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
CASES = {case["id"]: case for case in INDEX["cases"]}
INPUTS = load_file(GOLDEN / "inputs.safetensors")
NAMES = list(INDEX["tensors"])
ROLES = {"model.embed_tokens.weight": "embedding"}


def each_case(averages, **fields):
    """Parametrize a test over cases: ids to what a recipe says under `average`; `fields` replace those of all cases."""
    cases = [
        {**CASES[name], "average": {"method": CASES[name]["method"], **how}, **fields} for name, how in averages.items()
    ]
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
    own = stored(case).get(f"in.{model}.{name}")
    return common_tensor(model, name) if own is None else own


def common_tensor(model, name):
    """A model's own tensor, or the base's with what an adapter adds to it."""
    if not model.startswith("lora"):
        return INPUTS[f"{model}.{name}"]
    base, layer = INPUTS[f"base.{name}"], f"{model}.{name.removesuffix('.weight')}"
    return base + INPUTS[f"{layer}.B"] @ INPUTS[f"{layer}.A"] if f"{layer}.A" in INPUTS else base


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


def given(case, method, name):
    """A tensor as a method sees it: how, its inputs, uniform numbers, and the base."""
    base = INPUTS[f"base.{name}"]
    is_delta = method.space == "delta"
    inputs = np.stack([tensor_of(case, m, name) - (base if is_delta else 0) for m in case["models"]])
    uniforms = np.stack([uniforms_of(case, m, name).reshape(base.shape) for m in case["models"]])
    view = method.view_of(base.shape, ROLES.get(name, "linear"))
    arrays = inputs, uniforms, base[None]
    if view == "elements":
        arrays = [x.reshape(len(x), -1) for x in arrays]
    elif view == "transposed":
        arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    return view, arrays[0], arrays[1], arrays[2][0]


def call(case, names=NAMES, found=None):
    """Call the method on each named tensor by itself, whole or entry by entry as it wants it; merged tensors.

    `found` has statistics by tensor; those that it lacks are the method's own business.
    """
    method = resolved(case["average"])
    merged = {}
    for name in names:
        base = INPUTS[f"base.{name}"]
        view, inputs, uniforms, seen_base = given(case, method, name)
        in_rows = method.find_in_rows(inputs, base.shape[-1], seen_base) if method.needs_rows else {}
        statistics = {**(found or {}).get(name, {}), **in_rows}
        answer = method(inputs, np.array(weights_of(case)), statistics, uniforms, seen_base)
        answer = (answer.T if view == "transposed" else answer).reshape(base.shape)
        merged[name] = answer + base if method.space == "delta" else answer
    return merged


def statistics_of(case, names=NAMES):
    """Find the statistics that a method declares, over whole tensors and all of them, in memory; by tensor."""
    method = resolved(case["average"])
    found = {name: {} for name in names}
    for statistic in method.needed_statistics():
        cells = [names] if statistic.over(method.params) == "model" else [[name] for name in names]
        for cell in cells:
            value = _found(statistic, method, [_slab_of(case, method, name, statistic, found[name]) for name in cell])
            for name in cell:
                found[name][statistic.name] = value
    return found


def _slab_of(case, method, name, statistic, found):
    _, inputs, uniforms, _ = given(case, method, name)
    if not statistic.whole:
        inputs, uniforms = inputs.reshape(len(inputs), -1), uniforms.reshape(len(uniforms), -1)
    return Slab(inputs, np.array(weights_of(case)), method.params, found, uniforms)


def _found(statistic, method, slabs):
    if isinstance(statistic, Sum):
        return sum(statistic.block(slab) for slab in slabs)
    rows = np.concatenate([statistic.of(slab) for slab in slabs], axis=1)
    among = int(slabs[0].statistics[statistic.among][0]) if statistic.among else rows.shape[1]
    return kth_magnitudes(rows, statistic.count(method.params, among))


def call_joined(case):
    """Call an element-scoped method on all tensors as one vector, as a statistic over the model wants it."""
    method = resolved(case["average"])
    joined = {m: np.concatenate([tensor_of(case, m, n).ravel() for n in NAMES]) for m in ("base", *case["models"])}
    base, inputs = joined["base"], np.stack([joined[m] for m in case["models"]])
    uniforms = np.stack([np.concatenate([uniforms_of(case, m, n) for n in NAMES]) for m in case["models"]])
    is_delta = method.space == "delta"
    found = method(inputs - base if is_delta else inputs, np.array(weights_of(case)), {}, uniforms)
    cuts = np.cumsum([INPUTS[f"base.{n}"].size for n in NAMES])[:-1]
    return dict(zip(NAMES, np.split(found + base if is_delta else found, cuts), strict=True))


def merge_case(case, folder, monkeypatch):
    """Merge a case's inputs by the streaming engine, stored masks in place of drawn numbers."""
    for model in ("base", *case["models"]):
        tensors = {name: torch.from_numpy(tensor_of(case, model, name)) for name in NAMES}
        write_checkpoint(folder / model, tensors, {"num_hidden_layers": 1, "vocab_size": 50})
        if moments := moments_of(case, model):
            save_file(moments, folder / f"{model}.moments.safetensors")

    def draw(seed, name, piece, out):
        out[:] = uniforms_of(case, name, piece.tensor)[piece.start : piece.stop]

    monkeypatch.setattr("mediator_cli.engine.streams.draw", draw)
    plan = make_plan(load_recipe(write_recipe(folder / "recipe.yaml", case)))
    return load_file(merge(plan, folder / "out", settings=Settings(workers=2)) / "model.safetensors")


def moments_of(case, model):
    """A case's second moments of a model by tensor; none where the method needs none."""
    start = f"in.second_moment.{model}."
    return {key.removeprefix(start): value for key, value in stored(case).items() if key.startswith(start)}


def expert_of(case, model, weight):
    beside = {"second_moments": f"./{model}.moments.safetensors"} if moments_of(case, model) else {}
    return {"name": model, "model": f"./{model}", "weight": weight, **beside}


def write_recipe(file, case):
    recipe = {
        "version": 1,
        "base": "./base",
        "experts": [expert_of(case, m, w) for m, w in zip(case["models"], weights_of(case), strict=True)],
        "assign": {"rule": "none"},
        "average": case["average"],
        "overrides": case.get("overrides", []),
        "output": {"dtype": "float32"},
    }
    file.write_text(json.dumps(recipe))
    return file
