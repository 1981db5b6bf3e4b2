"""Slabs, budgets, random numbers, faults in tensors, statistics."""

import numpy as np
import pytest
import torch
from conftest import write_checkpoint

from mediator_cli import Settings, load_recipe, make_plan
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine import streams as module
from mediator_cli.engine.statistics import find_statistics, group_by_method
from mediator_cli.engine.streams import Budget, Piece, make_budget, open_streams, peak_bytes, pieces
from mediator_cli.engine.sweep import carry_out, sum_sweep
from mediator_cli.errors import CheckpointError, OutputError

NAME = "model.layers.1.mlp.up_proj.weight"


def test_pieces_cover_a_tensor_once():
    assert [(p.start, p.stop) for p in pieces("t", 10, 4)] == [(0, 4), (4, 8), (8, 10)]
    assert pieces("t", 0, 4) == []


def draw(seed, name, piece):
    out = np.empty(piece.size, np.float32)
    module.draw(seed, name, piece, out)
    return out


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_uniform_numbers_do_not_depend_on_slabs(blocks):
    size = 3 * BLOCK + 17
    whole = draw(5, "a", Piece("t", 0, size))
    parts = [draw(5, "a", piece) for piece in pieces("t", size, blocks * BLOCK)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(whole) == size


@pytest.mark.parametrize("other", [(6, "a", "t"), (5, "b", "t"), (5, "a", "u")])
def test_uniform_numbers_depend_on_seed_expert_and_tensor(other):
    seed, expert, tensor = other
    mine, theirs = draw(5, "a", Piece("t", 0, 1000)), draw(seed, expert, Piece(tensor, 0, 1000))
    assert int((mine == theirs).sum()) < 5


def test_blocks_draw_different_numbers():
    whole = draw(0, "a", Piece("t", 0, 2 * BLOCK))
    assert int((whole[:BLOCK] == whole[BLOCK:]).sum()) < 50


def test_uniform_numbers_are_uniform():
    numbers = draw(0, "a", Piece("t", 0, 8 * BLOCK))
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert numbers.mean(dtype=np.float64) == pytest.approx(0.5, abs=0.003)
    assert (numbers < 0.2).mean() == pytest.approx(0.2, abs=0.004)


def test_the_budget_takes_all_workers_and_the_largest_slab_that_fit():
    assert make_budget(4, 8, 8 << 30) == Budget(8, 4 * BLOCK)
    tight = peak_bytes(4, Budget(8, 2 * BLOCK))
    assert make_budget(4, 8, tight) == Budget(8, 2 * BLOCK)
    assert make_budget(4, 8, peak_bytes(4, Budget(3, BLOCK))).slab >= BLOCK


def test_the_budget_never_exceeds_the_memory():
    for mebibytes in range(260, 1500, 37):
        assert peak_bytes(3, make_budget(3, 16, mebibytes << 20)) <= mebibytes << 20


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(OutputError, match=r"give at least \d+ MiB"):
        make_budget(4, 8, 100 << 20)


@pytest.mark.parametrize("slab", [BLOCK, 4 * BLOCK])
@pytest.mark.parametrize("workers", [1, 3])
def test_sums_have_the_same_bits_for_any_slab_and_threads(slab, workers):
    rng = np.random.default_rng(0)
    data = {"a": rng.standard_normal(300_000), "b": rng.standard_normal(5)}

    def values(piece, inputs):
        row = data[piece.tensor][piece.start : piece.stop]
        return np.array([[row[at : at + BLOCK].sum()] for at in range(0, len(row), BLOCK)])

    def search():
        sizes = {"a": 300_000, "empty": 0, "b": 5}
        parts = [piece for name, size in sizes.items() for piece in pieces(name, size, slab)]
        return (yield [sum_sweep(lambda piece: None, sizes, parts, 1, values)])

    ((sums,),) = carry_out(search(), workers, lambda n: None)
    expected = []
    for name in ("a", "empty", "b"):
        total = 0.0
        for at in range(0, len(data.get(name, ())), BLOCK):
            total += data[name][at : at + BLOCK].sum()
        expected.append([total])
    assert sums.tobytes() == np.array(expected).tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("space", ["delta", "weight"])
def test_a_broken_entry_is_reported_with_expert_tensor_and_index(workshop, value, space):
    workshop.experts["b"][NAME].view(-1)[17] = value
    write_checkpoint(workshop.folder / "b", workshop.experts["b"])
    method = {"delta": "task_arithmetic", "weight": "linear"}[space]
    with pytest.raises(CheckpointError, match=rf"{NAME}: expert b is {value} at flat index 17"):
        workshop.merge(assign={"rule": "none"}, average={"method": method})
    assert not (workshop.folder / "out").exists()


def test_a_broken_entry_behind_the_first_slab_has_its_index_in_the_tensor(workshop):
    base = {NAME.replace("1", "0"): torch.zeros(100_000)}
    expert = {name: tensor.clone() for name, tensor in base.items()}
    expert[NAME.replace("1", "0")][70_000] = float("nan")
    for name, tensors in (("base", base), ("a", base), ("b", expert)):
        write_checkpoint(workshop.folder / name, tensors, {"num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match="expert b is nan at flat index 70000"):
        workshop.merge("out", Settings(workers=2, slab=BLOCK), assign={"rule": "none"})


def test_a_broken_base_is_not_blamed_on_an_expert(workshop):
    workshop.base[NAME].view(-1)[3] = float("nan")
    write_checkpoint(workshop.folder / "base", workshop.base)
    with pytest.raises(CheckpointError, match=rf"{NAME}: base is nan at flat index 3"):
        workshop.merge(assign={"rule": "none"}, average={"method": "ties"})


def test_a_result_beyond_the_output_dtype_is_an_error(workshop):
    for tensors in workshop.experts.values():
        tensors[NAME].view(-1)[5] = 1e6
    for name, tensors in workshop.experts.items():
        write_checkpoint(workshop.folder / name, tensors)
    with pytest.raises(CheckpointError, match=r"the merged tensor in F16 is inf at flat index 5"):
        workshop.merge(assign={"rule": "none"}, output={"dtype": "float16"})


def test_large_finite_values_are_not_mistaken_for_faults(workshop):
    # Their sum overflows float32: a check by sums would blame them.
    for tensors in (workshop.base, *workshop.experts.values()):
        tensors[NAME].fill_(3e38)
    for name, tensors in {"base": workshop.base, **workshop.experts}.items():
        write_checkpoint(workshop.folder / name, tensors)
    out = workshop.merge(assign={"rule": "none"}, average={"method": "task_arithmetic"})
    assert (out / "model.safetensors").exists()


AVERAGES = [
    {"method": "ties", "density": 0.3},
    {"method": "ties", "density": 0.3, "keep": "exact"},
    {"method": "dare_ties", "density": 0.5, "trim_density": 0.4},
]


def statistics(workshop, **fields):
    """Find the statistics of the only group of a plan."""
    plan = make_plan(load_recipe(workshop.recipe(**fields)))
    (group,) = group_by_method(plan.tensors)
    with open_streams(plan) as streams:
        return group, carry_out(find_statistics(streams, group, BLOCK), 2, lambda n: None)


def delta(workshop, expert, name):
    return (workshop.experts[expert][name].float() - workshop.base[name].float()).flatten().numpy()


def largest(row, k):
    return np.sort(np.abs(row))[::-1][k - 1]


@pytest.mark.parametrize("average", AVERAGES, ids=["ties", "ties exact", "dare_ties"])
def test_statistics_over_the_model_are_those_of_one_long_vector(workshop, average):
    group, found = statistics(workshop, assign={"rule": "none"}, average=average, seed=3)
    names = [tensor.name for tensor in group.tensors]
    deltas = np.stack([np.concatenate([delta(workshop, e, n) for n in names]) for e in "ab"])
    if average["method"] == "dare_ties":
        numbers = [np.concatenate([draw(3, e, Piece(t.name, 0, t.size)) for t in group.tensors]) for e in "ab"]
        deltas = np.where(np.stack(numbers) < 0.5, deltas, np.float32(0)) / np.float32(0.5)
    size = deltas.shape[1]
    k = int(size * 0.3) if average.get("keep") else int(size * average.get("trim_density", 0.3)) + 1
    thresholds = np.array([largest(row, k) for row in deltas])
    signs = np.sign(np.where(np.abs(deltas) >= thresholds[:, None], deltas, np.float32(0)).sum(0))
    for name in names:
        assert np.array_equal(found[name]["thresholds"], thresholds)
        assert found[name]["majority"].item() == signs.sum().item()


def test_statistics_per_tensor_are_those_of_each_tensor(workshop):
    group, found = statistics(workshop, average={"method": "ties", "trim": "tensor", "density": 0.3})
    for tensor in group.tensors:
        for index, expert in enumerate(workshop.experts):
            exact = largest(delta(workshop, expert, tensor.name), int(tensor.size * 0.3) + 1)
            assert found[tensor.name]["thresholds"][index] == exact
