"""The router of a bundle in a folder of its own: small, and all that is needed to decide without the experts."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from mediator_cli.bundle.manifest import MANIFEST, bundle_file
from mediator_cli.bundle.record import FileRecord
from mediator_cli.bundle.router_folder import ARRAYS, EMBEDDINGS, ROUTER_RECORD, TABLE, RouterFolder, TableRecord
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.read import open_files, read_bytes
from mediator_cli.checkpoint.write import NewTensor, create_file, write_at
from mediator_cli.errors import BundleError, Problem
from mediator_cli.export.folder import CARD, building, copy_side_files, folder_bytes, open_for_export, write_report
from mediator_cli.export.semantic_router import SEMANTIC_ROUTER, semantic_router_yaml
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.pipeline.record import package_version
from mediator_cli.runtime.dense_features import input_embeddings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.bundle.read import Bundle
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.export.settings import Run

DENSE = "dense"
_CHUNK = 64 << 20
_CARD = """\
# A router

It decides which experts of a bundle answer a prompt: {experts}. Exported by mediator from a bundle with digest
`{digest}`, it decides as the bundle does, bit for bit.

- In front of any OpenAI-compatible server: `mediator serve {here} --upstream http://127.0.0.1:8000`
- Inside vLLM: `MEDIATOR_ROUTER={here} vllm serve … --middleware mediator_cli.serve.router.RouterMiddleware`
- `{semantic}` is a start for vLLM's Semantic Router, which decides by its own signals, not by this router.

Servers are expected to have the experts as models {models} and the dense expert as `{dense}`.
"""


class RouterReport(BaseModel):
    """What was written; `embedding_bytes` are those of the table of embeddings, 0 where none is read."""

    model_config = ConfigDict(frozen=True)

    format: str = "router"
    folder: str
    bundle: str
    features: str
    experts: tuple[str, ...]
    embedding_bytes: int
    bytes: int
    notices: tuple[str, ...] = ()


def export_router(folder: Path, target: Path, run: Run, models: Mapping[str, str] | None = None) -> RouterReport:
    """Write the router of a bundle as a folder, which appears whole or not at all.

    `models` are the names that a server has the experts under, by default their own.
    Raises BundleError where there is no router, or one that reads more than text and embeddings.
    """
    bundle = open_for_export(folder)
    record = checked_router(bundle)
    with building(target, run, f"router {bundle.manifest.digest}") as place:
        report = write_router_folder(bundle, record, place, models)
        (place / CARD).write_text(_card(bundle, record, target.name, models), encoding="utf-8")
        report = report.model_copy(update={"folder": str(target.absolute()), "bytes": folder_bytes(place)})
        write_report(place, report)
    return report


def checked_router(bundle: Bundle) -> RouterRecord:
    """Give the record of a router that can leave its bundle; raise BundleError where there is none."""
    record, place = bundle.manifest.router, str(bundle.path / MANIFEST)
    fit = f"`mediator fit-router {bundle.path} --features embedding_mean` (or text) makes one that can"
    if record is None:
        what = "gates inside the model choose, which no other server runs" if bundle.manifest.gates else "has no router"
        raise BundleError(Problem(place, what, f"fit one with `mediator fit-router {bundle.path}`"))
    if record.features not in ("embedding_mean", "text", "none"):
        reads = "runs the dense expert" if record.features == "hidden_mean" else "asks the experts themselves"
        message = f"the router reads {record.features}: it {reads}, so it cannot decide away from the bundle"
        raise BundleError(Problem(place, message, fit))
    return record


def write_router_folder(
    bundle: Bundle, record: RouterRecord, folder: Path, models: Mapping[str, str] | None = None
) -> RouterReport:
    """Write record, arrays, embeddings, tokenizer and the semantic router's configuration into an empty folder."""
    stored = record
    if record.file is not None:
        shutil.copyfile(bundle_file(bundle.path, record.file.name), folder / ARRAYS)
        stored = record.model_copy(update={"file": record_file(folder, ARRAYS)})
    names = dict(models) if models is not None else {name: name for name in record.experts}
    table = _write_embeddings(bundle, folder) if record.features == "embedding_mean" else None
    files = () if record.features == "none" else copy_side_files(bundle, folder)
    whole = RouterFolder(
        generator=f"mediator {package_version()}",
        bundle=bundle.manifest.digest,
        router=stored,
        embeddings=table,
        dense=DENSE,
        models=names,
        files=tuple(record_file(folder, name) for name in sorted(files)),
    )
    (folder / ROUTER_RECORD).write_text(whole.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / SEMANTIC_ROUTER).write_text(semantic_router_yaml(bundle.manifest, names, DENSE), encoding="utf-8")
    return RouterReport(
        folder=str(folder),
        bundle=bundle.manifest.digest,
        features=record.features,
        experts=record.experts,
        embedding_bytes=0 if table is None else table.file.bytes,
        bytes=folder_bytes(folder),
        notices=tuple(_notices(record)),
    )


def _notices(record: RouterRecord) -> list[str]:
    if record.policy.combine == "parameters":
        return []
    return [f"the policy averages the experts' {record.policy.combine}; other servers mix or choose adapters instead"]


def record_file(folder: Path, name: str) -> FileRecord:
    """Describe a file that stands in a folder."""
    return FileRecord(name=name, bytes=(folder / name).stat().st_size, sha256=digest_file(folder / name))


def _write_embeddings(bundle: Bundle, folder: Path) -> TableRecord:
    """Copy the input embeddings of the dense expert as they are stored, a slab at a time."""
    info = _table_of(bundle)
    rows, hidden = info.shape
    file = folder / EMBEDDINGS
    target = create_file(file, [NewTensor(TABLE, info.dtype, info.shape)], {"format": "mediator.embeddings"})[TABLE]
    with open_files([info.file]) as handles, file.open("r+b") as stream:
        for start in range(0, info.n_bytes, _CHUNK):
            data = read_bytes(handles, info, start, min(start + _CHUNK, info.n_bytes))
            write_at(stream.fileno(), file, bytes_of(data), target.start + start)
    return TableRecord(file=record_file(folder, EMBEDDINGS), dtype=info.dtype, shape=(rows, hidden))


def _table_of(bundle: Bundle) -> TensorInfo:
    info = input_embeddings(bundle.path)
    if info is None:
        hint = f"fit a router that reads text alone: `mediator fit-router {bundle.path} --features text`"
        raise BundleError(Problem(str(bundle.path), "its input embeddings are not stored as one table", hint))
    return info


def _card(bundle: Bundle, record: RouterRecord, here: str, models: Mapping[str, str] | None) -> str:
    names = dict(models) if models is not None else {name: name for name in record.experts}
    return _CARD.format(
        experts=", ".join(record.experts),
        digest=bundle.manifest.digest[:16],
        here=here,
        semantic=SEMANTIC_ROUTER,
        models=", ".join(f"`{name}`" for name in names.values()),
        dense=DENSE,
    )
