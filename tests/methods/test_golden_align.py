"""Weight matching against golden numbers of its authors' code: a small perceptron and its permuted copy."""

import numpy as np
import pytest
from golden_cases import CASES, stored

from mediator_cli.checkpoint.permuted import PermutedReader
from mediator_cli.checkpoint.read import read_floats
from mediator_cli.engine.align import Effort, Pair, axes_of, match_units
from mediator_cli.plan.units import Side, Units

CASE = CASES["git_rebasin_mlp_official"]
UNITS = (("P_0", "Dense_0", "Dense_1"), ("P_1", "Dense_1", "Dense_2"))


class Arrays:
    """Reads slabs of arrays in memory."""

    def __init__(self, arrays):
        self.arrays = arrays

    def read_into(self, name, start, stop, out):
        out[:] = self.arrays[name].ravel()[start:stop]
        return True


def model(name):
    prefix = f"in.{name}."
    return {key.removeprefix(prefix): value for key, value in stored(CASE).items() if key.startswith(prefix)}


@pytest.mark.parametrize("seed", range(4))
def test_a_perceptron_is_matched_as_its_authors_match_it(seed):
    a, b, golden = model("a"), model("b"), stored(CASE)
    shapes = {name: array.shape for name, array in a.items()}
    units = [
        # Kernels are stored (in, out).
        Units(name, "mlp", a[f"{left}/bias"].size,
              (Side(f"{left}/kernel", 1), Side(f"{left}/bias", 0), Side(f"{right}/kernel", 0)))
        for name, left, right in UNITS
    ]  # fmt: skip
    pair = Pair(Arrays(a), Arrays(b), ("a", "b"), shapes, frozenset(shapes))
    orders = match_units(pair, units, Effort(CASE["parameters"]["max_iter"], seed, 2, 1 << 30), lambda n: None)
    assert {name: order.tolist() for name, order in orders.items()} == {
        name: golden[f"out.perm.{name}"].tolist() for name, _, _ in UNITS
    }
    reader = PermutedReader(Arrays(b), axes_of(units, orders, shapes))
    for name, array in a.items():
        permuted = read_floats(reader, name, 0, array.size).reshape(array.shape)
        np.testing.assert_array_equal(permuted, golden[f"out.permuted_b.{name}"])
        np.testing.assert_allclose((permuted + array) / 2, golden[f"out.midpoint.{name}"], rtol=1e-5, atol=1e-6)
