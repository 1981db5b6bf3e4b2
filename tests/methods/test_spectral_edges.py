"""What spectral methods promise of zeros, of matrices that are not of full rank, of memory and of parameters."""

import tracemalloc

import numpy as np
import pytest
from spectral_cases import NAMES, decompose, draw, draw_low, each_method, each_shape, merge, rotation

from mediator_cli.methods.iso_cts import _sizes
from mediator_cli.methods.registry import get_method, resolve_method


@each_method
@each_shape
def test_zeros_give_zeros(name, shape):
    assert not merge(name, np.zeros((3, *shape))).any()
    assert not merge(name, draw(shape), [0.0, 0.0, 0.0], **({"normalize": False} if name == "svc" else {})).any()


@each_method
@each_shape
def test_an_expert_without_changes_and_rows_of_zeros_give_finite_results(name, shape):
    deltas = draw(shape)
    deltas[1] = 0
    deltas[:, 0] = 0
    found = merge(name, deltas)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], 0, atol=1e-6)


@each_method
def test_tiny_and_huge_deltas_keep_their_scale(name):
    deltas = draw((7, 5))
    plain = merge(name, deltas)
    for power in (-80, 80):
        np.testing.assert_allclose(merge(name, np.ldexp(deltas, power)), np.ldexp(plain, power), rtol=1e-4)


@each_method
def test_all_equal_entries_have_one_direction(name):
    found = merge(name, np.full((2, 6, 4), 0.5))
    np.testing.assert_allclose(found, found[0, 0], rtol=1e-5)
    assert found[0, 0] > 0


@each_method
def test_other_tensors_are_merged_entry_by_entry(name):
    deltas = np.array([[4, -2, 0], [2, 6, 0]], np.float32)
    found = resolve_method(name, None, {}, str)(deltas, np.array([1.0, 0.5]))
    expected = {"drm": [2.5, 3.0, 0.0], "svc": [10 / 3, 2 / 3, 0.0]}.get(name, [2.5, 0.5, 0.0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_other_tensors_of_lore_like_become_the_weighted_mean():
    found = resolve_method("lore_like", None, {}, str)(np.array([[4, -2], [1, 7]], np.float32), np.array([1.0, 0.5]))
    assert found.tolist() == [3.0, 1.0]


@pytest.mark.parametrize("name", [*NAMES, "lore_like"])
def test_inputs_are_not_changed_and_memory_layout_changes_no_bit(name):
    deltas, weights = draw((9, 6)), np.array([1.0, 0.5, 2.0])
    method = resolve_method(name, None, {}, str)
    turned = np.asfortranarray(deltas)
    wide = np.zeros((3, 9, 12), np.float32)
    wide[:, :, ::2] = deltas
    for given in (deltas, turned, wide[:, :, ::2]):
        given.flags.writeable = False
        np.testing.assert_array_equal(method(given, weights), method(draw((9, 6)), np.array([1.0, 0.5, 2.0])))


@pytest.mark.parametrize("name", [*NAMES, "lore_like"])
def test_the_order_of_experts_changes_nothing(name):
    deltas, weights = draw((9, 6)), np.array([1.0, 0.5, 2.0])
    np.testing.assert_allclose(
        merge(name, deltas[::-1], weights[::-1]), merge(name, deltas, weights), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m", "svc", "stf_like"])
def test_turned_matrices_give_the_turned_result(name):
    deltas = draw((8, 6)).astype(np.float64)
    left, right = rotation(8, 5), rotation(6, 6)
    found = merge(name, left @ deltas @ right)
    np.testing.assert_allclose(found, left @ merge(name, deltas) @ right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 48), (40, 96)])
def test_working_memory_stays_below_what_is_planned(name, shape):
    deltas = draw(shape, n=4)
    merge(name, deltas)
    tracemalloc.start()
    merge(name, deltas)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # LAPACK's own memory is not traced: a copy of the Gram matrix and two more for eigenvalues.
    assert peak + 8 * 3 * min(shape) ** 2 <= get_method(name).working_bytes(4, *shape) + 20_000


def test_iso_c_uses_only_the_directions_that_there_are():
    low = draw_low((40, 30), 2)
    found = merge("iso_c", low)
    u, s, vt = decompose(low[0].astype(np.float64) + low[1])
    np.testing.assert_allclose(found, s[:4].mean() * u[:, :4] @ vt[:4], rtol=1e-4, atol=1e-4)
    assert np.linalg.matrix_rank(found, tol=1e-3) == 4


def test_iso_cts_leaves_out_what_rounding_leaves_outside_of_the_common_part():
    """Both deltas lie in the common directions, so nothing of their own is left but rounding."""
    delta = draw_low((40, 30), 3, n=1)[0]
    found = merge("iso_cts", [delta, 2 * delta])
    np.testing.assert_allclose(found, merge("iso_c", [delta, 2 * delta]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"rank": "full"}])
def test_tsv_m_of_equal_experts_is_that_expert(how):
    delta = draw_low((40, 30), 5, n=1)[0]
    np.testing.assert_allclose(merge("tsv_m", [delta, delta], **how), delta, rtol=1e-4, atol=1e-4)


def test_tsv_m_adds_experts_that_are_orthogonal():
    left, right = rotation(40, 1), rotation(30, 2)
    first, second = ((left[:, at : at + 3] * [4.0, 2.0, 1.0]) @ right[at : at + 3] for at in (0, 3))
    np.testing.assert_allclose(merge("tsv_m", [first, second]), first + second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_tsv_m_gives_a_single_expert_back(lam):
    delta = draw((9, 6), n=1)
    np.testing.assert_array_equal(merge("tsv_m", delta, **{"lambda": lam}), np.float32(lam) * delta[0])


def test_svc_raises_a_direction_of_one_expert_and_damps_a_shared_one():
    first, second = np.diag([4.0, 3.0, 0.0]), np.diag([4.0, 0.0, 2.0])
    found = merge("svc", [first, second], normalize=False)
    # A sum has the shared one twice: shares of 2 and 2. The others' shares are 1 and, as nothing is there, alpha.
    np.testing.assert_allclose(found, np.diag([4.0, 3 * 2 / 1.1, 2 * 2 / 1.1]), rtol=1e-5, atol=1e-6)


def test_svc_does_not_look_at_responses_that_are_rounding():
    """Two experts with no direction in common, in coordinates that show no zeros."""
    left, right = rotation(8, 1), rotation(8, 2)
    first, second = (left[:, at : at + 3] * [4.0, 2.0, 1.0] @ right[at : at + 3] for at in (0, 3))
    found = merge("svc", [first, second], normalize=False, alpha=1.0)
    np.testing.assert_allclose(found, first + second, rtol=1e-4, atol=1e-5)


def test_stf_like_evens_out_experts_that_contradict_each_other():
    delta = draw((12, 9), n=1)[0]
    np.testing.assert_allclose(merge("stf_like", [delta, -delta]), 0, atol=1e-5)
    np.testing.assert_allclose(merge("stf_like", [delta, delta]), delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "n", "expected"),
    [(576, 2, (460, 58)), (576, 3, (459, 39)), (192, 8, (152, 5)), (8, 8, (8, 0)), (3, 2, (1, 1)), (4, 1, (3, 1))],
)
def test_iso_cts_parts_are_those_of_the_authors(rank, n, expected):
    assert _sizes(rank, n, 0.8 if rank != 3 else 0.5) == expected


def test_iso_cts_parts_never_exceed_the_rank():
    for rank in range(1, 20):
        for n in range(1, 25):
            for share in (0.0, 0.3, 0.5, 1.0):
                common, own = _sizes(rank, n, share)
                assert common >= 0
                assert own >= 0
                assert common + n * own == rank


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("iso_cts", {"common_share": 1.1}),
        ("iso_c", {"embeddings": "none"}),
        ("tsv_m", {"rank": "half"}),
        ("tsv_m", {"decorrelate": 1}),
        ("r_tsvm_like", {"sigmas": 0.0}),
        ("r_tsvm_like", {"sigmas": float("inf")}),
        ("svc", {"alpha": 0.0}),
        ("drm", {"density": 0.0}),
        ("drm", {"direction": "diagonal"}),
        ("drm", {"vector_density": 1.5}),
        ("stf_like", {"ridge": 0.0}),
        ("stf_like", {"features": 0.0}),
        ("lore_like", {"mu": -1.0}),
        ("lore_like", {"iterations": 0}),
        ("lore_like", {"lambda": float("nan")}),
    ],
)
def test_a_parameter_out_of_bounds_is_refused(name, params):
    (problem,) = resolve_method(name, None, params, lambda field: f"here {field}")
    assert problem.place == f"here {next(iter(params))}"
