"""Low-rank experts on disk: what is written is read again, whatever is broken is told."""

from pathlib import Path

import numpy as np
import peft_adapters
import pytest
import torch
from conftest import edit_tensors

from mediator_cli.bundle.deltas import mix_deltas, open_sparse_expert
from mediator_cli.bundle.entries import check_entries
from mediator_cli.bundle.factors import FactorDelta, as_delta, write_factors
from mediator_cli.bundle.sparse_file import FACTORS_VERSION, open_sparse_file
from mediator_cli.checkpoint.adapter.factors import read_factors
from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.header import read_header, read_tensors
from mediator_cli.errors import BundleError, CheckpointError
from mediator_cli.kernels.factors import Factors

# PEFT asks transformers under an old name, and speaks of layers that it was told about.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")


def factors(rank: int, shape: tuple[int, int], seed: int, scaling: float = 1.0) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(
        rng.standard_normal((rank, shape[1]), np.float32), rng.standard_normal((shape[0], rank), np.float32), scaling
    )


def halved(own: Factors) -> Factors:
    """Round to what bfloat16 holds."""
    a, b = (torch.from_numpy(x).bfloat16().float().numpy() for x in (own.a, own.b))
    return Factors(a, b, own.scaling)


def test_what_is_written_is_read_again_bit_for_bit(tmp_path: Path) -> None:
    written = {"x": factors(3, (5, 7), 0, 0.3), "y": halved(factors(2, (4, 6), 1)), "z": factors(0, (2, 3), 2)}
    write_factors(tmp_path / "e.safetensors", "e", written)
    opened = open_sparse_file(tmp_path / "e.safetensors")
    assert read_header(opened.file).metadata["version"] == FACTORS_VERSION
    for name, own in written.items():
        found = opened.factors(name)
        assert np.array_equal(found.a, own.a)
        assert np.array_equal(found.b, own.b)
        assert found.scaling == own.scaling
        check_entries(opened, name)
    # What bfloat16 holds exactly takes half the bytes.
    assert {info.name: info.dtype for info in opened.arrays.values()}["y.a"] == "BF16"


def test_a_low_rank_delta_is_what_its_product_adds(tmp_path: Path) -> None:
    own = factors(3, (5, 7), 0, 0.5)
    write_factors(tmp_path / "e.safetensors", "e", {"x": own})
    delta = open_sparse_expert("e", [tmp_path / "e.safetensors"]).read("x")
    expected = 0.5 * torch.from_numpy(own.b) @ torch.from_numpy(own.a)
    torch.testing.assert_close(delta.flat().view(5, 7), expected)
    dense = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(delta.add_to(dense, 2.0), dense + 2 * expected)
    torch.testing.assert_close(mix_deltas(dense, [(delta, 0.25), (delta, 0.5)]), dense + 0.75 * expected)
    assert delta.add_to(dense.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("field", ["rank", "shape", "index"])
def test_a_specification_that_does_not_fit_its_arrays_is_told(tmp_path: Path, field: str) -> None:
    file = tmp_path / "e.safetensors"
    write_factors(file, "e", {"x": factors(3, (5, 7), 0)})
    changed = {"rank": ('"rank":3', '"rank":9'), "shape": ('"shape":[5,7]', '"shape":[9,9]')}
    old, new = changed.get(field, ('"index":"all"', '"index":"gap"'))
    file.write_bytes(file.read_bytes().replace(old.replace('"', '\\"').encode(), new.replace('"', '\\"').encode()))
    with pytest.raises(BundleError, match=r"array of|broken metadata"):
        open_sparse_file(file).factors("x")


CONFIGS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True, "lora_alpha": 5},
    "ranks": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 7}},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_factors_are_what_peft_adds(tmp_path: Path, kind: str) -> None:
    model = peft_adapters.write(tmp_path, peft_adapters.llama, **CONFIGS[kind])
    base = read_tensors(tmp_path / "base")
    found = read_factors(open_adapter(tmp_path / "adapter", base))
    merged = peft_adapters.merge(tmp_path, model)
    stored = model.from_pretrained(tmp_path / "base").state_dict()
    for name, own in found.items():
        torch.testing.assert_close(as_delta(own).add_to(stored[name]), merged[name], atol=1e-5, rtol=1e-5)
    unchanged = [name for name in base if name not in found]
    assert all(torch.equal(stored[name], merged[name]) for name in unchanged)


def test_factors_of_a_matrix_that_lies_the_other_way_round(tmp_path: Path) -> None:
    model = peft_adapters.write(tmp_path, peft_adapters.gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    found = read_factors(open_adapter(tmp_path / "adapter", read_tensors(tmp_path / "base")))
    merged, stored = peft_adapters.merge(tmp_path, model), model.from_pretrained(tmp_path / "base").state_dict()
    for name, own in found.items():
        key = name if name in stored else f"transformer.{name}"
        expected = merged.get(name, merged.get(key))
        torch.testing.assert_close(as_delta(own).add_to(stored[key]), expected, atol=1e-5, rtol=1e-5)


REFUSED = {
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["q_proj"], "lora_bias": True},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_two_factors_do_not_hold_is_refused_by_name(tmp_path: Path, what: str) -> None:
    peft_adapters.write(tmp_path, lambda: peft_adapters.llama(tie_word_embeddings=False), **REFUSED[what])
    with pytest.raises(CheckpointError, match=what):
        read_factors(open_adapter(tmp_path / "adapter", read_tensors(tmp_path / "base")))


def test_a_factor_with_nan_is_named(tmp_path: Path) -> None:
    peft_adapters.write(tmp_path, peft_adapters.llama, target_modules=["q_proj"])

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)][0, 0] = float("nan")

    edit_tensors(tmp_path / "adapter/adapter_model.safetensors", spoil)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.*\n?.*NaN"):
        read_factors(open_adapter(tmp_path / "adapter", read_tensors(tmp_path / "base")))


def test_as_delta_multiplies_the_scaling_in() -> None:
    delta = as_delta(Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 0.5))
    assert isinstance(delta, FactorDelta)
    assert delta.flat().tolist() == [0.5] * 6
