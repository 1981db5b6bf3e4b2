"""Reading in another order: any slab of any tensor is that of the permuted array."""

import numpy as np
import pytest

from mediator_cli.checkpoint.permuted import Axes, PermutedReader


class Arrays:
    def __init__(self, **arrays):
        self.arrays = arrays
        self.reads = 0

    def read_into(self, name, start, stop, out):
        self.reads += 1
        out[:] = self.arrays[name].ravel()[start:stop]
        return bool(np.isfinite(out).all())


def read(reader, name, start, stop):
    out = np.empty(stop - start, np.float32)
    assert reader.read_into(name, start, stop, out)
    return out


@pytest.mark.parametrize(("by_rows", "by_columns"), [(True, False), (False, True), (True, True)])
def test_every_slab_is_that_of_the_permuted_matrix(by_rows, by_columns):
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(7, 5)).astype(np.float32)
    rows = generator.permutation(7) if by_rows else None
    columns = generator.permutation(5) if by_columns else None
    wanted = matrix if rows is None else matrix[rows]
    wanted = (wanted if columns is None else wanted[:, columns]).ravel()
    reader = PermutedReader(Arrays(w=matrix), {"w": Axes(5, rows, columns)})
    for start in range(36):
        for stop in range(start, 36):
            np.testing.assert_array_equal(read(reader, "w", start, stop), wanted[start:stop])


def test_a_vector_is_one_row():
    vector = np.arange(6, dtype=np.float32)
    order = np.array([3, 1, 5, 0, 2, 4])
    reader = PermutedReader(Arrays(v=vector), {"v": Axes(6, None, order)})
    np.testing.assert_array_equal(read(reader, "v", 1, 5), vector[order][1:5])


def test_rows_that_follow_each_other_are_read_in_one_go():
    inner = Arrays(w=np.zeros((100, 3), np.float32))
    order = np.concatenate([np.arange(50, 100), np.arange(50)])
    read(PermutedReader(inner, {"w": Axes(3, order)}), "w", 0, 300)
    assert inner.reads == 2


def test_other_tensors_are_read_as_they_are():
    inner = Arrays(w=np.ones(4, np.float32))
    assert read(PermutedReader(inner, {}), "w", 1, 3).tolist() == [1, 1]


def test_only_what_is_asked_for_has_to_be_finite():
    matrix = np.array([[1, 2], [np.nan, 4]], np.float32)
    reader = PermutedReader(Arrays(w=matrix), {"w": Axes(2, None, np.array([1, 0]))})
    out = np.empty(3, np.float32)
    assert reader.read_into("w", 0, 3, out)
    assert out.tolist() == [2, 1, 4]
    assert not reader.read_into("w", 1, 4, out)
