"""Shards and batches: every tensor once, in order, cut by the plan alone."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.checkpoint.write import NewTensor, plan_shards
from mediator_cli.engine import batches
from mediator_cli.engine.batches import cut_shards


def cut(sizes, shard_size, n_experts, most):
    members = [NewTensor(f"t{at}", "BF16", (size,)) for at, size in enumerate(sizes)]
    plans = {f"t{at}": SimpleNamespace(name=f"t{at}", size=size) for at, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batches, "_ROW_ELEMENTS", most)
        return cut_shards(plan_shards(members, shard_size), plans, n_experts)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 200), st.integers(1, 4), st.integers(1, 300)
)
def test_every_tensor_is_in_one_batch_in_the_order_of_the_files(sizes, shard_size, n_experts, most):
    shards = cut(sizes, shard_size, n_experts, most)
    assert [tensor.name for shard in shards for tensor in shard.tensors] == [f"t{at}" for at in range(len(sizes))]
    assert [shard.number for shard in shards] == list(range(len(shards)))
    for shard in shards:
        assert [tensor.name for tensor in shard.tensors] == [member.name for member in shard.members]
        assert [batch.number for batch in shard.batches] == list(range(len(shard.batches)))
        assert all(batch.shard == shard.number for batch in shard.batches)
        for batch in shard.batches:
            assert len(batch.tensors) == 1 or batch.size * n_experts <= most
            assert batch.size == sum(tensor.size for tensor in batch.tensors)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_steps_have_names_of_their_own(sizes, shard_size):
    steps = [batch.step for shard in cut(sizes, shard_size, 2, 40) for batch in shard.batches]
    assert len(set(steps)) == len(steps)


def test_a_batch_is_as_large_as_it_may_be():
    (shard,) = cut([5, 5, 5, 11, 1, 1], 10**6, 2, 20)
    assert [[tensor.size for tensor in batch.tensors] for batch in shard.batches] == [[5, 5], [5], [11], [1, 1]]
