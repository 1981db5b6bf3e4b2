"""Arrays between processes, and records that are written while they are read."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.engine.streams import Piece
from mediator_cli.errors import OutputError
from mediator_cli.executors.board import Board, Record
from mediator_cli.executors.exchange import add_arrays, load_arrays, save_arrays, share_out
from mediator_cli.executors.place import Place
from mediator_cli.executors.ranks import Ranks

GROUPS = [[np.arange(4, dtype=np.uint32), np.ones((2, 3))], [], [np.array(7, np.int64)]]


def test_arrays_come_back_as_they_were(tmp_path):
    save_arrays(tmp_path / "counts.npz", GROUPS)
    for group, other in zip(load_arrays(tmp_path / "counts.npz", GROUPS), GROUPS, strict=True):
        for a, b in zip(group, other, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["counts.npz"]


def test_arrays_of_another_kind_are_refused(tmp_path):
    save_arrays(tmp_path / "counts.npz", GROUPS)
    for like in ([GROUPS[0][:1], [], GROUPS[2]], [GROUPS[0], [], [np.array(7, np.int32)]], [*GROUPS, GROUPS[0]]):
        with pytest.raises(OutputError, match="cannot use what another process counted"):
            load_arrays(tmp_path / "counts.npz", like)
    (tmp_path / "counts.npz").write_bytes(b"PK\3\4 no archive")
    with pytest.raises(OutputError, match="cannot use what another process counted"):
        load_arrays(tmp_path / "counts.npz", GROUPS)


def test_pickles_are_never_read(tmp_path):
    np.savez(tmp_path / "counts.npz", **{"0.0": np.array([print], dtype=object)})
    with pytest.raises(OutputError):
        load_arrays(tmp_path / "counts.npz", [[np.zeros(1)]])


def test_counts_add_up_in_their_own_dtype():
    totals = [[np.array([1, 2], np.uint32)], [np.array([0.5])]]
    add_arrays(totals, [[np.array([3, 4], np.uint32)], [np.array([0.25])]])
    assert [group[0].tolist() for group in totals] == [[4, 6], [0.75]]
    assert totals[0][0].dtype == np.uint32


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 1000), max_size=30), st.integers(1, 5))
def test_each_tensor_is_given_to_one_and_loads_differ_by_one_tensor_at_most(sizes, world):
    owners = share_out(sizes, world)
    loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(world)]
    assert owners.keys() == sizes.keys()
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    assert owners == share_out(dict(reversed(sizes.items())), world)


def test_every_piece_is_looked_at_by_one_process_and_all_of_a_tensor_by_the_same():
    parts = [Piece(f"t{n}", start, start + 10) for n in range(20) for start in (0, 10)]
    owners = share_out({f"t{n}": 20 for n in range(15)}, 3)
    mine = [Ranks(Place(rank, 3, "run"), owners).mine(parts) for rank in range(3)]
    assert sorted((p.tensor, p.start) for each in mine for p in each) == sorted((p.tensor, p.start) for p in parts)
    assert not {p.tensor for p in mine[0]} & {p.tensor for p in mine[1]}
    assert [sum(Ranks(Place(rank, 3, "run"), {}).has_shard(n, 7) for rank in range(3)) for n in range(7)] == [1] * 7


def test_a_record_is_read_as_it_was_written_or_not_at_all(tmp_path):
    board, record = Board(tmp_path), Record(1, "token", "run", 3, members=("a", "b", "c"))
    assert board.read(1) is None
    board.post(record)
    assert board.read(1) == record
    shorter = replace(record, members=(), ended="")
    board.post(shorter)
    assert board.read(1) == shorter
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for n in range(len(whole) - 1):
        file.write_bytes(whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :])
        assert board.read(1) in (None, shorter)
    file.write_bytes(b"")
    assert board.read(1) is None


def test_a_board_keeps_the_records_of_those_that_may_have_begun(tmp_path):
    board = Board(tmp_path)
    for rank in range(3):
        board.post(Record(rank, "token", "run", 3))
    (tmp_path / "counts-old.npz").touch()
    board.clear(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["process-00000", "process-00001"]
