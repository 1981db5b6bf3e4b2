"""What every registered method promises, with its defaults and with every preset."""

import doctest
from importlib import import_module
from pkgutil import iter_modules

import numpy as np
import pytest

import mediator_cli.methods as package
from mediator_cli.methods.method import ResolvedMethod
from mediator_cli.methods.registry import methods, resolve_method

METHODS = methods()
ON_TENSORS = {name: method for name, method in METHODS.items() if method.space != "adapter"}
CASES = [(name, preset) for name, method in ON_TENSORS.items() for preset in (None, *method.presets)]
RESOLVED = [resolve_method(name, preset, {}, str) for name, preset in CASES]
IDS = [f"{name}-{preset or 'defaults'}" for name, preset in CASES]
each_case = pytest.mark.parametrize("method", RESOLVED, ids=IDS)
OF_MATRICES = {
    name: method for name, method in zip(IDS, RESOLVED, strict=True) if method.view_of((24, 10), "linear") != "elements"
}
each_matrix_case = pytest.mark.parametrize("method", OF_MATRICES.values(), ids=OF_MATRICES)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def count_of(method, wanted=3):
    fewest, most = method.n_inputs
    return min(max(fewest, wanted), most or wanted)


def draw(method, m, seed=0):
    """Inputs [n, m], weights [n] and uniform numbers [n, m]."""
    generator = np.random.default_rng(seed)
    n = count_of(method.method)
    inputs = generator.standard_normal((n, m), np.float32)
    weights = 0.2 + generator.random(n)
    return inputs, weights, generator.random((n, m), np.float32)


def draw_seen(method, seed=0):
    """Matrices if the method wants to see them whole, since it may leave all else as it was; entries if not."""
    is_whole = method.view_of((40, 25), "linear") != "elements"
    return draw_matrices(method, 40, 25, seed) if is_whole else draw(method, 1000, seed)


def call(method, inputs, weights, uniforms):
    return method(inputs, weights, None, uniforms)


@each_case
def test_shape_and_dtype_are_kept(method):
    merged = call(method, *draw(method, 1000))
    assert merged.shape == (1000,)
    assert merged.dtype == np.float32


@each_case
def test_the_result_depends_on_the_inputs(method):
    assert not np.array_equal(call(method, *draw_seen(method)), call(method, *draw_seen(method, seed=1)))


@each_case
def test_inputs_are_not_changed(method):
    given = draw(method, 1000)
    copies = [array.copy() for array in given]
    call(method, *given)
    assert all(np.array_equal(array, copy) for array, copy in zip(given, copies, strict=True))


@each_case
def test_nothing_to_merge_gives_nothing(method):
    inputs, weights, uniforms = draw(method, 1000)
    if method.space == "delta":
        assert np.array_equal(call(method, inputs * 0, weights, uniforms), np.zeros(1000))
    else:
        same = np.broadcast_to(inputs[:1], inputs.shape)
        assert np.allclose(call(method, same, weights, uniforms), inputs[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "method",
    [m for m in RESOLVED if m.method.identity_at_one and m.params.get("lambda", 1) == 1],
    ids=lambda method: method.method.name,
)
def test_one_expert_of_weight_one_comes_back(method):
    expert = np.random.default_rng(4).standard_normal((1, 1000), np.float32)
    assert np.array_equal(call(method, expert, np.ones(1), np.zeros((1, 1000), np.float32)), expert[0])


@each_case
def test_the_order_of_experts_matters_as_declared(method):
    inputs, weights, uniforms = draw(method, 1000)
    turned = [array[::-1] for array in (inputs, weights, uniforms)]
    same = np.allclose(call(method, inputs, weights, uniforms), call(method, *turned), rtol=1e-5, atol=1e-6)
    # slerp at t = 0.5 is symmetric by chance, so only the promise of symmetry can be checked.
    assert same or not method.method.symmetric


@each_case
def test_weights_matter_as_declared(method):
    inputs, weights, uniforms = draw_seen(method)
    other = weights * np.linspace(0.5, 2.0, len(weights))
    same = np.array_equal(call(method, inputs, weights, uniforms), call(method, inputs, other, uniforms))
    assert same != method.method.uses_weights


@each_case
@pytest.mark.parametrize("m", [0, 1])
def test_tiny_inputs_give_finite_results(method, m):
    merged = call(method, *draw(method, m))
    assert merged.shape == (m,)
    assert np.isfinite(merged).all()


@each_case
def test_only_random_methods_look_at_random_numbers(method):
    inputs, weights, uniforms = draw(method, 1000)
    if method.method.random and method.params.get("density", 1) < 1:
        none_kept = call(method, inputs, weights, np.full_like(uniforms, 1 - 2**-24))
        assert np.count_nonzero(none_kept) == 0
    else:
        assert np.array_equal(call(method, inputs, weights, 1 - uniforms), call(method, inputs, weights, uniforms))


@each_method
def test_file_function_and_registered_name_are_one(method):
    assert METHODS[method.name] is method
    assert method.function.__name__ == method.name
    assert method.function.__module__ == f"mediator_cli.methods.{method.name}"


def test_every_file_registers_one_method():
    others = ("registry", "method", "statistics")
    files = [m.name for m in iter_modules(package.__path__) if not m.name.startswith("_") and m.name not in others]
    assert sorted(files) == sorted(METHODS)


@each_method
def test_every_method_has_a_doctest_a_summary_and_a_reference(method):
    found = doctest.DocTestFinder().find(method.function, module=import_module(method.function.__module__))
    assert found[0].examples
    assert 10 < len(method.summary) < 100
    assert method.reference.startswith("https://")


@each_method
def test_every_parameter_has_a_description_and_a_default(method):
    for name, field in method.schema.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


@each_method
def test_presets_name_real_parameters_and_have_valid_values(method):
    for preset, values in method.presets.items():
        found = resolve_method(method.name, preset, {}, str)
        assert isinstance(found, ResolvedMethod)
        assert {name: found.params[name] for name in values} == dict(values)


@each_method
def test_parameters_of_a_recipe_win_over_the_preset(method):
    for preset, values in method.presets.items():
        if "lambda" in values:
            assert resolve_method(method.name, preset, {"lambda": 0.125}, str).params["lambda"] == 0.125


def test_an_unknown_method_preset_and_parameter_are_named():
    assert "did you mean 'ties'" in str(resolve_method("tise", None, {}, str)[0])
    assert "no preset 'mergekitt'" in str(resolve_method("ties", "mergekitt", {}, str)[0])
    assert "did you mean 'density'" in str(resolve_method("ties", None, {"desnity": 0.2}, str)[0])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ties", {"density": 0.0}),
        ("ties", {"density": 1.5}),
        ("ties", {"density": "0.2"}),
        ("ties", {"merge": "median"}),
        ("ties", {"lambda": float("nan")}),
        ("slerp", {"t": -0.1}),
        ("linear", {"normalize": 1}),
        ("dare_linear", {"density": float("nan")}),
        ("breadcrumbs", {"gamma": 1.0}),
        ("breadcrumbs", {"over": "model"}),
        ("della", {"epsilon": 0.5}),
        ("sce", {"select_topk": 0.0}),
        ("sce", {"floor": -1.0}),
    ],
)
def test_a_parameter_out_of_bounds_is_refused(name, params):
    (problem,) = resolve_method(name, None, params, lambda field: f"here {field}")
    assert problem.place == f"here {next(iter(params))}"


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.45), (0.9, 0.099), (1.0, 0.15), (0.3, 0.0)])
def test_chances_between_zero_and_one_are_taken(name, density, epsilon):
    found = resolve_method(name, None, {"density": density, "epsilon": epsilon}, str)
    assert found.params["epsilon"] == epsilon


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.1, 0.2), (0.9, 0.1), (0.95, 0.07)])
def test_chances_beyond_zero_or_one_are_refused(name, density, epsilon):
    given = {"density": density, "epsilon": epsilon}
    (problem,) = resolve_method(name, None, given, lambda field: f"here {field}")
    assert problem.place == "here epsilon"
    assert str(density) in problem.message
    assert str(epsilon) in problem.message


@each_case
def test_how_inputs_lie_in_memory_changes_no_bit(method):
    inputs, weights, uniforms = draw(method, 1000)
    wide = np.zeros((len(inputs), 2, 1500), np.float32)
    wide[:, 0, :1000], wide[:, 1, :1000] = inputs, uniforms
    wide.flags.writeable = False
    found = call(method, wide[:, 0, :1000], weights, wide[:, 1, :1000])
    assert np.array_equal(found, call(method, inputs, weights, uniforms))


def draw_matrices(method, rows, columns, seed=0):
    """Matrices [n, rows, columns] as the method sees them, with weights and uniform numbers."""
    inputs, weights, uniforms = draw(method, rows * columns, seed)
    assert method.view_of((rows, columns), "linear") != "elements"
    return inputs.reshape(-1, rows, columns), weights, uniforms.reshape(-1, rows, columns)


@each_matrix_case
@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (2, 2), (13, 13)])
def test_matrices_keep_their_shape_and_stay_finite(method, shape):
    given = draw_matrices(method, *shape)
    copies = [array.copy() for array in given]
    merged = call(method, *given)
    assert merged.shape == shape
    assert merged.dtype == np.float32
    assert np.isfinite(merged).all()
    assert all(np.array_equal(array, copy) for array, copy in zip(given, copies, strict=True))


@each_matrix_case
def test_matrices_of_nothing_give_nothing(method):
    inputs, weights, uniforms = draw_matrices(method, 24, 10)
    if method.space == "delta":
        assert np.array_equal(call(method, inputs * 0, weights, uniforms), np.zeros((24, 10)))
    else:
        same = np.broadcast_to(inputs[:1], inputs.shape)
        assert np.allclose(call(method, same, weights, uniforms), inputs[0], rtol=1e-5, atol=1e-6)


@each_matrix_case
def test_matrices_of_low_rank_stay_finite(method):
    inputs, weights, uniforms = draw_matrices(method, 24, 10)
    inputs = inputs[:, :, :2] @ inputs[:, :2, :]
    inputs[0] = 0
    inputs[-1, 3] = 0
    assert np.isfinite(call(method, inputs, weights, uniforms)).all()


@each_matrix_case
def test_the_order_of_matrices_matters_as_declared(method):
    inputs, weights, uniforms = draw_matrices(method, 24, 10)
    turned = [array[::-1] for array in (inputs, weights, uniforms)]
    same = np.allclose(call(method, inputs, weights, uniforms), call(method, *turned), rtol=1e-4, atol=1e-5)
    assert same or not method.method.symmetric


@each_matrix_case
def test_how_matrices_lie_in_memory_changes_nothing(method):
    inputs, weights, uniforms = draw_matrices(method, 24, 10)
    turned = np.ascontiguousarray(inputs.swapaxes(1, 2)).swapaxes(1, 2)
    turned.flags.writeable = False
    expected = call(method, inputs, weights, uniforms)
    # Linear algebra may add in another order, but only rounds differently.
    assert np.allclose(call(method, turned, weights, uniforms), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [m for m in OF_MATRICES.values() if m.method.identity_at_one and m.params.get("lambda", 1) == 1],
    ids=lambda method: method.method.name,
)
def test_one_matrix_of_weight_one_comes_back(method):
    expert = np.random.default_rng(4).standard_normal((1, 24, 10), np.float32)
    merged = call(method, expert, np.ones(1), np.zeros_like(expert))
    assert np.allclose(merged, expert[0], rtol=1e-4, atol=1e-5)
