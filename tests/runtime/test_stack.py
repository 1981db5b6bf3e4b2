"""Products and mixed matrices of stacked sparse experts against dense arithmetic."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.bundle.deltas import SparseDelta, mix_deltas
from mediator_cli.runtime.mixing import Part
from mediator_cli.runtime.modules import Matrix
from mediator_cli.runtime.stack import Stack, slice_stack, sparse_product, sparse_rows, stack_deltas

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StackedDeltas:
    """Deltas that are stacked already."""

    held: Stack
    name: str = "w"

    def stack(self, device: torch.device) -> Stack:
        return self.held


WEIGHTS = st.lists(st.sampled_from([0.0, 0.25, 0.7, 1.0, -0.5]), min_size=3, max_size=3)


def delta(shape: tuple[int, int], seed: int, density: float = 0.3, overrides: int = 0) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    size = shape[0] * shape[1]
    positions = torch.nonzero(torch.rand(size, generator=generator) < density).flatten()
    values = torch.randn(len(positions), generator=generator)
    chosen = positions[:overrides]
    exact = torch.randn(len(chosen), generator=generator).bfloat16() if overrides else None
    return SparseDelta(shape, positions, values, chosen if overrides else torch.empty(0, dtype=torch.int64), exact)


def dense_delta(item: SparseDelta | None, shape: tuple[int, int]) -> torch.Tensor:
    flat = torch.zeros(shape).flatten()
    if item is not None:
        flat[item.positions] = item.values
    return flat.view(shape)


@given(rows=st.integers(1, 7), columns=st.integers(1, 9), seed=st.integers(0, 10**6), weights=WEIGHTS)
def test_all_three_ways_compute_dense_plus_weighted_deltas(
    rows: int, columns: int, seed: int, weights: list[float]
) -> None:
    shape = (rows, columns)
    deltas = [delta(shape, seed), None, delta(shape, seed + 1, density=0.9)]
    stack = stack_deltas(deltas, shape, CPU)
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator)
    x = torch.randn(4, columns, generator=generator)
    expected = dense + sum(w * dense_delta(item, shape) for w, item in zip(weights, deltas, strict=True))

    used_ = [(item, w) for item, w in zip(deltas, weights, strict=True) if item is not None and w]
    mixed = mix_deltas(dense, used_)
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-6)

    each = torch.tensor([weights] * 4)
    used = [at for at, weight in enumerate(weights) if weight] or [0]
    part = slice_stack(stack, used)
    scales = each[:, part.first : part.first + part.count].t()[:, None]
    product = sparse_product(part, x.t().contiguous(), scales).t()
    torch.testing.assert_close(x @ dense.T + product, x @ expected.T, atol=1e-4, rtol=1e-5)

    indices = torch.arange(4) % rows
    torch.testing.assert_close(dense[indices] + sparse_rows(stack, indices, each), expected[indices])


def test_each_token_has_its_own_weights() -> None:
    shape = (3, 4)
    deltas = [delta(shape, 1), delta(shape, 2), delta(shape, 3)]
    stack = stack_deltas(deltas, shape, CPU)
    x, weights = torch.randn(2, 4), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 2.0]])
    found = sparse_product(slice_stack(stack, [0, 1, 2]), x.t().contiguous(), weights.t()[:, None]).t()
    rows = [
        x[at] @ sum(w * dense_delta(d, shape) for w, d in zip(weights[at].tolist(), deltas, strict=True)).T
        for at in range(2)
    ]
    torch.testing.assert_close(found, torch.stack(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_expert_changes_nothing_else_and_overrides_win(dtype: torch.dtype) -> None:
    item = delta((6, 5), 5, overrides=4)
    dense = torch.randn((6, 5), generator=torch.Generator().manual_seed(9)).to(dtype)
    before = dense.clone()
    full = (dense.float() + dense_delta(item, (6, 5))).to(dtype).flatten()
    full[item.override_positions] = item.override_values.to(dtype)
    assert torch.equal(mix_deltas(dense, [(item, 1.0)]).flatten(), full)
    assert torch.equal(mix_deltas(dense, [(item, 0.3)]), (dense.float() + 0.3 * dense_delta(item, (6, 5))).to(dtype))
    assert torch.equal(dense, before)


def test_overrides_do_not_reach_a_mixture_of_two() -> None:
    shape = (2, 3)
    item, other = delta(shape, 5, density=0.9, overrides=2), delta(shape, 6)
    expected = torch.ones(shape) + dense_delta(item, shape) + 0.5 * dense_delta(other, shape)
    torch.testing.assert_close(mix_deltas(torch.ones(shape), [(item, 1.0), (other, 0.5)]), expected)


def test_no_deltas_give_a_copy_of_the_dense_tensor() -> None:
    dense = torch.randn(2, 2)
    mixed = mix_deltas(dense, [])
    assert torch.equal(mixed, dense)
    assert mixed.data_ptr() != dense.data_ptr()


def test_a_slice_shares_the_memory_of_its_stack() -> None:
    stack: Stack = stack_deltas([delta((4, 4), seed) for seed in range(3)], (4, 4), CPU)
    part = slice_stack(stack, [1, 2])
    assert (part.first, part.count) == (1, 2)
    start = int(stack.starts[4])
    assert part.matrix.values().data_ptr() == stack.values[start:].data_ptr()


def test_experts_apart_give_what_all_of_them_together_give() -> None:
    shape, n_tokens = (5, 7), 48
    deltas = [delta(shape, 1), None, delta(shape, 2), delta(shape, 3)]
    stack = stack_deltas(deltas, shape, CPU)
    weights = torch.zeros(4, 4)
    weights[0, 0], weights[1, 2], weights[2, 3], weights[2, 1] = 1.0, 0.5, -2.0, 0.3
    part = Part(None, weights, None)
    x = torch.randn(shape[1], n_tokens)
    users = part.users(n_tokens)
    assert [(expert, own.tolist()) for expert, own, _ in users] == [
        (0, list(range(12))), (1, list(range(24, 36))), (2, list(range(12, 24))), (3, list(range(24, 36))),
    ]  # fmt: skip
    matrix = Matrix(StackedDeltas(stack))
    apart = matrix.product(x, part)
    together = sparse_product(slice_stack(stack, range(4)), x, part.scales(0, 4, n_tokens))
    torch.testing.assert_close(apart, together)
    expected = torch.stack([
        sum(w * dense_delta(d, shape) for w, d in zip(weights[at // 12].tolist(), deltas, strict=True)) @ x[:, at]
        for at in range(n_tokens)
    ], dim=1)  # fmt: skip
    torch.testing.assert_close(apart, expected, atol=1e-5, rtol=1e-5)


def test_few_tokens_and_experts_that_most_tokens_use_are_not_parted() -> None:
    alone, shared = torch.eye(4), torch.ones(4, 4)
    assert Part(None, alone, None).users(8) == ()
    assert Part(None, shared, None).users(400) == ()
    assert len(Part(None, alone, None).users(400)) == 4
