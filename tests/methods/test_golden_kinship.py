"""Kinship against golden numbers of its authors' code, through the command."""

import json

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from golden_cases import CASES, INPUTS, NAMES, stored

FORMS = {
    "kinship_full_official": ("--unsigned",),
    "kinship_int8_official": ("--unsigned", "--int8"),
    "kinship_split_official": ("--unsigned", "--split"),
}
"""What the authors' runs were given, in the command's words."""


@pytest.mark.parametrize("case", FORMS)
def test_the_command_gives_the_numbers_of_the_authors_code(workshop, mediator, case):
    models = [f"expert{n}" for n in range(4)]
    for model in ("base", *models):
        tensors = {name: torch.from_numpy(INPUTS[f"{model}.{name}"]) for name in NAMES}
        write_checkpoint(workshop.folder / model, tensors, {"num_hidden_layers": 1, "vocab_size": 50})
    workshop.recipe(experts=[{"name": model, "model": f"./{model}"} for model in models])
    found = json.loads(mediator("kinship", "recipe.yaml", "--json", *FORMS[case]).out)
    expected, tolerance = stored(CASES[case]), CASES[case]["tolerance"]
    assert len(found["pairs"]) == 6
    for pair in found["pairs"]:
        i, j = (int(name[-1]) for name in pair["experts"])
        for ours, theirs in (("pcc", "pcc"), ("cosine", "cs"), ("euclidean", "ed")):
            wanted = float(expected[f"out.{theirs}.{i}.{j}"])
            np.testing.assert_allclose(pair[ours], wanted, rtol=tolerance["rtol"], atol=tolerance["atol"])
