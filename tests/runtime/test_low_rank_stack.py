"""Products of low-rank experts, all together or grouped by expert, against dense arithmetic."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.runtime.low_rank import stack_factors

RANKS = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def expert(rank: int, shape: tuple[int, int], seed: int) -> FactorDelta | None:
    generator = torch.Generator().manual_seed(seed)
    if rank == 0:
        return None
    return FactorDelta(
        torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    )


def mixed_densely(experts: list[FactorDelta | None], weights: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Build the matrix of every token [tokens, rows, columns]."""
    each = torch.stack([torch.zeros(shape) if own is None else own.b @ own.a for own in experts])
    return torch.einsum("te,eij->tij", weights, each)


@given(ranks=RANKS, seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_products_are_those_of_each_tokens_own_matrix(ranks: list[int], seed: int, share: float) -> None:
    shape, n_tokens = (5, 7), 6
    experts = [expert(rank, shape, seed + at) for at, rank in enumerate(ranks)]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n_tokens, len(ranks), generator=generator)
    # Few weights are grouped by expert, many computed together.
    weights = weights * (torch.rand(weights.shape, generator=generator) < share)
    x = torch.randn(n_tokens, shape[1], generator=generator)

    found = stack_factors(experts, shape).product(x.t().contiguous(), weights)
    expected = torch.einsum("tij,tj->it", mixed_densely(experts, weights, shape), x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@given(ranks=RANKS, seed=st.integers(0, 10**6))
def test_rows_and_the_transpose_are_those_of_the_matrix(ranks: list[int], seed: int) -> None:
    shape = (6, 4)
    experts = [expert(rank, shape, seed + at) for at, rank in enumerate(ranks)]
    weights = torch.randn(3, len(ranks), generator=torch.Generator().manual_seed(seed))
    indices = torch.tensor([5, 0, 5])
    stack, dense = stack_factors(experts, shape), mixed_densely(experts, weights, shape)
    expected = torch.stack([dense[token, row] for token, row in enumerate(indices)])
    torch.testing.assert_close(stack.rows(indices, weights), expected, atol=1e-4, rtol=1e-4)

    x = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(seed + 1))
    turned = torch.einsum("tij,it->jt", dense, x)
    torch.testing.assert_close(stack.turned().product(x, weights), turned, atol=1e-4, rtol=1e-4)


def test_gradients_of_weights_are_those_of_dense_arithmetic() -> None:
    shape = (4, 3)
    experts = [expert(2, shape, 0), None, expert(3, shape, 1)]
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]], requires_grad=True)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    stack_factors(experts, shape).product(x.t(), weights).square().sum().backward()
    found = weights.grad

    again = weights.detach().clone().requires_grad_()
    torch.einsum("tij,tj->it", mixed_densely(experts, again, shape), x).square().sum().backward()
    assert found is not None
    # A weight of zero has a gradient too: what is learned may grow from it.
    torch.testing.assert_close(found, again.grad)


def test_bytes_are_those_of_the_factors_alone() -> None:
    experts = [expert(2, (100, 50), 0), expert(3, (100, 50), 1)]
    assert stack_factors(experts, (100, 50)).n_bytes == 4 * 5 * (100 + 50)


def test_an_expert_that_changes_nothing_adds_nothing() -> None:
    stack = stack_factors([None, None], (4, 3))
    assert stack.product(torch.ones(3, 2), torch.ones(2, 2)).tolist() == [[0.0, 0.0]] * 4
    assert stack.ranks.tolist() == pytest.approx([0, 0])
