"""Digests: SHA-256 of small files; a fast one, xxh3 over fixed blocks, of tensors and weight files.

The digest of a tensor is XXH3-128 of the joined XXH3-128 digests of its blocks of BLOCK elements; that of a weight
file is XXH3-128 of the digest of its header and those of its tensors, in the order in which they lie. So both can be
taken while slabs pass by, in any order.
"""

from __future__ import annotations

import hashlib
from threading import Lock
from typing import TYPE_CHECKING, Any

import xxhash

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.header import CHECK_DISK, unreadable
from mediator_cli.kernels.arrays import bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.header import TensorInfo

CHUNK = 1 << 20
"""Bytes that are digested at a time."""
_WIDTH = 16


def digest_file(file: Path, advance: Callable[[int], None] = lambda n: None) -> str:
    """Take the SHA-256 of a whole file, telling `advance` of the bytes read; raise CheckpointError on a bad read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise unreadable(file, error, CHECK_DISK) from None
    return digest.hexdigest()


def digest_blocks(stored: NDArray[Any]) -> bytes:
    """Join the digests of the blocks of a stored slab [m] that starts on a block."""
    data, step = bytes_of(stored), BLOCK * stored.itemsize
    return b"".join([xxhash.xxh3_128_digest(data[start : start + step]) for start in range(0, len(data), step)])


def fold(digests: Iterable[bytes]) -> str:
    """Fold digests of parts into one, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(b"".join(digests))


def fold_file(header: bytes, tensors: Iterable[str]) -> str:
    """Fold a weight file's header, as it lies, and the digests of its tensors, in hexadecimal, in their order."""
    return fold([xxhash.xxh3_128_digest(header), *map(bytes.fromhex, tensors)])


class Digests:
    """The digests of tensors whose slabs pass by, in any order and from any thread; each block once."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, str], tuple[bytearray, set[int]]] = {}
        self._whole: dict[tuple[Path, str], str] = {}
        self._done: dict[int, TensorInfo] = {}
        self._new: list[tuple[str, str, str]] = []
        self._lock = Lock()

    def note(self, info: TensorInfo, start: int, stored: NDArray[Any]) -> None:
        """Take note of a slab as it is stored; one that does not consist of whole blocks is passed over."""
        # By identity: this is asked for every slab of every pass, and a path takes long to hash.
        if id(info) in self._done or start % BLOCK:
            return
        stop = start + len(stored)
        if stop % BLOCK and stop != info.size:
            return
        digests, key = digest_blocks(stored), (info.file, info.name)
        with self._lock:
            if key in self._whole:
                self._done[id(info)] = info
            else:
                self._add(info, key, start // BLOCK, digests)

    def _add(self, info: TensorInfo, key: tuple[Path, str], first: int, digests: bytes) -> None:
        n_blocks = -(-info.size // BLOCK)
        joined, seen = self._open.setdefault(key, (bytearray(n_blocks * _WIDTH), set()))
        joined[first * _WIDTH : first * _WIDTH + len(digests)] = digests
        seen.update(range(first, first + len(digests) // _WIDTH))
        if len(seen) == n_blocks:
            del self._open[key]
            self._done[id(info)], self._whole[key] = info, fold([bytes(joined)])
            self._new.append((str(info.file), info.name, self._whole[key]))

    def add(self, file: Path, tensor: str, digest: str) -> None:
        """Take over a digest that was taken before."""
        self._whole[file, tensor] = digest

    def take(self) -> list[tuple[str, str, str]]:
        """Give file, tensor and digest of what passed by as a whole since the last call."""
        with self._lock:
            taken, self._new = self._new, []
        return taken

    def of(self, file: Path) -> dict[str, str]:
        """Give the digests of those tensors of a file that passed by as a whole."""
        with self._lock:
            return {name: digest for (owner, name), digest in self._whole.items() if owner == file}
