"""Digests of tensors, files and sparse experts, against their definition written out."""

import struct

import numpy as np
import pytest
import xxhash
from handmade import CODECS, encoded, make_bundle, random_delta, write_file, write_tensor
from safetensors import safe_open

from mediator_cli.bundle import digest
from mediator_cli.bundle.digest import digest_tensors, file_digest, in_threads, scan_tensors, sparse_digests
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.bundle.sparse_file import open_sparse_file
from mediator_cli.bundle.sparse_writer import create_sparse_file
from mediator_cli.checkpoint.header import DTYPE_BYTES, read_header
from mediator_cli.checkpoint.write import NewTensor
from mediator_cli.errors import BundleError, CheckpointError

BLOCK = 32768
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK + 5]


def fold(parts):
    return xxhash.xxh3_128(b"".join(parts)).hexdigest()


def by_hand(raw, width):
    step = BLOCK * width
    return fold(xxhash.xxh3_128(raw[at : at + step]).digest() for at in range(0, len(raw), step))


@pytest.fixture
def infos(tmp_path):
    """Tensors of all dtypes and of sizes around those of blocks, of random bits, by name; and the bytes of each."""
    tensors = [NewTensor(f"{dtype}.{size}", dtype, (size,)) for dtype in DTYPE_BYTES for size in SIZES]
    tensors.sort(key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    random = np.random.default_rng(0)
    arrays = {tensor.name: random.integers(0, 256, tensor.n_bytes, np.uint8) for tensor in tensors}
    write_file(tmp_path / "m.safetensors", arrays, tensors)
    return {info.name: info for info in read_header(tmp_path / "m.safetensors").tensors}, arrays


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_tensor_is_digested_by_blocks_of_elements(infos, workers, monkeypatch):
    # Runs shorter than tensors, so that several threads share one.
    monkeypatch.setattr(digest, "_RUN", 2 * digest._STEP)
    tensors, arrays = infos
    expected = {name: by_hand(arrays[name].tobytes(), DTYPE_BYTES[info.dtype]) for name, info in tensors.items()}
    assert digest_tensors(tensors, workers) == expected
    found = scan_tensors(list(tensors.values()), workers)
    assert [scan.digest for scan in found] == list(expected.values())


def test_what_was_read_is_told(infos):
    told = []
    digest_tensors(infos[0], 2, told.append)
    assert sum(told) == sum(info.n_bytes for info in infos[0].values())


NOT_FINITE = {
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0xFF81],
    "F16": [0x7C00, 0xFC00, 0x7E00, 0xFC01],
    "F32": [np.inf, -np.inf, np.nan],
    "F64": [np.inf, -np.inf, np.nan],
}


@pytest.mark.parametrize("dtype", NOT_FINITE)
@pytest.mark.parametrize("place", [0, BLOCK, 9 * BLOCK + 4])
def test_a_value_that_is_no_number_is_found_wherever_it_stands(tmp_path, dtype, place):
    bits = {"BF16": "u2", "F16": "u2", "F32": "f4", "F64": "f8"}[dtype]
    largest = {"BF16": 0x7F7F, "F16": 0xFBFF, "F32": 3.4e38, "F64": 1e308}[dtype]
    for value in [largest, *NOT_FINITE[dtype]]:
        array = np.full(SIZES[-1], largest, bits)
        array[place] = value
        file = tmp_path / f"{value}.safetensors"
        write_file(file, {"w": array}, [NewTensor("w", dtype, array.shape)])
        (scan,) = scan_tensors(read_header(file).tensors)
        assert scan.is_finite == (value == largest)
        (scan,) = scan_tensors(read_header(file).tensors, finite=False)
        assert scan.is_finite


def test_a_file_that_ends_early_is_told(tmp_path):
    file = tmp_path / "m.safetensors"
    write_file(file, {"w": np.zeros(100, np.float32)}, [NewTensor("w", "F32", (100,))])
    infos = read_header(file).tensors
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends before its last tensor"):
        scan_tensors(infos)


def test_a_file_is_digested_by_header_and_tensors(infos):
    tensors, arrays = infos
    file = next(iter(tensors.values())).file
    raw = file.read_bytes()
    head = raw[: 8 + int.from_bytes(raw[:8], "little")]
    parts = [bytes.fromhex(by_hand(arrays[name].tobytes(), DTYPE_BYTES[tensors[name].dtype])) for name in tensors]
    assert file_digest(file, digest_tensors(tensors)) == fold([xxhash.xxh3_128(head).digest(), *parts])


@pytest.mark.parametrize("codec", CODECS)
def test_a_sparse_tensor_is_digested_by_its_arrays_and_its_scale(tmp_path, codec):
    file = tmp_path / "a.safetensors"
    with create_sparse_file(file, "a", ["v", "w"]) as writer:
        write_tensor(writer, "v", *encoded(random_delta(400, 0.5, 1), codec, "bitmap", 0.5))
        write_tensor(writer, "w", *encoded(random_delta(90, 0.1, 2), codec, "gaps", 0.25, 3))
        writer.finish()
    with safe_open(file, "np") as arrays:
        names = {"v": ["values", "bitmap"], "w": ["values", "gaps", "override_index"]}
        widths = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "sign": 1}
        raw = {name: file.read_bytes()[info.start : info.end] for name, info in open_sparse_file(file).arrays.items()}
        assert all(arrays.get_tensor(f"w.{kind}").tobytes() == raw[f"w.{kind}"] for kind in names["w"][1:])
    names["w"].append("override_values")
    width = {"values": widths[codec], "gaps": 1, "bitmap": 1, "override_index": 8, "override_values": 2}
    expected = {
        name: fold(
            [bytes.fromhex(by_hand(raw[f"{name}.{kind}"], width[kind])) for kind in kinds]
            + [struct.pack("<d", {"v": 0.5, "w": 0.25}[name])]
        )
        for name, kinds in names.items()
    }
    sparse = open_sparse_file(file)
    assert sparse_digests(sparse) == expected
    assert sparse_digests(sparse, digest_tensors(sparse.arrays, 1)) == expected


def test_another_scale_is_another_digest(tmp_path):
    found = []
    for scale in (0.5, 0.25):
        file = tmp_path / f"{scale}.safetensors"
        with create_sparse_file(file, "a", ["w"]) as writer:
            write_tensor(writer, "w", *encoded(random_delta(90, 0.5, 2), "sign", "gaps", scale))
            writer.finish()
        found.append(sparse_digests(open_sparse_file(file))["w"])
    assert found[0] != found[1]


def test_a_missing_array_is_told(tmp_path):
    bundle = make_bundle(tmp_path / "out")
    file = bundle / read_manifest(bundle).sparse[0].files[0].name
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b'"b.weight.gaps"', b'"b.weight.gapz"'))
    with pytest.raises(BundleError, match=r"b.weight.gaps: array is missing"):
        sparse_digests(open_sparse_file(file))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_keep_the_order_and_end_at_the_first_error(workers):
    assert list(in_threads(lambda n: n * n, range(50), workers)) == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda n: 1 // (n - 3), range(50), workers))
