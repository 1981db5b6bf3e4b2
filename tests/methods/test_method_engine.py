"""Every registered method through the streaming engine: any slab, any thread count, any shape."""

import json
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from pydantic import Field
from safetensors.numpy import load_file, save_file

from mediator_cli import MediatorError, Settings, load_recipe, make_plan, merge, merge_method
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.streams import Piece, draw
from mediator_cli.methods import registry
from mediator_cli.methods.registry import methods, resolve_method

# Rows that slabs cut, and that no block ends with; few ones, whose singular values cost little.
SHAPE = (63, 1600)
SIZE = 63 * 1600
BIG = "model.layers.0.big.weight"
METHODS = {name: method for name, method in methods().items() if method.space != "adapter"}
CASES = [(name, preset) for name, method in METHODS.items() for preset in (None, *method.presets)]
MOMENTS = [name for name, method in METHODS.items() if method.needs_moments]
each_case = pytest.mark.parametrize("case", CASES, ids=[f"{name}-{preset or 'defaults'}" for name, preset in CASES])


def spec(case):
    name, preset = case
    average = {"method": name} | ({"preset": preset} if preset else {})
    # Presets that drop nothing would not show whether random numbers depend on slabs.
    average |= {"density": 0.5} if METHODS[name].random and "density" in METHODS[name].schema.model_fields else {}
    return average | ({"iterations": 5} if "iterations" in METHODS[name].schema.model_fields else {})


def draw_checkpoints(shapes, n, seed=0):
    """A base and n experts near it, which leave every third entry as it was."""
    generator = np.random.default_rng(seed)
    base = {name: np.asarray(generator.standard_normal(shape, np.float32)) for name, shape in shapes.items()}

    def moved(tensor):
        steps = np.float32(0.1) * generator.standard_normal(tensor.shape, np.float32)
        return tensor + np.where(np.arange(tensor.size).reshape(tensor.shape) % 3 == 1, np.float32(0), steps)

    return base, [{name: moved(tensor) for name, tensor in base.items()} for _ in range(n)]


def write(folder, tensors):
    """Write arrays as a checkpoint."""
    write_checkpoint(folder, {n: torch.from_numpy(np.array(t)) for n, t in tensors.items()}, {"num_hidden_layers": 1})


def make_bench(folder, shapes, n):
    """Write a base and n experts."""
    base, experts = draw_checkpoints(shapes, n)
    write(folder / "base", base)
    for index, expert in enumerate(experts):
        write(folder / f"e{index}", expert)
        save_file({name: np.array(tensor**2) for name, tensor in expert.items()}, folder / f"v{index}.safetensors")
    return SimpleNamespace(folder=folder, n=n, base=base, experts=experts)


def run(bench, average, seed=0, **settings):
    """Merge the bench's experts; the merged tensors."""
    weights = [1.0, 0.5, 0.25][: bench.n]
    experts = [{"name": f"e{i}", "model": f"./e{i}", "weight": w} for i, w in enumerate(weights)]
    if average["method"] in MOMENTS:
        experts = [{**expert, "second_moments": f"./v{i}.safetensors"} for i, expert in enumerate(experts)]
    recipe = {"version": 1, "base": "./base", "experts": experts, "assign": {"rule": "none"}, "seed": seed}
    file = bench.folder / "recipe.yaml"
    file.write_text(json.dumps(recipe | {"average": average}))
    how = Settings(overwrite=True, **{"workers": 1, **settings})
    folder = merge(make_plan(load_recipe(file)), bench.folder / "out", settings=how)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Three experts, and two or one for methods that take no more, of more than three blocks."""
    return {n: make_bench(tmp_path_factory.mktemp(f"big{n}"), {BIG: SHAPE}, n) for n in (1, 2, 3)}


def bench_for(case, benches):
    most = METHODS[case[0]].n_inputs[1]
    return benches[min(3, most or 3)]


@each_case
def test_slabs_and_threads_change_no_bit_and_streaming_equals_one_direct_call(case, big):
    bench = bench_for(case, big)
    one = run(bench, spec(case), seed=7, slab=4 * BLOCK)[BIG]
    many = run(bench, spec(case), seed=7, slab=BLOCK, workers=3)[BIG]
    assert np.array_equal(one.view(np.int32), many.view(np.int32))
    np.testing.assert_allclose(one, called(case, bench), rtol=1e-6, atol=1e-6)


def as_view(rows, view):
    """Rows [n, m] of BIG as a method sees them."""
    if view == "elements":
        return rows
    matrices = rows.reshape(len(rows), *SHAPE)
    return matrices if view == "matrix" else np.ascontiguousarray(matrices.swapaxes(1, 2))


def called(case, bench):
    """What a method gives for BIG in one call, with the random numbers of seed 7."""
    average = spec(case)
    params = {key: value for key, value in average.items() if key not in ("method", "preset")}
    method = resolve_method(case[0], case[1], params, str)
    is_delta = method.space == "delta"
    inputs = np.stack([(e[BIG] - bench.base[BIG] if is_delta else e[BIG]).ravel() for e in bench.experts])
    uniforms = np.empty(inputs.shape, np.float32)
    view = method.view_of(SHAPE, "linear")
    for index, row in enumerate(uniforms):
        draw(7, f"e{index}", Piece(BIG, 0, SIZE), row)
    weights = np.array([1.0, 0.5, 0.25][: bench.n])
    base = bench.base[BIG].reshape(1, -1)
    in_rows = method.find_in_rows(inputs, SHAPE[-1], base)
    if method.method.needs_moments:
        in_rows["moments"] = np.stack([(expert[BIG] ** 2).ravel() for expert in bench.experts])
    merged = method(as_view(inputs, view), weights, in_rows, as_view(uniforms, view), as_view(base, view)[0])
    merged = (merged.T if view == "transposed" else merged).reshape(SHAPE)
    return merged + bench.base[BIG] if is_delta else merged


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.random])
def test_the_seed_alone_chooses_the_random_numbers(name, big):
    average = {"method": name, **({"noise": 0.5} if name == "noisy_copy" else {"density": 0.5})}
    bench = big[min(3, METHODS[name].n_inputs[1] or 3)]
    first, again, other = (run(bench, average, seed=seed)[BIG] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_seed_changes_nothing_where_nothing_is_random(big):
    average = {"method": "ties"}
    assert np.array_equal(run(big[3], average, seed=1)[BIG], run(big[3], average, seed=2)[BIG])


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Tensors of unusual shapes: 0-d, one element, empty, 3-D."""
    shapes = {
        "model.layers.0.scalar": (),
        "model.layers.0.one": (1,),
        "model.layers.0.empty": (0, 4),
        "model.layers.0.nothing": (0,),
        "model.layers.0.cube": (2, 3, 5),
    }
    return {n: make_bench(tmp_path_factory.mktemp(f"odd{n}"), shapes, n) for n in (1, 2, 3)}


@each_case
def test_odd_shapes_go_through_the_engine(case, odd):
    bench = bench_for(case, odd)
    merged = run(bench, spec(case))
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in bench.base.items()}
    assert all(np.isfinite(tensor).all() for tensor in merged.values())


def test_a_0d_tensor_is_averaged_by_value(odd):
    merged = run(odd[3], {"method": "linear"})["model.layers.0.scalar"]
    values = [expert["model.layers.0.scalar"].item() for expert in odd[3].experts]
    assert merged.item() == pytest.approx((values[0] + 0.5 * values[1] + 0.25 * values[2]) / 1.75, rel=1e-6)


@each_case
def test_experts_equal_to_the_base_give_the_base(case, tmp_path):
    bench = make_bench(tmp_path, {BIG: (50,)}, min(2, METHODS[case[0]].n_inputs[1] or 2))
    for index in range(bench.n):
        write(tmp_path / f"e{index}", bench.base)
    merged = run(bench, spec(case))[BIG]
    assert np.allclose(merged, bench.base[BIG], rtol=1e-6, atol=0)


@pytest.fixture
def third_party(monkeypatch):
    """A method of another package, found through its entry point."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))

    def load():
        @merge_method(space="delta", reference="https://example.org")
        def first_wins(
            deltas, weights, *, factor: Annotated[float, Field(gt=0, description="Factor on the delta.")] = 2.0
        ):
            """Take the first expert's delta, scaled."""
            return deltas[0] * factor

    points = [SimpleNamespace(load=load)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "mediator_cli.methods" else [])


@pytest.mark.usefixtures("third_party")
def test_a_method_of_another_package_merges(tmp_path):
    bench = make_bench(tmp_path, {BIG: (50,)}, 2)
    merged = run(bench, {"method": "first_wins", "factor": 0.5})[BIG]
    assert np.array_equal(merged, bench.base[BIG] + (bench.experts[0][BIG] - bench.base[BIG]) * np.float32(0.5))


@pytest.mark.usefixtures("third_party")
def test_parameters_of_a_method_of_another_package_are_checked(tmp_path):
    bench = make_bench(tmp_path, {BIG: (50,)}, 2)
    with pytest.raises(MediatorError, match=r"average\.factor.*greater than 0"):
        run(bench, {"method": "first_wins", "factor": -1.0})


def test_a_method_of_another_package_is_unknown_without_its_entry_point(tmp_path):
    with pytest.raises(MediatorError, match="unknown merge method 'first_wins'"):
        run(make_bench(tmp_path, {BIG: (50,)}, 2), {"method": "first_wins"})
