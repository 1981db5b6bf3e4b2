"""An adapter's folder: factors in one file whose header comes last, PEFT's config, card and manifest."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.adapter import ADAPTER_MANIFEST
from mediator_cli.bundle.digest import digest_tensors
from mediator_cli.bundle.lineage import label
from mediator_cli.bundle.manifest import SourceRecord, bundle_digest, to_json
from mediator_cli.bundle.record import FileRecord
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.read import narrow
from mediator_cli.checkpoint.write import NewTensor, header_bytes, write_at, write_error
from mediator_cli.errors import OutputError, Problem
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.pipeline.record import commit_of, package_version
from mediator_cli.pipeline.side_files import license_of, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.adapter import AdapterManifest
    from mediator_cli.bundle.record import SourceFile
    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.kernels.factors import Factors

    SourceFiles = tuple[SourceFile, ...]
    Weight = float | tuple[float, ...] | None

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
_METADATA = {"format": "pt"}
_ROOT = "base_model.model."
_LONGEST = 10**9


@dataclass(frozen=True)
class Shape:
    """The form of a module's factors in the file; of a convolution, `a_tail` and `b_tail` are the sides of a kernel."""

    name: str
    is_embedding: bool = False
    a_tail: tuple[int, ...] = ()
    b_tail: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, str]:
        """The names of A and B in the file."""
        if self.is_embedding:
            return f"{_ROOT}{self.name}.lora_embedding_A", f"{_ROOT}{self.name}.lora_embedding_B"
        return f"{_ROOT}{self.name}.lora_A.weight", f"{_ROOT}{self.name}.lora_B.weight"


def saved_name(tensor: str) -> str:
    """Name a tensor of the model that is stored whole."""
    return f"{_ROOT}{tensor}"


@dataclass
class AdapterFile:
    """A weight file that is written tensor by tensor; its header, for which room is kept, when all are known."""

    file: Path
    dtype: str
    descriptor: int
    start: int
    tensors: list[NewTensor] = field(default_factory=list)
    n_bytes: int = 0

    def add_factors(self, shape: Shape, factors: Factors) -> None:
        """Write the factors of one module; their scaling must be 1."""
        a, b = shape.names
        self.add(a, (factors.rank, *(shape.a_tail or factors.a.shape[1:])), factors.a)
        self.add(b, (factors.b.shape[0], factors.rank, *shape.b_tail), factors.b)

    def add(self, name: str, shape: tuple[int, ...], values: Floats) -> None:
        """Write one tensor; raise OutputError where a number does not fit into the dtype."""
        stored, is_whole = narrow(values.reshape(-1), self.dtype)
        if not is_whole:
            message = f"{name} has numbers that are not finite in {self.dtype}"
            raise OutputError(Problem(str(self.file), message, "write float32, or look for a broken expert"))
        write_at(self.descriptor, self.file, bytes_of(stored), self.start + self.n_bytes)
        self.tensors.append(NewTensor(name, self.dtype, shape))
        self.n_bytes += stored.nbytes


@contextmanager
def create_adapter_file(folder: Path, dtype: str, names: Sequence[str]) -> Iterator[AdapterFile]:
    """Give a file to write tensors of these names into, or fewer; it is whole when this ends without an error."""
    file = folder / WEIGHTS
    longest = [NewTensor(name, dtype, (_LONGEST, _LONGEST, 1, 1)) for name in names]
    start = len(header_bytes(longest, _METADATA))
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    except OSError as error:
        raise write_error(file, error) from None
    try:
        made = AdapterFile(file, dtype, descriptor, start)
        yield made
        head = header_bytes(made.tensors, _METADATA, start)
        write_at(descriptor, file, memoryview(head), 0)
    finally:
        os.close(descriptor)


def peft_config(
    ranks: Mapping[str, int],
    base_name: str,
    task_type: str | None,
    known: Iterable[str],
    **facts: Any,  # noqa: ANN401 - fields of PEFT's config
) -> dict[str, Any]:
    """Write PEFT's config of an adapter with these ranks by module and scaling 1; `known` are the base's tensors."""
    common = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0] if ranks else 1
    other = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": short_names(ranks, known),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        **facts,
    }


def short_names(modules: Iterable[str], known: Iterable[str]) -> list[str]:
    """Name modules by their last part where all of the base's modules that end so are among them, else in full.

    >>> short_names(["0.q", "1.q", "0.v"], ["0.q.weight", "0.v.weight", "1.q.weight", "1.v.weight"])
    ['0.v', 'q']
    """
    chosen = set(modules)
    every: dict[str, set[str]] = {}
    for tensor in known:
        module, _, parameter = tensor.rpartition(".")
        if parameter == "weight":
            every.setdefault(module.rpartition(".")[2], set()).add(module)
    found = (name.rpartition(".")[2] if every.get(name.rpartition(".")[2], {""}) <= chosen else name for name in chosen)
    return sorted(set(found))


def finish_folder(folder: Path, config: Mapping[str, Any], card: str, manifest: AdapterManifest) -> None:
    """Write config, card and, last, the manifest with the digests of all that stands in the folder."""
    write_json(folder / CONFIG, config)
    (folder / CARD).write_text(card, encoding="utf-8")
    tensors = digest_tensors({info.name: info for info in read_header(folder / WEIGHTS).tensors})
    files = tuple(_record(folder, name) for name in (WEIGHTS, CONFIG, CARD))
    whole = manifest.model_copy(
        update={"tensors": tensors, "files": files, "digest": bundle_digest(tensors, {}), "generator": _generator()}
    )
    (folder / ADAPTER_MANIFEST).write_text(to_json(whole), encoding="utf-8")


def _generator() -> str:
    return f"mediator {package_version()}"


def _record(folder: Path, name: str) -> FileRecord:
    file = folder / name
    return FileRecord(name=name, bytes=file.stat().st_size, sha256=digest_file(file))


def source_record(
    name: str,
    path: str,
    source: Checkpoint | Adapter,
    files: Mapping[str, tuple[SourceFile, ...]],
    weight: Weight = None,
) -> SourceRecord:
    """Tell where base or expert came from; `files` has the digests of weight files by name, of those that were read."""
    return SourceRecord(
        name=name,
        kind="lora" if isinstance(source, Adapter) else "full",
        path=path,
        weight=weight,
        license=license_of(source.path),
        files=files.get(name, ()),
        revision=commit_of(source.repo),
    )


def card_head(title: str, base: Checkpoint, written: str, tag: str) -> list[str]:
    """Begin a card: what the Hub and PEFT want to know, how the adapter is loaded."""
    return [
        "---",
        *([f"base_model: {written.split('@')[0]}"] if base.repo is not None else []),
        "library_name: peft",
        f"tags: [lora, {tag}, mediator]",
        "---",
        f"# {title}",
        "",
        "Load it on its base with PEFT: `AutoPeftModelForCausalLM.from_pretrained(FOLDER)`.",
        "",
    ]


def source_table(rows: Iterable[tuple[str, str, Path]]) -> list[str]:
    """Tell where base and experts came from, and their licences; rows of name, path as written, and folder."""
    cells = [f"| {name} | {label(path)} | {license_of(folder) or 'not declared'} |" for name, path, folder in rows]
    return ["| source | from | licence |", "|---|---|---|", *cells]
