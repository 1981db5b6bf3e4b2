"""Methods that see whole matrices: what they are given, by which tensors, and what statistics of them come to."""

import json

import numpy as np
import pytest
import torch
from conftest import edit_tensors, write_checkpoint
from safetensors.numpy import load_file
from threadpoolctl import threadpool_info

from mediator_cli import MediatorError, Settings, load_recipe, make_plan, merge, merge_method
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.matrices import one_blas_thread, whole_bytes
from mediator_cli.methods import registry
from mediator_cli.methods.statistics import Select, Sum, always, linear_maps

SHAPES = {
    "model.embed_tokens.weight": (20, 6),
    "model.layers.0.up.weight": (5, 6),
    "model.layers.0.down.weight": (6, 5),
    "model.layers.0.experts.weight": (3, 4, 6),
    "model.layers.0.thin.weight": (1, 6),
    "model.layers.0.norm.weight": (6,),
    "lm_head.weight": (20, 6),
}
CONFIG = {"num_hidden_layers": 1, "vocab_size": 20, "tie_word_embeddings": False}
WHOLE = [name for name in SHAPES if name.startswith("model.layers.0") and "thin" not in name and "norm" not in name]


def over_model(params):
    return "model"


@pytest.fixture
def method(monkeypatch):
    """Register a method for one test; what it gives depends on what it sees."""
    monkeypatch.setattr(registry, "_REGISTERED", {name: each for name, each in registry.methods().items()})
    return lambda function, **facts: merge_method(space="delta", reference="https://example.org", **facts)(function)


@pytest.fixture
def bench(tmp_path):
    generator = np.random.default_rng(0)

    def make(shapes=SHAPES, n=2):
        sources = [
            {k: generator.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(n + 1)
        ]
        for name, tensors in zip(("base", *(f"e{i}" for i in range(n))), sources, strict=True):
            arrays = {k: torch.from_numpy(v) for k, v in tensors.items()}
            write_checkpoint(tmp_path / name, arrays, CONFIG)
        base, *experts = sources
        return base, [{k: e[k] - base[k] for k in shapes} for e in experts]

    return make


def run(folder, name, n=2, **settings):
    experts = [{"name": f"e{i}", "model": f"./e{i}"} for i in range(n)]
    recipe = {"version": 1, "base": "./base", "experts": experts, "assign": {"rule": "none"}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"average": {"method": name}}))
    plan = make_plan(load_recipe(folder / "recipe.yaml"))
    out = merge(plan, folder / "out", settings=Settings(overwrite=True, **settings))
    return load_file(out / "model.safetensors")


def first_column_doubled(deltas, weights):
    """Double the first column of a matrix, leave all else as the first expert has it."""
    merged = deltas[0].copy()
    if merged.ndim == 2:
        merged[:, 0] *= 2
    return merged


def test_matrices_come_whole_and_all_else_in_slabs(method, bench, tmp_path):
    method(first_column_doubled, view=linear_maps)
    base, deltas = bench()
    merged = run(tmp_path, "first_column_doubled", workers=2)
    for name in SHAPES:
        expected = deltas[0][name].copy()
        if name in WHOLE:
            expected[..., 0] *= 2
        np.testing.assert_array_equal(merged[name], base[name] + expected)


def test_a_transposed_view_is_turned_back(method, bench, tmp_path):
    method(first_column_doubled, view=lambda role, params: "transposed" if role == "embedding" else "elements")
    base, deltas = bench()
    merged = run(tmp_path, "first_column_doubled")
    expected = deltas[0]["model.embed_tokens.weight"].copy()
    expected[0] *= 2
    np.testing.assert_array_equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"] + expected)
    head = "lm_head.weight"
    np.testing.assert_array_equal(merged[head], base[head] + deltas[0][head])


def first_rows(slab):
    """The first row of each matrix, nothing of slabs."""
    return slab.inputs[:, 0] if slab.inputs.ndim == 3 else slab.inputs[:, :0]


def facts_added(deltas, weights, *, n_matrices=None, n_entries=None, limits=None):
    """Add statistics of whole matrices to nothing: how many there are, and a threshold for each expert."""
    return np.full(deltas.shape[1:], n_matrices[0] + 100 * n_entries[0] + 10000 * limits.sum(), np.float32)


FACTS = (
    Sum("n_matrices", lambda slab: np.array([slab.inputs.ndim == 3], float), over_model, always, whole=True),
    Sum("n_entries", lambda slab: np.array([first_rows(slab).shape[1]], float), over_model, always, whole=True),
    Select("limits", lambda params, n: n // 3, over_model, always, of=first_rows, among="n_entries", whole=True),
)


@pytest.mark.parametrize("settings", [{"workers": 1}, {"workers": 3, "slab": BLOCK}])
def test_statistics_of_whole_matrices_are_exact(method, bench, tmp_path, settings):
    method(facts_added, view=linear_maps, statistics=FACTS)
    base, deltas = bench()
    merged = run(tmp_path, "facts_added", **settings)
    rows = [
        np.concatenate([row for name in WHOLE for row in delta[name].reshape(-1, *SHAPES[name][-2:])[:, 0]])
        for delta in deltas
    ]
    n_matrices, n_entries = 5, 6 + 5 + 3 * 6
    limits = [np.sort(np.abs(row))[-(n_entries // 3)] for row in rows]
    expected = np.float32(n_matrices + 100 * n_entries + 10000 * np.float32(limits).sum())
    for name in SHAPES:
        np.testing.assert_allclose(merged[name] - base[name], expected, rtol=1e-5)


def test_thresholds_are_exact_where_a_sample_does_not_see_all(method, bench, tmp_path):
    shapes = {f"model.layers.0.m{at}.weight": (300, 500) for at in range(11)}
    everything = Select("limits", lambda p, n: n // 7, over_model, always, of=flat, among="n_entries", whole=True)
    counted = Sum("n_entries", lambda slab: np.array([flat(slab).shape[1]], float), over_model, always, whole=True)
    method(limits_alone, view=linear_maps, statistics=(counted, everything))
    base, deltas = bench(shapes)
    merged = run(tmp_path, "limits_alone", workers=2)
    limits = []
    for delta in deltas:
        entries = np.concatenate([delta[name].ravel() for name in shapes])
        limits.append(np.sort(np.abs(entries))[-(len(entries) // 7)])
    for name in shapes:
        np.testing.assert_allclose(merged[name], base[name] + np.float32(limits).sum(), rtol=1e-6)


def flat(slab):
    return slab.inputs.reshape(len(slab.inputs), -1)


def limits_alone(deltas, weights, *, n_entries=None, limits=None):
    """Give the sum of the thresholds everywhere."""
    return np.full(deltas.shape[1:], limits.sum(), np.float32)


def test_memory_of_whole_matrices_is_counted_and_refused_where_it_is_not_there(method, bench, tmp_path):
    method(first_column_doubled, view=linear_maps, working_bytes=lambda n, rows, columns: n * rows * columns << 20)
    bench()
    with pytest.raises(MediatorError, match=r"(?s)matrices of 60 MiB that .* whole.*give at least \d+ MiB"):
        run(tmp_path, "first_column_doubled", memory=256 << 20)
    plan = make_plan(load_recipe(tmp_path / "recipe.yaml"))
    assert whole_bytes(plan.tensors, 2) == (2 * 5 * 6 << 20) + 4 * 6 * 5 * 6


def test_blas_is_left_alone_where_no_matrix_is_seen_whole(bench, tmp_path):
    bench()
    run(tmp_path, "linear")
    plan = make_plan(load_recipe(tmp_path / "recipe.yaml"))
    before = threadpool_info()
    with one_blas_thread(plan.tensors):
        assert threadpool_info() == before


def never_converges(matrix, **kwargs):
    raise np.linalg.LinAlgError("SVD did not converge")


@pytest.mark.parametrize("name", ["iso_c", "knots", "opcm"])
def test_what_cannot_be_decomposed_is_named(bench, tmp_path, monkeypatch, name):
    bench()
    monkeypatch.setattr(np.linalg, "svd", never_converges)
    monkeypatch.setattr(np.linalg, "eigh", never_converges)
    with pytest.raises(MediatorError) as raised:
        run(tmp_path, name, workers=1)
    (problem,) = raised.value.problems
    assert problem.place in WHOLE
    assert "could not be found" in problem.message


def solved(deltas, weights):
    """Solve equations that have no answer, of matrices."""
    return np.linalg.solve(np.zeros((2, 2)), np.ones(2)) if deltas.ndim == 3 else deltas[0]


def test_what_lapack_cannot_solve_is_named(method, bench, tmp_path):
    method(solved, view=linear_maps)
    bench()
    with pytest.raises(MediatorError, match=r"(?s)^model\.layers\.0\.\w+\.weight: .*: Singular matrix.*hint"):
        run(tmp_path, "solved", workers=1)


def test_an_entry_that_is_no_number_is_named_with_its_tensor(bench, tmp_path):
    bench()
    name, file = "model.layers.0.experts.weight", tmp_path / "e1" / "model.safetensors"
    edit_tensors(file, lambda tensors: tensors[name].view(-1).__setitem__(30, float("nan")))
    for method in ("iso_c", "opcm"):
        with pytest.raises(MediatorError, match=f"^{name}: expert e1 is nan at flat index 30"):
            run(tmp_path, method)
