"""The writer of sparse files: places before bytes, any order, any thread, and taken up after a crash."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
from handmade import CODECS, encoded, random_delta, write_tensor
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.bundle.sparse_file import SparseTensor, open_sparse_file, reserve_bytes
from mediator_cli.bundle.sparse_writer import create_sparse_file, resume_sparse_file
from mediator_cli.checkpoint.header import read_header
from mediator_cli.errors import CheckpointError, OutputError

SIZES = {"w0": 700, "w1": 1, "w2": 0, "w3": 65, "w4": 300}


def tensors():
    """Encode tensors of several sizes, each by another code."""
    return {
        name: encoded(
            random_delta(size, 0.3, size), CODECS[n], "bitmap" if n % 2 else "gaps", 0.1, 3 if n in (0, 3) else 0
        )
        for n, (name, size) in enumerate(SIZES.items())
    }


@pytest.fixture
def whole(tmp_path):
    """The bytes of a file that was written in one go."""
    file = tmp_path / "whole.safetensors"
    with create_sparse_file(file, "a", list(SIZES)) as writer:
        for name, (spec, arrays) in tensors().items():
            write_tensor(writer, name, spec, arrays)
        writer.finish()
    return file.read_bytes()


def test_arrays_lie_as_they_were_placed_in_the_order_of_the_format(tmp_path, whole):
    infos = read_header(tmp_path / "whole.safetensors").tensors
    kinds = [
        [f"{name}.values", f"{name}.{spec.index}"]
        + ([f"{name}.override_index", f"{name}.override_values"] if spec.n_overrides else [])
        for name, (spec, _) in tensors().items()
    ]
    assert [info.name for info in infos] == [name for group in kinds for name in group]
    assert infos[0].start == reserve_bytes(SIZES)
    assert all(info.start % 8 == 0 for info in infos)
    assert infos[-1].end == len(whole)


def test_what_is_written_is_what_is_there(tmp_path, whole):
    sparse = open_sparse_file(tmp_path / "whole.safetensors")
    assert (sparse.expert, list(sparse.tensors)) == ("a", list(SIZES))
    for name, (spec, arrays) in tensors().items():
        assert sparse.tensors[name] == spec
        for kind, info in sparse.places(name).items():
            raw = arrays[kind].tobytes()
            found = whole[info.start : info.end]
            fill = b"\xff" if kind == "gaps" else b"\0"
            assert found == raw + fill * (-len(raw) % 8)


@given(n=st.integers(0, 40), index=st.sampled_from(["gaps", "bitmap"]), codec=st.sampled_from(CODECS))
def test_places_are_absolute_and_the_file_has_its_size(tmp_path_factory, n, index, codec):
    file = tmp_path_factory.mktemp("w") / "a.safetensors"
    spec = SparseTensor(shape=(n,), n_kept=n, index=index, values=codec, n_overrides=n)
    n_values = {"fp32": 4 * n, "bf16": 2 * n, "fp16": 2 * n, "int8": n, "sign": -(-n // 8)}[codec]
    with create_sparse_file(file, "a", ["w"]) as writer:
        places = writer.place("w", spec, "F16", n)
        start, expected = reserve_bytes(["w"]), {}
        for kind, size in {"values": n_values, index: n, "override_index": 8 * n, "override_values": 2 * n}.items():
            if n or kind in ("values", index):
                expected[kind] = start
                start += -(-size // 8) * 8
        assert places == expected
        assert file.stat().st_size == start


def test_pieces_may_come_in_any_order_from_any_thread(tmp_path, whole):
    file = tmp_path / "b.safetensors"
    with create_sparse_file(file, "a", list(SIZES)) as writer:
        pieces = []
        for name, (spec, arrays) in tensors().items():
            for kind, offset in writer.place(name, spec, "BF16", arrays[spec.index].nbytes).items():
                raw = arrays[kind].view(np.uint8)
                pieces += [(offset + at, raw[at : at + 7]) for at in range(0, len(raw), 7)]
        Random(0).shuffle(pieces)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda piece: writer.write(*piece), pieces))
        writer.sync()
        writer.finish()
    assert file.read_bytes() == whole


@pytest.mark.parametrize("n", range(len(SIZES) + 1))
@pytest.mark.parametrize("behind", [0, 1, 5000])
def test_a_file_is_taken_up_after_any_tensor(tmp_path, whole, n, behind):
    file, made = tmp_path / "b.safetensors", tensors()
    done, rest = list(made)[:n], list(made)[n:]
    with create_sparse_file(file, "a", list(SIZES)) as writer:
        for name in done:
            write_tensor(writer, name, *made[name])
    with file.open("ab") as stream:
        stream.write(b"?" * behind)
    with pytest.raises(CheckpointError):
        read_header(file)
    specs = {name: made[name][0] for name in done}
    n_index = {name: spec.index and made[name][1][spec.index].nbytes for name, spec in specs.items()}
    with resume_sparse_file(file, "a", list(SIZES), specs, dict.fromkeys(done, "BF16"), n_index) as writer:
        for name in rest:
            write_tensor(writer, name, *made[name])
        writer.finish()
    assert file.read_bytes() == whole


def test_a_file_that_lost_its_end_is_not_taken_up(tmp_path):
    file, (spec, arrays) = tmp_path / "b.safetensors", tensors()["w0"]
    with create_sparse_file(file, "a", ["w0"]) as writer:
        write_tensor(writer, "w0", spec, arrays)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(OutputError, match="shorter than what was written"):
        resume_sparse_file(file, "a", ["w0"], {"w0": spec}, {"w0": "BF16"}, {"w0": arrays["gaps"].nbytes})
    with pytest.raises(OutputError, match="cannot write: no such file"):
        resume_sparse_file(tmp_path / "gone", "a", [], {}, {}, {})


def test_an_existing_file_is_never_overwritten(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_text("mine")
    with pytest.raises(OutputError, match="file exists"):
        create_sparse_file(file, "a", [])
    assert file.read_text() == "mine"


def test_a_file_that_is_not_finished_is_no_sparse_file(tmp_path):
    file = tmp_path / "a.safetensors"
    create_sparse_file(file, "a", ["w"]).close()
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        open_sparse_file(file)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    open_before = len(list(Path("/proc/self/fd").iterdir()))
    spec, arrays = tensors()["w0"]
    with create_sparse_file(tmp_path / "a.safetensors", "a", ["w0"]) as writer:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError, match="no space left on device"):
            writer.place("w0", spec, "BF16", arrays["gaps"].nbytes)
        with pytest.raises(OutputError, match="no space left on device"):
            create_sparse_file(tmp_path / "b.safetensors", "a", ["w0"])
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match="no space left on device"):
            writer.write(8, arrays["values"])
        monkeypatch.setattr(os, "fdatasync", full)
        with pytest.raises(OutputError, match="no space left on device"):
            writer.sync()
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_names_of_any_kind_fit_into_the_room_for_the_header(tmp_path):
    names = ["w", "ü" * 300, '"quoted\\' * 50, *(f"model.layers.{n}.mlp.down_proj.weight" for n in range(200))]
    spec, arrays = encoded(random_delta(50, 0.5, 0), "int8", "bitmap", 1.2345678901234567e-300, 5)
    with create_sparse_file(tmp_path / "a.safetensors", "an expert", names) as writer:
        for name in names:
            write_tensor(writer, name, spec, arrays)
        writer.finish()
    sparse = open_sparse_file(tmp_path / "a.safetensors")
    assert dict(sparse.tensors) == dict.fromkeys(names, spec)
    assert sparse.expert == "an expert"
