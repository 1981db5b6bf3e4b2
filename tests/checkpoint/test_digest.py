"""Digests of tensors: the same from any slabs in any order, another one for any other byte."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored_tensors import BY_NAME

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.digest import Digests, digest_blocks, digest_file, fold, fold_file
from mediator_cli.checkpoint.header import TensorInfo, read_header
from mediator_cli.checkpoint.read import STORED_DTYPES, FullReader, open_files
from mediator_cli.errors import CheckpointError

SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 77]
NOTHING = "99aa06d3014798d86001c324468d497f"
"""XXH3-128 of no bytes, as xxHash's own test vectors have it."""


def by_hand(data, width):
    """Digest the bytes of a tensor of elements of a width, as the module says."""
    size = 32768 * width
    blocks = [xxhash.xxh3_128(data[at : at + size]).digest() for at in range(0, len(data), size)]
    return xxhash.xxh3_128(b"".join(blocks)).hexdigest()


def draw(size, dtype="U8", seed=0):
    width = STORED_DTYPES[dtype].itemsize
    data = np.random.default_rng(seed).integers(0, 256, size * width, np.uint8)
    return (data & 1 if dtype == "BOOL" else data).view(STORED_DTYPES[dtype])


def info_of(tmp_path, stored, dtype="U8", name="a"):
    return TensorInfo(name, dtype, (len(stored),), tmp_path / "m", 0, stored.nbytes)


def slabs(size, cuts):
    """Cut a tensor into slabs of whole blocks; `cuts` are numbers of blocks."""
    ends = sorted({0, *(cut * BLOCK for cut in cuts if cut * BLOCK < size), size})
    return list(pairwise(ends)) or [(0, 0)]


def note(digests, info, stored, spans):
    for start, stop in spans:
        digests.note(info, start, stored[start:stop])


@given(st.sampled_from(SIZES), st.sampled_from(["U8", "BF16", "F32"]), st.lists(st.integers(1, 5)), st.randoms())
def test_slabs_and_their_order_change_no_digest(tmp_path_factory, size, dtype, cuts, dice):
    stored = draw(size, dtype)
    info, digests = info_of(tmp_path_factory.getbasetemp(), stored, dtype), Digests()
    # Some slabs pass by twice, and some of other cuts come in between.
    spans = slabs(size, cuts) + dice.sample(slabs(size, cuts), 1) + dice.sample(slabs(size, [1, 2]), 1)
    dice.shuffle(spans)
    note(digests, info, stored, spans)
    assert digests.of(info.file) == {"a": by_hand(stored.tobytes(), stored.itemsize)}


@pytest.mark.parametrize("dtype", BY_NAME)
def test_the_digest_is_that_of_the_stored_bytes(tmp_path, dtype):
    stored = draw(2 * BLOCK + 5, dtype)
    save_file({"a": torch.from_numpy(stored).view(BY_NAME[dtype]), "b": torch.ones(3)}, tmp_path / "m")
    tensors = {info.name: info for info in read_header(tmp_path / "m").tensors}
    digests = Digests()
    with open_files([tmp_path / "m"]) as descriptors:
        reader = FullReader(descriptors, tensors, digests)
        for start, stop in slabs(len(stored), [1, 2]):
            assert digests.of(tmp_path / "m") == {}
            reader.read_into("a", start, stop, np.empty(stop - start, np.float32))
    assert digests.of(tmp_path / "m") == {"a": by_hand(stored.tobytes(), stored.itemsize)}


def test_threads_change_no_digest(tmp_path):
    made = {name: draw(9 * BLOCK + 3, seed=seed) for seed, name in enumerate("abcd")}
    infos = {name: info_of(tmp_path, stored, name=name) for name, stored in made.items()}
    jobs = [(name, *span) for name in made for cuts in (range(10), (2, 4)) for span in slabs(9 * BLOCK + 3, cuts)]
    random.Random(0).shuffle(jobs)
    digests = Digests()

    def run(job):
        name, start, stop = job
        digests.note(infos[name], start, made[name][start:stop])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, jobs))
    assert digests.of(tmp_path / "m") == {name: by_hand(stored.tobytes(), 1) for name, stored in made.items()}


@given(st.sampled_from([size for size in SIZES if size]), st.data())
def test_any_flipped_bit_changes_the_digest(tmp_path_factory, size, data):
    stored = draw(size)
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    flipped = stored.copy()
    flipped[place] ^= 1 << bit
    info, found = info_of(tmp_path_factory.getbasetemp(), stored), []
    for version in (stored, flipped):
        digests = Digests()
        digests.note(info, 0, version)
        found.append(digests.of(info.file)["a"])
    assert found[0] != found[1]


def test_blocks_in_another_order_have_another_digest(tmp_path):
    stored = draw(2 * BLOCK)
    turned = np.concatenate([stored[BLOCK:], stored[:BLOCK]])
    assert fold([digest_blocks(stored)]) != fold([digest_blocks(turned)])


def test_an_empty_tensor_has_the_digest_of_nothing(tmp_path):
    digests = Digests()
    digests.note(info_of(tmp_path, draw(0)), 0, draw(0))
    assert digests.of(tmp_path / "m") == {"a": NOTHING}


def test_slabs_that_are_not_whole_blocks_are_passed_over(tmp_path):
    stored = draw(3 * BLOCK + 5)
    info, digests = info_of(tmp_path, stored), Digests()
    odd = [(1, BLOCK), (0, BLOCK - 1), (0, 2 * BLOCK + 1), (BLOCK + 1, len(stored)), (0, len(stored) - 1)]
    note(digests, info, stored, [*odd, (5, len(stored))])
    assert digests.of(info.file) == {}
    # Nor do they stand for blocks that they touch, or change what others said.
    note(digests, info, stored, [(0, BLOCK), (2 * BLOCK, len(stored)), *odd])
    assert digests.of(info.file) == {}
    note(digests, info, stored, [(BLOCK, 2 * BLOCK)])
    assert digests.of(info.file) == {"a": by_hand(stored.tobytes(), 1)}


def test_each_file_has_its_own_tensors(tmp_path):
    stored = draw(10)
    digests = Digests()
    digests.note(info_of(tmp_path, stored), 0, stored)
    digests.note(info_of(tmp_path / "other", stored[:9]), 0, stored[:9])
    digests.add(tmp_path / "m", "b", "00ff")
    assert digests.of(tmp_path / "m") == {"a": by_hand(stored.tobytes(), 1), "b": "00ff"}
    assert digests.of(tmp_path / "other" / "m") == {"a": by_hand(stored[:9].tobytes(), 1)}
    assert digests.of(tmp_path / "none") == {}


def test_a_digest_that_was_taken_before_stays(tmp_path):
    stored = draw(10)
    digests = Digests()
    digests.add(tmp_path / "m", "a", "00ff")
    digests.note(info_of(tmp_path, stored), 0, stored)
    assert digests.of(tmp_path / "m") == {"a": "00ff"}


def test_a_weight_file_has_the_digest_of_its_header_and_tensors():
    header, tensors = b"8 bytes and a header", [by_hand(bytes(9), 1), by_hand(b"x", 1)]
    joined = xxhash.xxh3_128(header).digest() + b"".join(map(bytes.fromhex, tensors))
    assert fold_file(header, tensors) == xxhash.xxh3_128(joined).hexdigest()
    others = [fold_file(header + b" ", tensors), fold_file(header, tensors[::-1]), fold_file(header, tensors[:1])]
    assert len({fold_file(header, tensors), *others}) == 4


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_a_small_file_has_its_sha256(tmp_path, size):
    data, told = draw(size).tobytes(), []
    (tmp_path / "m").write_bytes(data)
    assert digest_file(tmp_path / "m", told.append) == hashlib.sha256(data).hexdigest()
    assert sum(told) == size


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read: no such file"):
        digest_file(tmp_path / "none")
