"""Files of sparse experts: read by an independent decoder, aligned, and refused in order when damaged."""

import contextlib
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mediator_cli import read_bundle
from mediator_cli.bundle.sparse import encode_gaps, encode_values
from mediator_cli.bundle.sparse_file import SparseTensor, open_sparse_file, start_sparse_file
from mediator_cli.checkpoint.header import read_header
from mediator_cli.errors import BundleError, CheckpointError

CODECS = ["fp32", "bf16", "fp16", "int8", "sign"]


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


def write_sparse(file, delta, codec, scale=1.0):
    """Write one tensor's non-zero entries."""
    positions = torch.nonzero(delta).flatten()
    with file.open("wb") as stream:
        writer = start_sparse_file(file, stream, "a", ["w"])
        stored = encode_values(delta[positions], codec, scale)
        writer.append([stored[:3], stored[3:]], "w.values", stored.dtype)
        writer.append([encode_gaps(positions, 0)], "w.gaps", torch.uint8, 255)
        spec = SparseTensor(shape=(len(delta),), n_kept=len(positions), index="gaps", values=codec, scale=scale)
        writer.tensors["w"] = spec
        writer.finish()
    return file


def test_a_file_written_by_hand_reads_back(tmp_path):
    delta = torch.zeros(1000)
    delta[[3, 4, 300, 999]] = torch.tensor([1.0, -2.0, 0.5, 8.0])
    sparse = open_sparse_file(write_sparse(tmp_path / "a.safetensors", delta, "fp32"))
    assert sparse.expert == "a"
    assert torch.equal(sparse.read("w").add_to(torch.zeros(1000)), delta)
    assert torch.equal(sparse.read("w").add_to(torch.ones(1000), 0.5), 1 + 0.5 * delta)


def test_nothing_kept_reads_as_nothing(tmp_path):
    sparse = open_sparse_file(write_sparse(tmp_path / "a.safetensors", torch.zeros(9), "bf16"))
    assert sparse.read("w").positions.tolist() == []
    assert torch.equal(sparse.read("w").add_to(torch.ones(9)), torch.ones(9))


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
    "unknown field": lambda header, spec: spec.update(colour="red"),
    "other version": lambda header, spec: header["__metadata__"].update(version="2"),
    "other format": lambda header, spec: header["__metadata__"].update(format="gguf"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, fault):
    delta = torch.zeros(1000)
    delta[[3, 4, 300, 999]] = torch.tensor([1.0, -2.0, 0.5, 8.0])
    file = rewrite(write_sparse(tmp_path / "a.safetensors", delta, "fp32"), tmp_path, fault)
    with pytest.raises((BundleError, CheckpointError)):
        open_sparse_file(file).read("w")


@pytest.mark.parametrize(
    "text", ["[]", "1", "{", '{"w": 3}', "[" * 100_000], ids=["list", "number", "cut", "w", "deep"]
)
def test_metadata_that_is_no_specification_is_refused(tmp_path, text):
    file = write_sparse(tmp_path / "a.safetensors", torch.ones(9), "fp32")
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


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The bytes of a small valid file."""
    delta = torch.randn(40, generator=torch.Generator().manual_seed(0))
    return write_sparse(tmp_path_factory.mktemp("intact") / "a.safetensors", delta, "int8", 0.1).read_bytes()


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_bytes_never_give_another_error(intact, tmp_path, data):
    raw = bytearray(intact)
    used = len(intact) if data.draw(st.booleans()) else 420
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, used - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, len(raw) // 2, 10, 0]))])
    with contextlib.suppress(BundleError, CheckpointError):
        sparse = open_sparse_file(file)
        for name in sparse.tensors:
            sparse.read(name)
