"""Base + adapter, read slab by slab: values, bits, what is not finite, and what is kept between slabs."""

import json
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.adapter.read import AdapterReader
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.checkpoint.read import FullReader, open_files, read_floats, read_slab
from mediator_cli.checkpoint.source import weight_files


@contextmanager
def open_pair(folder):
    """Open base + adapter."""
    base = read_tensors(folder / "base")
    adapter = open_adapter(folder / "x", base)
    with open_files([*weight_files(base), *weight_files(adapter.tensors)]) as descriptors:
        yield AdapterReader(FullReader(descriptors, base), descriptors, adapter)


def write_large(folder, dtype, rank=4):
    """An adapter on one matrix of several row blocks, and its base."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1200, 700, generator=generator).bfloat16()
    a, b = torch.randn(rank, 700, generator=generator), torch.randn(1200, rank, generator=generator)
    if rank > 4:
        # Terms that cancel out: what is left is the rounding error of their sum, which shows in what order it was made.
        weight, a, b = 0 * weight, torch.cat([a, a]), torch.cat([b, -b], dim=1)
    for name in ("base", "x"):
        (folder / name).mkdir()
    save_file({"m.weight": weight, "n.weight": torch.ones(3)}, folder / "base" / "model.safetensors")
    factors = {"base_model.model.m.lora_A.weight": a.to(dtype), "base_model.model.m.lora_B.weight": b.to(dtype)}
    save_file(factors, folder / "x" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": len(a), "lora_alpha": 1.5 * len(a)}
    (folder / "x" / "adapter_config.json").write_text(json.dumps(config))
    exact = weight.double() + 1.5 * (b.to(dtype).double() @ a.to(dtype).double())
    return exact.flatten()


def read_slabs(folder, cuts):
    with open_pair(folder) as reader:
        untouched = read_floats(reader, "n.weight", 1, 3)
        parts = [read_floats(reader, "m.weight", *cut) for cut in pairwise(cuts)]
    assert untouched.tolist() == [1.0, 1.0]
    return torch.from_numpy(np.concatenate(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_reader_gives_base_plus_scaled_product(tmp_path, dtype):
    exact = write_large(tmp_path, dtype)
    found = read_slabs(tmp_path, [0, 840_000])
    # One rounding of the product and one of the sum, both to float32.
    assert ((found.double() - exact).abs() <= 2**-23 * (exact.abs() + 20)).all()


@pytest.mark.parametrize(
    "cuts",
    [list(range(0, 840_000, 65536)), list(range(0, 840_000, 262144)), [0, 1, 699, 700, 701, 261_800, 262_144, 523_601]],
    ids=["one block", "four blocks", "odd cuts"],
)
@pytest.mark.parametrize("rank", [4, 16, 33])
def test_slabs_change_no_bit_of_an_adapter(tmp_path, cuts, rank):
    write_large(tmp_path, torch.float32, rank)
    whole = read_slabs(tmp_path, [0, 840_000])
    assert whole.count_nonzero() > 300_000
    assert torch.equal(read_slabs(tmp_path, [*cuts, 840_000]).view(torch.int32), whole.view(torch.int32))


@contextmanager
def count_reads(folder, monkeypatch):
    """Open base + adapter; gives the reader, and a list that grows by one name for each read of the adapter."""
    reads = []

    def counted(descriptors, info, start, stop):
        reads.append(info.name.removeprefix("base_model.model."))
        return read_slab(descriptors, info, start, stop)

    monkeypatch.setattr("mediator_cli.checkpoint.adapter.read.read_slab", counted)
    with open_pair(folder) as reader:
        yield reader, reads


def test_a_factor_is_read_once_for_all_slabs(tmp_path, monkeypatch):
    write_large(tmp_path, torch.float32)
    with count_reads(tmp_path, monkeypatch) as (reader, reads):
        for start in range(0, 840_000, 65536):
            read_floats(reader, "m.weight", start, min(start + 65536, 840_000))
    # Of the left factor, only the rows of each slab.
    assert sorted(reads) == ["m.lora_A.weight"] + ["m.lora_B.weight"] * 13


def write_three(folder):
    """An adapter on three matrices [4, 6] of rank 2, and its base of zeros; gives the three products."""
    generator = torch.Generator().manual_seed(5)
    shapes = {f"{name}.lora_{factor}": shape for name in "abc" for factor, shape in (("A", (2, 6)), ("B", (4, 2)))}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("base", "x"):
        (folder / name).mkdir()
    save_file({f"{name}.weight": torch.zeros(4, 6) for name in "abc"}, folder / "base" / "model.safetensors")
    factors = {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(factors, folder / "x" / "adapter_model.safetensors")
    (folder / "x" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return {f"{name}.weight": tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"] for name in "abc"}


@pytest.mark.parametrize(("n_bytes", "n_kept"), [(4 << 20, 3), (96, 2), (95, 1), (0, 1)])
def test_factors_are_kept_within_their_bound(tmp_path, monkeypatch, n_bytes, n_kept):
    monkeypatch.setattr("mediator_cli.checkpoint.adapter.read._KEPT_BYTES", n_bytes)
    products = write_three(tmp_path)
    with count_reads(tmp_path, monkeypatch) as (reader, reads):
        for name in [*products, *reversed(products), *products]:
            found = torch.from_numpy(read_floats(reader, name, 0, 24)).view(4, 6)
            assert torch.allclose(found, products[name], rtol=1e-6, atol=1e-7)
        # What is kept of a, b, c is used on the way back; with two kept the oldest goes first.
        assert sum("lora_A" in name for name in reads) == {3: 3, 2: 5, 1: 7}[n_kept]
        assert len(reader._factors.kept) == n_kept


def write_small(folder, base, **factors):
    """An adapter of rank 1 on a matrix [6, 4], and its base."""
    for name in ("base", "x"):
        (folder / name).mkdir()
    save_file({"m.weight": base}, folder / "base" / "model.safetensors")
    own = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(6, 1)} | factors
    tensors = {f"base_model.model.m.{name}": tensor for name, tensor in own.items()}
    save_file(tensors, folder / "x" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "use_dora": "lora_magnitude_vector" in factors}
    (folder / "x" / "adapter_config.json").write_text(json.dumps(config))


def read_rows(folder):
    """Read the matrix row by row; gives which rows are finite, and whether all are."""
    out = np.empty(24, np.float32)
    with open_pair(folder) as reader:
        rows = [reader.read_into("m.weight", 4 * n, 4 * n + 4, out[4 * n : 4 * n + 4]) for n in range(6)]
        assert rows == np.isfinite(out).reshape(6, 4).all(axis=1).tolist()
        return rows, reader.read_into("m.weight", 0, 24, out)


def row_of(value, shape=(6, 1)):
    """Ones, but for row 2."""
    made = torch.ones(shape)
    made[2] = value
    return made


SPOILT = {
    "base": (row_of(float("inf"), (6, 4)), {}),
    "base, not a number": (row_of(float("nan"), (6, 4)).bfloat16(), {}),
    "factor": (torch.ones(6, 4), {"lora_B.weight": row_of(float("inf"))}),
    "product too large": (torch.ones(6, 4), {"lora_B.weight": row_of(1e30), "lora_A.weight": 1e30 * torch.ones(1, 4)}),
    "sum too large": (row_of(3e38, (6, 4)), {"lora_B.weight": row_of(3e38)}),
    "row without a length": (
        row_of(0, (6, 4)), {"lora_B.weight": row_of(0), "lora_magnitude_vector": torch.ones(6)},
    ),
    "magnitude": (torch.ones(6, 4), {"lora_magnitude_vector": row_of(float("nan"), (6,))}),
}  # fmt: skip


@pytest.mark.parametrize(("base", "factors"), SPOILT.values(), ids=SPOILT)
def test_what_is_not_finite_is_told_of_its_slab_alone(tmp_path, base, factors):
    write_small(tmp_path, base, **factors)
    assert read_rows(tmp_path) == ([True, True, False, True, True, True], False)


HALVES = {
    "base": (row_of(float("inf"), (6, 4)).half(), {}),
    "base, not a number": (row_of(float("nan"), (6, 4)).half(), {}),
    "factor": (torch.ones(6, 4), {"lora_B.weight": row_of(float("-inf")).half()}),
    "magnitude": (torch.ones(6, 4), {"lora_magnitude_vector": row_of(float("inf"), (6,)).half()}),
    "stored whole": (torch.ones(6, 4), {"base_layer.weight": row_of(float("inf"), (6, 4)).half()}),
}


@pytest.mark.parametrize(("base", "factors"), HALVES.values(), ids=HALVES)
def test_infinity_of_float16_is_not_lost(tmp_path, base, factors):
    write_small(tmp_path, base, **factors)
    with open_pair(tmp_path) as reader:
        rows = [reader.read_into("m.weight", 4 * n, 4 * n + 4, np.empty(4, np.float32)) for n in range(6)]
        assert rows == [True, True, False, True, True, True]
        assert not reader.read_into("m.weight", 0, 24, np.empty(24, np.float32))


def test_finite_numbers_are_told_as_such(tmp_path):
    write_small(tmp_path, torch.ones(6, 4), lora_magnitude_vector=torch.ones(6))
    assert read_rows(tmp_path) == ([True] * 6, True)
