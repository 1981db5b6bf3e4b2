"""Files of sparse experts: read by an independent decoder, aligned, and refused in order when damaged."""

import json

import numpy as np
import pytest
import torch
from handmade import CODECS, random_delta, spread, write_sparse
from safetensors import safe_open
from safetensors.torch import save_file

from mediator_cli import read_bundle
from mediator_cli.bundle import entries
from mediator_cli.bundle.deltas import open_sparse_expert, read_delta
from mediator_cli.bundle.entries import check_entries
from mediator_cli.bundle.sparse_file import open_sparse_file, sparse_file_name
from mediator_cli.checkpoint.header import read_header
from mediator_cli.errors import BundleError, CheckpointError


def decode(file):
    """Read a sparse expert as bundle/README.md says, without any of our code: name -> (positions, values)."""
    found = {}
    with safe_open(file, "pt") as arrays:
        for name, spec in json.loads(arrays.metadata()["tensors"]).items():
            n, size = spec["n_kept"], int(np.prod(spec["shape"]))
            if spec["index"] == "gaps":
                at, positions = -1, []
                for code in arrays.get_tensor(f"{name}.gaps").tolist():
                    at += code if code == 255 else code + 1
                    positions += [] if code == 255 else [at]
            else:
                bits = np.unpackbits(arrays.get_tensor(f"{name}.bitmap").numpy(), bitorder="little")[:size]
                positions = np.flatnonzero(bits).tolist()
            values = arrays.get_tensor(f"{name}.values")
            if spec["values"] == "sign":
                bits = np.unpackbits(values.numpy(), bitorder="little")[:n]
                values = (bits.astype(np.float64) * 2 - 1) * spec["scale"]
            else:
                values = values[:n].double().numpy() * spec.get("scale", 1.0)
            found[name] = (positions, values.astype(np.float32).tolist())
    return found


@pytest.mark.parametrize("density", [0.03, 0.6, 1.0])
@pytest.mark.parametrize("values", CODECS)
def test_an_independent_decoder_reads_the_same(workshop, values, density):
    out = workshop.merge(assign={"rule": "all"}, extract={"density": density, "values": values})
    for expert in ("a", "b"):
        decoded = decode(out / "experts" / f"{expert}.safetensors")
        sparse = read_bundle(out).experts[expert]
        assert set(decoded) == set(sparse.tensors) == set(workshop.base)
        for name, (positions, numbers) in decoded.items():
            delta = sparse.read(name)
            assert delta.positions.tolist() == positions
            assert delta.values.tolist() == numbers


@pytest.mark.parametrize("density", [0.03, 0.6, 1.0])
@pytest.mark.parametrize("values", CODECS)
def test_every_array_is_aligned(workshop, values, density):
    out = workshop.merge(assign={"rule": "all"}, extract={"density": density, "values": values})
    for file in (out / "experts").iterdir():
        infos = read_header(file).tensors
        assert infos
        assert all(info.start % 8 == 0 for info in infos)
        assert file.stat().st_size % 8 == 0


def test_overrides_are_stored_as_positions_and_exact_values(workshop):
    out = workshop.merge(
        assign={"rule": "all"}, extract={"density": 1.0, "values": "bf16"}, output={"dtype": "float32"}
    )
    name = "model.embed_tokens.weight"
    with safe_open(out / "experts" / "a.safetensors", "pt") as arrays:
        spec = json.loads(arrays.metadata()["tensors"])[name]
        n = spec["n_overrides"]
        where = arrays.get_tensor(f"{name}.override_index")[:n]
        exact = arrays.get_tensor(f"{name}.override_values")[:n]
    assert n > 0
    assert torch.equal(exact, workshop.experts["a"][name].float().flatten()[where])


SMALL = spread(1000, (3, 1.0), (4, -2.0), (300, 0.5), (999, 8.0))


def test_a_file_written_by_hand_reads_back(tmp_path):
    sparse = open_sparse_file(write_sparse(tmp_path / "a.safetensors", SMALL, "fp32"))
    assert sparse.expert == "a"
    delta, expected = read_delta(sparse, "w"), torch.from_numpy(SMALL)
    assert torch.equal(delta.add_to(torch.zeros(1000)), expected)
    assert torch.equal(delta.add_to(torch.ones(1000), 0.5), 1 + 0.5 * expected)


@pytest.mark.parametrize("index", ["gaps", "bitmap"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_each_code_is_read_by_an_independent_decoder_as_by_ours(tmp_path, density, codec, index):
    scale = 0.03 if codec in ("int8", "sign") else 1.0
    file = write_sparse(tmp_path / "a.safetensors", random_delta(3001, density, 1), codec, scale, index)
    positions, numbers = decode(file)["w"]
    delta, plain = read_delta(open_sparse_file(file), "w"), open_sparse_file(file).decode("w")
    assert delta.positions.tolist() == plain.positions.tolist() == positions
    assert delta.values.tolist() == plain.values.tolist() == numbers
    assert (plain.positions.dtype, plain.values.dtype) == (np.int64, np.float32)
    assert delta.override_values is None


def test_overrides_are_read_with_their_bits(tmp_path):
    plain = open_sparse_file(write_sparse(tmp_path / "a.safetensors", SMALL, "fp32", overrides=3)).decode("w")
    assert plain.override_positions.tolist() == plain.override_values.tolist() == [0, 1, 2]
    assert plain.override_dtype == "BF16"
    delta = read_delta(open_sparse_file(tmp_path / "a.safetensors"), "w")
    assert delta.override_values.dtype == torch.bfloat16
    assert delta.override_values.view(torch.uint16).tolist() == [0, 1, 2]


def test_nothing_kept_reads_as_nothing(tmp_path):
    sparse = open_sparse_file(write_sparse(tmp_path / "a.safetensors", spread(9), "bf16"))
    assert read_delta(sparse, "w").positions.tolist() == []
    assert torch.equal(read_delta(sparse, "w").add_to(torch.ones(9)), torch.ones(9))


def test_an_expert_is_read_from_all_its_files(tmp_path):
    (tmp_path / "experts").mkdir()
    files = [tmp_path / sparse_file_name("a", number, 2) for number in (1, 2)]
    write_sparse(files[0], SMALL, "fp32")
    raw = write_sparse(files[1], 2 * SMALL, "fp32").read_bytes()
    with pytest.raises(BundleError, match="w stands in another file too"):
        open_sparse_expert("a", files)
    files[1].write_bytes(raw.replace(b'"w.', b'"v.').replace(b'{\\"w\\"', b'{\\"v\\"'))
    expert = open_sparse_expert("a", files)
    assert list(expert.tensors) == ["w", "v"]
    assert [expert.file_of(name).file for name in "wv"] == files
    assert torch.equal(expert.read("v").add_to(torch.zeros(1000)), 2 * torch.from_numpy(SMALL))
    with pytest.raises(BundleError, match="is of expert 'a', not 'b'"):
        open_sparse_expert("b", files)


def rewrite(file, tmp_path, change):
    """Copy a sparse file with a change in the metadata of its tensor."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    specs = json.loads(header["__metadata__"]["tensors"])
    change(header, specs["w"])
    header["__metadata__"]["tensors"] = json.dumps(specs)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    other = tmp_path / "other.safetensors"
    other.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return other


FAULTS = {
    "count too small": lambda header, spec: spec.update(n_kept=3),
    "count too large": lambda header, spec: spec.update(n_kept=100),
    "negative count": lambda header, spec: spec.update(n_kept=-1),
    "tensor too small": lambda header, spec: spec.update(shape=[10]),
    "huge bitmap": lambda header, spec: (
        spec.update(shape=[2**62, 2**62], index="bitmap"),
        header.update({"w.bitmap": header.pop("w.gaps")}),
    ),
    "index of signed bytes": lambda header, spec: header["w.gaps"].update(dtype="I8"),
    "no specification": lambda header, spec: spec.clear(),
    "negative shape": lambda header, spec: spec.update(shape=[-4]),
    "bitmap missing": lambda header, spec: spec.update(index="bitmap"),
    "overrides missing": lambda header, spec: spec.update(n_overrides=2),
    "negative overrides": lambda header, spec: spec.update(n_overrides=-2),
    "other values": lambda header, spec: spec.update(values="sign"),
    "int8 of floats": lambda header, spec: spec.update(values="int8"),
    "scale not finite": lambda header, spec: spec.update(scale=float("nan")),
    "scale too large for a double": lambda header, spec: spec.update(scale=10**400),
    "too many sides": lambda header, spec: spec.update(shape=[1] * 99 + [1000]),
    "unknown field": lambda header, spec: spec.update(colour="red"),
    "other version": lambda header, spec: header["__metadata__"].update(version="2"),
    "other format": lambda header, spec: header["__metadata__"].update(format="gguf"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, fault):
    file = rewrite(write_sparse(tmp_path / "a.safetensors", SMALL, "fp32"), tmp_path, fault)
    with pytest.raises((BundleError, CheckpointError)):
        open_sparse_file(file).decode("w")
    with pytest.raises((BundleError, CheckpointError)):
        check_entries(open_sparse_file(file), "w")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("index", ["gaps", "bitmap"])
def test_an_intact_tensor_passes_the_check(tmp_path, codec, index, monkeypatch):
    monkeypatch.setattr(entries, "_STEP", 16)
    for density in (0.0, 0.004, 0.3, 1.0):
        file = tmp_path / f"{density}.safetensors"
        write_sparse(file, random_delta(4001, density, 2), codec, index=index, overrides=40)
        check_entries(open_sparse_file(file), "w")


@pytest.mark.parametrize(("codec", "scale"), [("int8", 1e38), ("sign", -1e39)])
def test_a_scale_too_large_for_float32_does_not_pass_the_check(tmp_path, codec, scale):
    sparse = open_sparse_file(write_sparse(tmp_path / "a.safetensors", SMALL, codec, scale))
    with pytest.raises(BundleError, match="holds NaN or infinite values"):
        check_entries(sparse, "w")


@pytest.mark.parametrize(
    "text", ["[]", "1", "{", '{"w": 3}', "[" * 100_000], ids=["list", "number", "cut", "w", "deep"]
)
def test_metadata_that_is_no_specification_is_refused(tmp_path, text):
    file = write_sparse(tmp_path / "a.safetensors", spread(9), "fp32")
    with safe_open(file, "pt") as arrays:
        metadata, tensors = arrays.metadata(), {name: arrays.get_tensor(name) for name in arrays.keys()}  # noqa: SIM118
    save_file(tensors, file, {**metadata, "tensors": text})
    with pytest.raises(BundleError, match="broken metadata"):
        open_sparse_file(file)


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.5, "b": 0.5}])
def test_a_sparse_tensor_that_does_not_fit_the_dense_one_is_refused(workshop, weights):
    out = workshop.merge(assign={"rule": "all"}, extract={"density": 0.5})
    file = out / "experts" / "a.safetensors"
    raw = file.read_bytes()
    assert raw.count(b"[20,8]") == 1
    file.write_bytes(raw.replace(b"[20,8]", b"[20,9]"))
    bundle = read_bundle(out)
    with pytest.raises(BundleError, match=r"shape \[20, 9\], the dense tensor has \[20, 8\]"):
        bundle.mixture(weights, "model.embed_tokens.weight")
