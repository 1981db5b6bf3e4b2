"""Sparse files and whole bundles written by hand, without a merge: small, and of every kind of array."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from mediator_cli.bundle.conflict_report import ConflictReport
from mediator_cli.bundle.digest import digest_tensors, file_digest, sparse_digests
from mediator_cli.bundle.manifest import (
    CONFLICTS,
    MANIFEST,
    ROUTER,
    ConflictRecord,
    Manifest,
    RecipeRecord,
    Sizes,
    SourceRecord,
    SparseRecord,
    SparseUnitRecord,
    TensorRecord,
    bundle_digest,
    to_json,
)
from mediator_cli.bundle.record import FileRecord, WeightFile
from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord, RouterReport
from mediator_cli.bundle.sparse import encode_gaps, encode_values, pack_bits
from mediator_cli.bundle.sparse_file import SparseTensor, open_sparse_file, sparse_file_name
from mediator_cli.bundle.sparse_writer import SparseFileWriter, create_sparse_file
from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.write import NewTensor, create_file, index_json, write_at

CODECS = ["fp32", "bf16", "fp16", "int8", "sign"]


def encoded(delta, codec, index, scale=1.0, overrides=0, bits="u2"):
    """Encode the non-zero entries of a flat tensor; give its specification and its arrays by kind."""
    kept = delta != 0
    positions = np.flatnonzero(kept)
    values = encode_values(delta[positions], codec, scale)
    arrays = {
        "values": pack_bits(values) if codec == "sign" else values,
        index: encode_gaps(positions, 0) if index == "gaps" else pack_bits(kept),
    }
    if overrides:
        arrays["override_index"] = np.arange(overrides, dtype=np.int64)
        arrays["override_values"] = np.arange(overrides, dtype=bits)
    spec = SparseTensor(
        shape=delta.shape, n_kept=len(positions), index=index, values=codec, scale=scale, n_overrides=overrides
    )
    return spec, arrays


def write_tensor(writer: SparseFileWriter, name, spec, arrays, dtype="BF16"):
    """Place one tensor and write its arrays."""
    for kind, offset in writer.place(name, spec, dtype, arrays[spec.index].nbytes).items():
        writer.write(offset, arrays[kind])


def write_sparse(file: Path, delta, codec, scale=1.0, index="gaps", overrides=0) -> Path:
    """Write a sparse file with one tensor `w`: the non-zero entries of a flat one."""
    with create_sparse_file(file, "a", ["w"]) as writer:
        write_tensor(writer, "w", *encoded(delta, codec, index, scale, overrides))
        writer.finish()
    return file


def spread(size: int, *entries: tuple[int, float]) -> np.ndarray:
    """Make a flat float32 tensor of zeros but for some entries."""
    delta = np.zeros(size, np.float32)
    for at, value in entries:
        delta[at] = value
    return delta


def random_delta(size: int, density: float, seed: int) -> np.ndarray:
    """Draw a flat float32 tensor of which a share is not zero."""
    random = np.random.default_rng(seed)
    return np.where(random.random(size) < density, random.normal(size=size), 0).astype(np.float32)


SHARDS = [
    [NewTensor("a.weight", "BF16", (20, 30)), NewTensor("b.weight", "F32", (50,))],
    [NewTensor("c.weight", "F16", (7, 11)), NewTensor("d.weight", "BF16", ()), NewTensor("n", "I64", (3,))],
]
ROUTED = [["a.weight", "b.weight"], ["c.weight"]]
EXPERTS = {"x": "int8", "y": "sign", "z": "fp16"}
BITS = {"BF16": "u2", "F16": "u2", "F32": "f4", "I64": "i8"}


def stored(tensor: NewTensor, random: np.random.Generator) -> np.ndarray:
    """Draw the stored elements of a tensor, all finite."""
    size = tensor.n_bytes // np.dtype(BITS[tensor.dtype]).itemsize
    if tensor.dtype == "F32":
        return random.normal(size=size).astype(np.float32)
    return random.integers(0, 0x3C00, size).astype(BITS[tensor.dtype])


def write_file(file: Path, arrays: dict[str, np.ndarray], tensors: list[NewTensor]) -> None:
    """Write a safetensors file."""
    infos = create_file(file, tensors, {"format": "pt"})
    with file.open("r+b") as stream:
        for name, array in arrays.items():
            write_at(stream.fileno(), file, array.view(np.uint8).data, infos[name].start)


def make_bundle(folder: Path) -> Path:
    """Write a bundle of two shards, three experts with two files each, a router and a conflict report."""
    random = np.random.default_rng(0)
    (folder / "experts").mkdir(parents=True)
    shards = {f"model-{n:05d}-of-00002.safetensors": tensors for n, tensors in enumerate(SHARDS, 1)}
    for name, tensors in shards.items():
        write_file(folder / name, {tensor.name: stored(tensor, random) for tensor in tensors}, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(shards)))
    for n, expert in enumerate(EXPERTS):
        for number, names in enumerate(ROUTED, 1):
            _write_expert(folder / sparse_file_name(expert, number, 2), expert, names, n)
    means = NewTensor("classifier.mean", "F32", (40,))
    write_file(folder / ROUTER, {means.name: stored(means, random)}, [means])
    (folder / "config.json").write_text('{"model_type": "none"}\n')
    (folder / "README.md").write_text("# Made by hand\n")
    (folder / CONFLICTS).write_text(to_json(_report()))
    (folder / MANIFEST).write_text(to_json(describe(folder)))
    return folder


def _write_expert(file: Path, expert: str, names: list[str], seed: int) -> None:
    tensors = {tensor.name: tensor for shard in SHARDS for tensor in shard}
    with create_sparse_file(file, expert, names) as writer:
        for name in names:
            delta = random_delta(int(np.prod(tensors[name].shape)), 0.3, seed)
            overrides = 3 if expert == "z" else 0
            bits = BITS[tensors[name].dtype]
            index = "bitmap" if name == "a.weight" else "gaps"
            spec, arrays = encoded(delta, EXPERTS[expert], index, 0.01, overrides, bits)
            spec = spec.model_copy(update={"shape": tensors[name].shape})
            write_tensor(writer, name, spec, arrays, tensors[name].dtype)
        writer.finish()


def describe(folder: Path) -> Manifest:
    """Write the manifest of such a bundle as its files are now."""
    shards, tensors = [], {}
    for file in sorted(folder.glob("model*.safetensors")):
        infos = {info.name: info for info in read_header(file).tensors}
        digests = digest_tensors(infos)
        shards.append(_weight_file(folder, file, digests))
        tensors |= {
            name: TensorRecord(file=file.name, dtype=info.dtype, shape=info.shape, xxh3=digests[name])
            for name, info in infos.items()
        }
    experts = tuple(_sparse_record(folder, expert) for expert in EXPERTS)
    others = ["README.md", CONFLICTS, "config.json", "model.safetensors.index.json"]
    digest = bundle_digest({k: v.xxh3 for k, v in tensors.items()}, {e.expert: e.tensors for e in experts})
    source = SourceRecord(name="base", kind="full", path="base", weight=None, license=None, files=())
    return Manifest(
        schema_version=2,
        generator="by hand",
        recipe=RecipeRecord(name="r.yaml", text='"checksum": ""\n', sha256="", changes=()),
        base=source,
        experts=tuple(source.model_copy(update={"name": name, "weight": 1.0}) for name in EXPERTS),
        tokenizer="base",
        seed=0,
        methods=(),
        conflict=ConflictRecord(measure="sign", unit="layer", denoise="", scores={}),
        assignment={},
        extract=None,
        sparse=experts,
        shards=tuple(shards),
        tensors=tensors,
        router=_router(folder),
        files=tuple(_record(folder, name) for name in others),
        sizes=Sizes(dense=0, sparse=0, full_models=0),
        digest=digest,
        notices=(),
    )


def _weight_file(folder: Path, file: Path, arrays: dict[str, str]) -> WeightFile:
    name = file.relative_to(folder).as_posix()
    return WeightFile(name=name, bytes=file.stat().st_size, xxh3=file_digest(file, arrays))


def _sparse_record(folder: Path, expert: str) -> SparseRecord:
    files, tensors = [], {}
    for file in sorted((folder / "experts").glob(f"{expert}-*.safetensors")):
        sparse = open_sparse_file(file)
        arrays = digest_tensors(sparse.arrays)
        files.append(_weight_file(folder, file, arrays))
        tensors |= sparse_digests(sparse, arrays)
    units = {"all": SparseUnitRecord(n_kept=1, n_entries=2, energy=1.0)}
    return SparseRecord(expert=expert, files=tuple(files), tensors=tensors, units=units)


def _record(folder: Path, name: str) -> FileRecord:
    data = (folder / name).read_bytes()
    return FileRecord(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _router(folder: Path) -> RouterRecord:
    report = RouterReport(
        n_fitted=1, n_held_out=1, accuracy=1.0, log_loss=0.0, calibration_error=0.0, confusion=((1, 0), (0, 1))
    )
    return RouterRecord(
        features="text",
        classifier="logistic",
        experts=tuple(EXPERTS),
        size=40,
        temperature=1.0,
        outside_above=1.0,
        policy=PolicyRecord(),
        report=report,
        file=_record(folder, ROUTER),
    )


def _report() -> ConflictReport:
    return ConflictReport(
        schema_version=2, experts=tuple(EXPERTS), sources={}, denoise="", unit="layer", units={}, tensors={}
    )
