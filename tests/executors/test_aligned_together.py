"""Processes that share a merge read their sources in the same order."""

import torch
from conftest import all_files, edit_tensors
from shared_merge import SHARDED, STATIC, merge_together


def shuffle(tensors):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for kind, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        name = f"model.layers.1.mlp.{kind}.weight"
        tensors[name] = tensors[name].index_select(axis, order).contiguous()


def test_the_first_process_finds_the_orders_for_all(workshop):
    edit_tensors(workshop.folder / "a" / "model.safetensors", shuffle)
    expected = all_files(workshop.merge("recipe", align={}, **STATIC, **SHARDED))
    (workshop.folder / "recipe").rename(workshop.folder / "expected")
    assert merge_together(workshop.folder / "recipe.yaml", workshop.folder / "recipe", 3) == [None] * 3
    assert all_files(workshop.folder / "recipe") == expected
    assert "alignment.safetensors" in expected
