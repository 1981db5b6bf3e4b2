"""An exact tie of signs, which the golden inputs do not contain: the majority's sign, or plus."""

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.numpy import load_file

from mediator_cli.methods.registry import resolve_method

# Entry 0 is tied; the elected signs of the others are minus, minus, plus.
DELTAS = np.array([[2, -1, -3, 1], [-2, -1, -3, 1]], np.float32)
FIRST, SECOND = "model.layers.0.first.weight", "model.layers.0.second.weight"
METHODS = {"ties": {"density": 1.0}, "dare_ties": {"density": 1.0, "trim_density": 1.0}}
each_method = pytest.mark.parametrize("name", METHODS)


def call(name, deltas=DELTAS, **params):
    method = resolve_method(name, None, METHODS[name] | params, str)
    return method(deltas, np.ones(2), None, np.zeros(deltas.shape, np.float32)).tolist()


@each_method
def test_a_tie_takes_the_sign_of_the_majority(name):
    assert call(name) == [-2.0, -1.0, -3.0, 1.0]
    assert call(name, -DELTAS) == [2.0, 1.0, 3.0, -1.0]


@each_method
def test_a_tie_is_positive_where_asked(name):
    assert call(name, zero_sign="positive") == [2.0, -1.0, -3.0, 1.0]
    assert call(name, -DELTAS, zero_sign="positive") == [2.0, 1.0, 3.0, -1.0]


@each_method
@pytest.mark.parametrize(("merge", "expected"), [("mean", -2.0), ("sum", -2.0), ("max", -2.0)])
def test_a_tie_keeps_the_agreeing_entry_however_it_is_merged(name, merge, expected):
    assert call(name, merge=merge)[0] == expected


@each_method
@pytest.mark.parametrize(("over", "expected"), [("model", -2.0), ("tensor", 2.0)])
def test_the_majority_is_counted_over_what_is_trimmed(workshop, name, over, expected):
    # In the first tensor plus is the majority, in the whole model minus.
    first, second = torch.tensor([[2.0, 1.0], [-2.0, 1.0]]), torch.tensor([[-1.0] * 5] * 2)
    write_checkpoint(
        workshop.folder / "base", {FIRST: torch.zeros(2), SECOND: torch.zeros(5)}, {"num_hidden_layers": 1}
    )
    for expert, a, b in zip(("a", "b"), first, second, strict=True):
        tensors = {FIRST: a.clone(), SECOND: b.clone()}
        write_checkpoint(workshop.folder / expert, tensors, {"num_hidden_layers": 1})
    average = {"method": name, "trim": over, **METHODS[name]}
    merged = load_file(workshop.merge(assign={"rule": "none"}, average=average) / "model.safetensors")
    assert merged[FIRST].tolist() == [expected, 1.0]


@each_method
def test_entries_equal_to_the_threshold_all_stay(name):
    # k = int(4 · 0.3) + 1 = 2 entries of each row; the second and the third are equal.
    deltas = np.array([[4, -2, 2, 1], [4, -2, 2, 1]], np.float32)
    density = "density" if name == "ties" else "trim_density"
    assert call(name, deltas, **{density: 0.3}) == [4.0, -2.0, 2.0, 0.0]
