"""Files of experts that are not stored sparsely: whatever is changed is found, and what cannot be is refused."""

import contextlib
from random import Random

import numpy as np
import pytest
import torch

from mediator_cli.bundle.deltas import open_sparse_expert
from mediator_cli.bundle.entries import check_entries, check_shares
from mediator_cli.bundle.gated import Gate, gated_delta, unpack
from mediator_cli.bundle.sparse_file import SHARED, SparseTensor, open_sparse_file
from mediator_cli.bundle.sparse_writer import create_sparse_file
from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.errors import BundleError, CheckpointError
from mediator_cli.runtime.gated import stack_gates

CPU = torch.device("cpu")

EMR = {"mode": "emr", "dense": "base"}


def write(folder, expert, **fields):
    """Write a file of one tensor T of 6 entries, every array but the padding filled with ones."""
    file = folder / f"{expert or 'shared'}.safetensors"
    spec = SparseTensor(**{"shape": (2, 3), "n_kept": 6, "index": "all", "values": "shared", **fields})
    with create_sparse_file(file, expert, ["T"]) as writer:
        places = writer.place("T", spec, "F32", 1 if spec.index in ("bitmap", "gaps") else 0)
        own = {"coefficients": np.ones(spec.n_shared), "bitmap": np.array([0b111111], np.uint8)}
        own |= {"gaps": np.zeros(8, np.uint8), "values": np.ones(spec.n_kept, np.float32)}
        if spec.values == "sign":
            own["values"] = np.array([0b101], np.uint8)
        for kind, at in places.items():
            writer.write(at, own[kind])
        writer.finish()
    return file


def opened(folder, **fields):
    """Open an expert with one tensor, and the two arrays that it shares."""
    shared = write(folder, SHARED, shape=(2, 2, 3), n_kept=12, values="fp32")
    own = write(folder, "a", **{"n_shared": 2, **fields})
    return open_sparse_expert("a", [own], open_sparse_expert(SHARED, [shared]))


def test_an_expert_is_what_its_coefficients_make_of_shared_arrays(tmp_path):
    expert = opened(tmp_path)
    assert expert.read("T").flat().tolist() == [2.0] * 6
    check_entries(expert.files[0], "T")
    check_shares(expert.files[0], "T", expert.shared.tensors)
    check_entries(expert.shared.files[0], "T")
    check_shares(expert.shared.files[0], "T", {})


def test_signs_need_nothing_shared(tmp_path):
    expert = open_sparse_expert("a", [write(tmp_path, "a", values="sign", scale=0.5)])
    assert expert.read("T").flat().tolist() == [0.5, -0.5, 0.5, -0.5, -0.5, -0.5]
    check_entries(expert.files[0], "T")
    check_shares(expert.files[0], "T", {})


def test_a_gate_lets_through_what_its_bits_say():
    bits = torch.tensor([0b10, 0b1], dtype=torch.uint8)
    assert torch.nonzero(unpack(bits, 10)).flatten().tolist() == [1, 8]
    gate = Gate(10, bits, torch.tensor([2.0]), signed=False)
    shared = torch.arange(10.0)[None]
    assert gated_delta(gate, shared, (10,)).flat().tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 16, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"index": "gaps"}, "no bitmap"),
        ({"values": "fp32"}, "a way that does not exist"),
        ({"n_shared": 0}, "does not exist"),
        ({"n_shared": 3}, "its shared arrays are"),
        ({"shape": (3, 2), "n_shared": 2}, "its shared arrays are"),
        ({"index": "bitmap", "n_kept": 5, "n_shared": 2}, "6 positions, not 5"),
        ({"values": "sign", "scale": 1e39}, "NaN or infinite"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, fields, message):
    file = open_sparse_file(write(tmp_path, "a", **{"n_shared": 1, **fields}))
    shared = {"T": SparseTensor(shape=(2, 2, 3), n_kept=12, index="all", values="fp32")}
    told = ""
    for check in (check_entries, lambda *place: check_shares(*place, shared)):
        try:
            check(file, "T")
        except BundleError as error:
            told += str(error)
    assert message in told


@pytest.mark.parametrize("fields", [{"index": "gaps"}, {"values": "fp32"}, {"n_shared": 0}, {"n_shared": 1}])
def test_readers_refuse_it_too(tmp_path, fields):
    expert = opened(tmp_path, **fields)
    with pytest.raises(BundleError):
        expert.read("T")


def test_shared_arrays_that_are_missing_are_told(tmp_path):
    expert = open_sparse_expert("a", [write(tmp_path, "a", n_shared=1)])
    with pytest.raises(BundleError, match="its shared arrays are missing"):
        expert.read("T")
    with pytest.raises(BundleError, match="its shared arrays are missing"):
        check_shares(expert.files[0], "T", {})


@pytest.mark.slow
def test_any_flipped_bit_is_found(workshop):
    folder = workshop.merge("out", assign={"rule": "all"}, extract=EMR)
    for name in ("shared.safetensors", "experts/a.safetensors"):
        file, random = folder / name, Random(name)
        raw = file.read_bytes()
        for _ in range(40):
            at = random.randrange(len(raw))
            file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :])
            assert verify_bundle(folder).problems, at
        file.write_bytes(raw)
    assert verify_bundle(folder).problems == ()


def test_a_missing_file_of_shared_arrays_is_told(workshop):
    folder = workshop.merge("out", assign={"rule": "all"}, extract=EMR)
    (folder / "shared.safetensors").unlink()
    told = [problem.message for problem in verify_bundle(folder).problems]
    assert "is missing" in told
    assert "its shared arrays are missing" in told


def read_all(folder):
    """Do all that anyone does with the files of one expert and of what it shares."""
    with contextlib.suppress(BundleError, CheckpointError):
        shared = open_sparse_expert(SHARED, [folder / "shared.safetensors"])
        expert = open_sparse_expert("a", [folder / "a.safetensors"], shared)
        for name in (name for name, spec in expert.tensors.items() if spec.shape == (2, 3)):
            for function in (
                lambda name=name: check_entries(expert.files[0], name),
                lambda name=name: check_shares(expert.files[0], name, shared.tensors),
                lambda name=name: stack_gates([expert.gate(name)], expert.shared_arrays(name), (2, 3), CPU),
                lambda name=name: expert.read(name).flat(),
            ):
                with contextlib.suppress(BundleError, CheckpointError):
                    function()


@pytest.mark.parametrize("fields", [{"index": "bitmap"}, {}, {"values": "sign"}])
def test_damaged_bytes_never_give_another_error(tmp_path, fields):
    opened(tmp_path, **fields)
    random = Random(0)
    for name in ("a.safetensors", "shared.safetensors"):
        raw = (tmp_path / name).read_bytes()
        for _ in range(200):
            changed = bytearray(raw)
            for _ in range(random.choice([1, 1, 3])):
                # The header's text, where most of what a reader believes stands.
                changed[random.randrange(8, min(len(raw), 700))] = random.choice(b'019{}[]",:ax')
            (tmp_path / name).write_bytes(bytes(changed))
            read_all(tmp_path)
        (tmp_path / name).write_bytes(raw)
