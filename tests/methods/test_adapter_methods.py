"""What every method on adapters promises, and what each does at the edges."""

import numpy as np
import pytest

from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._factors import keep_largest, product_svd, shorten
from mediator_cli.methods.method import ResolvedMethod
from mediator_cli.methods.registry import methods, resolve_method

METHODS = {name: method for name, method in methods().items() if method.space == "adapter"}
FORMS = [(name, {}) for name in METHODS]
FORMS += [(name, {"act_on": "delta"}) for name, method in METHODS.items() if "act_on" in method.schema.model_fields]
FORMS += [("core_space", {"merge": merge}) for merge in ("sum", "mean", "ties", "cart")]
FORMS += [
    ("core_space", {"merge": "sum", "isotropize": True}),
    ("lora_svd", {"rank": 3}),
    ("lora_svd", {"energy": 0.6}),
]
RESOLVED = [resolve_method(name, None, params, str) for name, params in FORMS]
IDS = ["-".join([name, *map(str, params.values())]) for name, params in FORMS]
each_form = pytest.mark.parametrize("method", RESOLVED, ids=IDS)
ROWS, COLUMNS = 12, 9


def draw(*ranks, seed=0, rows=ROWS, columns=COLUMNS):
    """Adapters of these ranks with scalings of their own."""
    generator = np.random.default_rng(seed)
    return [
        Factors(
            generator.standard_normal((rank, columns), np.float32),
            generator.standard_normal((rows, rank), np.float32),
            0.5 + index,
        )
        for index, rank in enumerate(ranks)
    ]


def uniforms(n, which, shape):
    return np.random.default_rng([n, ord(which[0])]).random(shape, np.float32)


def delta(factors):
    return factors.scaling * factors.b.astype(np.float64) @ factors.a.astype(np.float64)


def merged(method, adapters, weights=None):
    weights = np.ones(len(adapters)) if weights is None else np.array(weights, float)
    return method.merge_factors(adapters, weights, uniforms)


def test_the_methods_are_all_here():
    assert sorted(METHODS) == [
        "core_space", "lora_cat", "lora_dare_linear", "lora_dare_ties", "lora_linear", "lora_magnitude_prune",
        "lora_svd", "lora_ties", "robustmerge",
    ]  # fmt: skip


@each_form
def test_factors_are_float32_of_scaling_one_and_fit_the_matrix(method):
    found = merged(method, draw(4, 4, 4), [0.5, 1.0, 2.0])
    assert found.a.dtype == found.b.dtype == np.float32
    assert found.scaling == 1.0
    assert found.a.shape == (found.rank, COLUMNS)
    assert found.b.shape == (ROWS, found.rank)
    assert found.rank > 0


@each_form
def test_adapters_are_not_changed(method):
    adapters = draw(4, 3)
    copies = [(x.a.copy(), x.b.copy()) for x in adapters]
    merged(method, adapters, [0.5, 2.0])
    assert all((x.a == a).all() and (x.b == b).all() for x, (a, b) in zip(adapters, copies, strict=True))


@each_form
def test_ranks_may_differ_and_an_adapter_may_lack_the_module(method):
    adapters = draw(5, 0, 2)
    found = merged(method, adapters)
    assert np.isfinite(delta(found)).all()
    assert np.abs(delta(found)).max() > 0


@each_form
def test_zero_adapters_make_no_change(method):
    adapters = [Factors(x.a, np.zeros_like(x.b), x.scaling) for x in draw(4, 4)]
    assert not delta(merged(method, adapters)).any()
    nothing = draw(0, 0)
    assert not delta(merged(method, nothing)).any()


@each_form
def test_equal_and_deficient_adapters_give_finite_numbers(method):
    (one,) = draw(4)
    one.a[1] = one.a[0]
    one.b[:, 2] = 0
    found = delta(merged(method, [one, one, one]))
    assert np.isfinite(found).all()


@each_form
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (3, 2)])
def test_tiny_matrices_give_finite_numbers(method, rows, columns):
    found = delta(merged(method, draw(4, 2, rows=rows, columns=columns)))
    assert found.shape == (rows, columns)
    assert np.isfinite(found).all()


@each_form
def test_the_order_of_adapters_does_not_matter(method):
    adapters, weights = draw(4, 4, 4), [0.5, 1.0, 2.0]
    found = delta(method.merge_factors(adapters, np.array(weights), uniforms))
    turned = delta(
        method.merge_factors(adapters[::-1], np.array(weights[::-1]), lambda n, which, s: uniforms(2 - n, which, s))
    )
    np.testing.assert_allclose(found, turned, rtol=1e-4, atol=1e-4)


@each_form
def test_weights_and_scalings_matter(method):
    adapters = draw(4, 4)
    found = delta(merged(method, adapters))
    assert not np.allclose(found, delta(merged(method, adapters, [1.0, 0.3])), rtol=1e-3)
    if method.params.get("act_on") == "delta" and "sign" in method.params:
        return  # Signs are elected on deltas with their scaling and without their weight.
    # A weight is a factor on the scaling.
    moved = [adapters[0], Factors(adapters[1].a, adapters[1].b, 0.3 * adapters[1].scaling)]
    np.testing.assert_allclose(
        delta(merged(method, moved)), delta(merged(method, adapters, [1.0, 0.3])), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.identity_at_one])
def test_one_adapter_comes_back(name):
    (one,) = draw(4)
    np.testing.assert_allclose(
        delta(merged(resolve_method(name, None, {}, str), [one])), delta(one), rtol=1e-5, atol=1e-5
    )


def test_cat_and_a_full_svd_and_core_space_sum_are_the_sum():
    adapters, weights = draw(3, 2, 4), [1.0, -0.5, 2.0]
    expected = sum(w * delta(x) for w, x in zip(weights, adapters, strict=True))
    for name, params in (("lora_cat", {}), ("lora_svd", {"rank": 9}), ("core_space", {"merge": "sum"})):
        found = delta(merged(resolve_method(name, None, params, str), adapters, weights))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_svd_is_the_nearest_matrix_of_its_rank():
    adapters = draw(4, 4)
    total = delta(adapters[0]) + delta(adapters[1])
    u, s, vt = np.linalg.svd(total)
    found = merged(resolve_method("lora_svd", None, {"rank": 3}, str), adapters)
    assert found.rank == 3
    np.testing.assert_allclose(delta(found), (u[:, :3] * s[:3]) @ vt[:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("form", [("lora_svd", {}), ("lora_ties", {"act_on": "delta", "density": 1.0})])
def test_a_share_of_energy_takes_the_least_rank(form, energy):
    name, params = form
    adapters = draw(4, 4)
    full = delta(merged(resolve_method(name, None, {**params, "rank": 9}, str), adapters))
    found = merged(resolve_method(name, None, {**params, "energy": energy}, str), adapters)
    held = np.cumsum(np.square(np.linalg.svd(full)[1])) / np.square(full).sum()
    assert found.rank == int(np.argmax(held >= energy)) + 1
    assert np.square(delta(found)).sum() >= energy * np.square(full).sum() * (1 - 1e-6)


def test_the_rank_is_by_default_the_largest_of_the_adapters():
    for name, params in (("lora_svd", {}), ("lora_ties", {"act_on": "delta"}), ("lora_linear", {})):
        assert merged(resolve_method(name, None, params, str), draw(2, 5, 3)).rank == 5


def test_a_dense_delta_is_never_made_where_factors_do(monkeypatch):
    # 4e5 x 3e5 numbers would take 960 GB.
    adapters = draw(2, 3, rows=400_000, columns=300_000)
    for name in ("lora_svd", "core_space", "lora_cat", "lora_linear", "robustmerge"):
        assert merged(resolve_method(name, None, {}, str), adapters).shape == (400_000, 300_000)


@pytest.mark.parametrize("name", ["lora_ties", "lora_magnitude_prune", "lora_dare_linear", "lora_dare_ties"])
@pytest.mark.parametrize("params", [{"rank": 4}, {"energy": 0.5}])
def test_a_rank_needs_the_delta(name, params):
    (problem,) = resolve_method(name, None, params, str)
    assert "act_on: delta" in problem.message
    assert isinstance(resolve_method(name, None, {**params, "act_on": "delta"}, str), ResolvedMethod)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("lora_svd", {"rank": -1}),
        ("lora_svd", {"energy": 0.0}),
        ("lora_ties", {"density": 1.5}),
        ("lora_dare_ties", {"density": 0.0}),
        ("lora_ties", {"act_on": "both"}),
        ("core_space", {"merge": "median"}),
        ("core_space", {"cart_rank": 0.0}),
        ("robustmerge", {"att_ratio": 2.0}),
        ("lora_cat", {"lambda": 1.0}),
    ],
)
def test_a_parameter_out_of_bounds_is_refused(name, params):
    (problem,) = resolve_method(name, None, params, str)
    assert problem.place == next(iter(params))


def test_equal_magnitudes_keep_the_first_and_the_exact_number():
    kept = keep_largest(np.array([[1, -1, 1, 2, 1]], np.float32), 0.6)
    assert kept.tolist() == [[1, -1, 0, 2, 0]]
    assert not keep_largest(np.ones((2, 2), np.float32), 0.2).any()


def test_isotropize_levels_only_directions_that_there_are():
    (one,) = draw(3)
    method = resolve_method("core_space", None, {"merge": "sum", "isotropize": True}, str)
    s = np.linalg.svd(delta(merged(method, [one, one])))[1]
    assert s[3:].max() < 1e-6
    np.testing.assert_allclose(s[:3], s[:3].mean(), rtol=1e-5)


def test_tsv_of_equal_adapters_is_one_of_them():
    (one,) = draw(4)
    found = delta(merged(resolve_method("core_space", None, {}, str), [one, one]))
    s = np.linalg.svd(delta(one))[1]
    assert np.linalg.svd(found)[1][:2] == pytest.approx(s[:2], rel=1e-5)


def test_robustmerge_takes_no_offence_at_a_rank_that_loses_everything():
    one, two = draw(6, 6)
    one.a[0] *= 1e-6
    found = merged(resolve_method("robustmerge", None, {}, str), [one, two])
    assert np.isfinite(delta(found)).all()


def test_factors_are_balanced():
    one, two = draw(3, 3)
    found = shorten(product_svd(np.hstack([one.b, two.b]), np.vstack([one.a, two.a])), 0, 1.0)
    np.testing.assert_allclose(np.linalg.norm(found.a, axis=1), np.linalg.norm(found.b, axis=0), rtol=1e-4)
