"""Models at URLs for tests: put there from a workshop, with every byte that is read counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import Workshop

WEIGHTS = "model.safetensors"


@dataclass
class Traffic:
    """The ranges that were read: bytes by path, and how often; what is not a range counts as all of it."""

    n_bytes: Counter[str] = field(default_factory=Counter)
    n_reads: Counter[str] = field(default_factory=Counter)

    def note(self, path: str, data: bytes) -> None:
        self.n_bytes[path.strip("/")] += len(data)
        self.n_reads[path.strip("/")] += 1

    def clear(self) -> None:
        self.n_bytes.clear()
        self.n_reads.clear()

    def of_weights(self) -> dict[str, int]:
        return {path: n for path, n in self.n_bytes.items() if path.endswith((".safetensors", ".bin"))}


@dataclass(frozen=True)
class FarShop:
    """A workshop whose models are at a URL as well."""

    workshop: Workshop
    url: str
    files: Any
    traffic: Traffic

    def path(self, name: str) -> str:
        return f"{self.url.partition('://')[2]}/{name}"

    def put(self, *names: str) -> None:
        for name in names:
            for file in sorted((self.workshop.folder / name).rglob("*")):
                if file.is_file():
                    inner = file.relative_to(self.workshop.folder).as_posix()
                    self.files.pipe_file(self.path(inner), file.read_bytes())

    def fields(self, *experts: str) -> dict[str, Any]:
        chosen = [{"name": name, "model": f"{self.url}/{name}"} for name in experts or ("a", "b")]
        return {"base": f"{self.url}/base", "experts": chosen}

    def weights(self, name: str) -> bytes:
        return (self.workshop.folder / name / WEIGHTS).read_bytes()


def same_numbers(one: Path, other: Path) -> None:
    """Compare two bundles byte for byte, but for the two files that say where the sources were."""
    told = {"README.md", "routing_manifest.json"}
    names = sorted(file.relative_to(one).as_posix() for file in one.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(other).as_posix() for file in other.rglob("*") if file.is_file())
    assert told < set(names)
    for name in set(names) - told:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
