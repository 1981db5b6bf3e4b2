"""The routing manifest: what a bundle says of itself. Neither torch nor numpy here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from mediator_cli.bundle.checksum import sha256
from mediator_cli.bundle.gates_record import GatesRecord
from mediator_cli.bundle.moe import MoeRecord
from mediator_cli.bundle.record import FileRecord, Record, SourceFile, WeightFile
from mediator_cli.bundle.router_record import RouterRecord, drop_late_fields, is_late
from mediator_cli.checkpoint.header import check_plain_name, read_json
from mediator_cli.errors import BundleError, CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MANIFEST = "routing_manifest.json"
CONFLICTS = "conflicts.json"
EXPERTS_FOLDER = "experts"
ROUTER = "router.safetensors"
SCHEMA_VERSION: Final = 2
GATED_SCHEMA_VERSION: Final = 3
"""That of a manifest whose bundle stores some tensor in another way than sparsely; see README.md."""
LATEST_SCHEMA_VERSION: Final = 4
"""That of a manifest of a Mixture of Experts, of experts that are asked, or whose outputs are combined; README.md."""

LIBRARY_SCHEMA_VERSION: Final = 5
"""That of a manifest of low-rank experts, of gates, or of a router that reads nothing; see README.md."""

M = TypeVar("M", bound=BaseModel)


class SourceRecord(Record):
    """Where base or expert came from: the path as the recipe has it, and the weight files read."""

    name: str
    kind: Literal["full", "lora"]
    path: str
    weight: Annotated[
        float | tuple[float, ...] | None,
        Field(description="Merge coefficient, or its anchors over the layers, before overrides; null for the base."),
    ]
    license: str | None
    files: tuple[SourceFile, ...]
    prompts: FileRecord | None = None
    revision: Annotated[str | None, Field(description="Commit of a repository on the Hub; null for a folder.")] = None


class RecipeRecord(Record):
    """The recipe as it was read, its digest, and the changes given on the command line."""

    name: str
    text: str
    sha256: str
    changes: tuple[str, ...]


class MethodRecord(Record):
    """A merge method with all its parameters, and how many tensors it merged."""

    method: str
    parameters: dict[str, Any]
    n_tensors: int


class TensorRecord(Record):
    """A dense tensor: its file, dtype, shape, and digest; see README.md."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    xxh3: str


class SparseUnitRecord(Record):
    """What a sparse expert keeps of one unit: entries of how many, and the share of the delta's energy."""

    n_kept: int
    n_entries: int
    energy: Annotated[float, Field(description="1 - |delta - stored|² / |delta|² before rescaling; 1 for none.")]


class SparseRecord(Record):
    """The files of one sparse expert and what it keeps."""

    expert: str
    files: Annotated[tuple[WeightFile, ...], Field(min_length=1)]
    tensors: Annotated[dict[str, str], Field(description="Digest of each tensor; see README.md.")]
    units: dict[str, SparseUnitRecord]


class SharedRecord(Record):
    """The files of the arrays that experts share, where they are not stored sparsely."""

    files: Annotated[tuple[WeightFile, ...], Field(min_length=1)]
    tensors: Annotated[dict[str, str], Field(description="Digest of each tensor's shared arrays; see README.md.")]


class ExtractRecord(Record):
    """How the experts of routed units are stored, before overrides."""

    dense: Literal["average", "base"]
    density: float
    over: Annotated[
        Literal["tensor", "model"], Field(description="Whether `density` is that of each tensor, or of all together.")
    ] = "tensor"
    select: str
    rescale: float
    values: str
    mode: Annotated[
        Literal["sparse", "sign", "emr", "tall_mask", "basis", "factors"],
        Field(description="sparse: all of the above. Else density, over, select and rescale have no meaning."),
    ] = "sparse"
    scale: Annotated[Literal["elements", "tensors"] | None, Field(description="Of mode emr.")] = None
    mask_lambda: Annotated[float | None, Field(description="Of mode tall_mask.")] = None
    directions: Annotated[int | None, Field(description="Of mode basis.")] = None


class UnitScores(Record):
    """The conflict of one unit by each measure."""

    sign: float
    any_sign: float
    cosine: float
    overlap: float


class ConflictRecord(Record):
    """How conflict was measured, and the score that each unit got."""

    measure: str
    unit: str
    denoise: str
    scores: dict[str, float]


class Sizes(Record):
    """Bytes on disk: dense model, sparse experts, and all experts as full models of the output dtypes."""

    dense: int
    sparse: int
    full_models: int


class ChangeRecord(Record):
    """An expert that was added to the finished bundle, or taken out of it."""

    change: Literal["added", "removed"]
    source: Annotated[SourceRecord, Field(description="Where the expert came from.")]
    router: Annotated[str, Field(description="What was done with the router.")]
    before: Annotated[str, Field(description="The bundle's digest before the change.")]
    generator: str


class Manifest(Record):
    """The routing manifest of a bundle: version 2, 3 where experts are not stored sparsely, 4, 5 of what came later."""

    schema_version: Literal[2, 3, 4, 5]
    # The first field of that name in the text, whatever the others hold.
    checksum: Annotated[str, Field(description="SHA-256 of this file with an empty checksum.")] = ""
    generator: str
    recipe: RecipeRecord
    base: SourceRecord
    experts: tuple[SourceRecord, ...]
    tokenizer: str
    seed: int
    methods: tuple[MethodRecord, ...]
    conflict: ConflictRecord | None
    assignment: dict[str, Literal["average", "route"]]
    extract: ExtractRecord | None
    sparse: tuple[SparseRecord, ...]
    shared: Annotated[
        SharedRecord | None, Field(description="What experts share; null where all is stored sparsely or by sign.")
    ] = None
    shards: Annotated[tuple[WeightFile, ...], Field(description="The weight files of the dense expert.")]
    tensors: dict[str, TensorRecord]
    router: RouterRecord | None = None
    gates: Annotated[GatesRecord | None, Field(description="Of low-rank experts that are chosen inside the model.")] = (
        None
    )
    moe: Annotated[MoeRecord | None, Field(description="Of a Mixture of Experts; null for bundles.")] = None
    files: Annotated[tuple[FileRecord, ...], Field(description="All other files, the manifest itself not.")]
    sizes: Sizes
    digest: Annotated[str, Field(description="SHA-256 over the digests of all tensors; see README.md.")]
    averaged_in_routed_units: Annotated[
        tuple[str, ...], Field(description="Tensors of routed units that the run time cannot mix for each input.")
    ] = ()
    history: Annotated[
        tuple[ChangeRecord, ...], Field(description="Experts added and removed since the merge, in this order.")
    ] = ()
    notices: tuple[str, ...]

    @model_validator(mode="after")
    def _version_fits(self) -> Self:
        is_later = self.shared is not None or (self.extract is not None and self.extract.mode != "sparse")
        if is_later and self.schema_version == SCHEMA_VERSION:
            raise ValueError(f"shared arrays and modes are of version {GATED_SCHEMA_VERSION}")
        if self.moe is not None and self.schema_version < LATEST_SCHEMA_VERSION:
            raise ValueError(f"a Mixture of Experts is of version {LATEST_SCHEMA_VERSION}")
        if is_late(self.router) and self.schema_version < LATEST_SCHEMA_VERSION:
            raise ValueError(f"experts asked or combined are of version {LATEST_SCHEMA_VERSION}")
        if self.history and self.schema_version < LATEST_SCHEMA_VERSION:
            raise ValueError(f"experts added or removed are of version {LATEST_SCHEMA_VERSION}")
        if _is_library(self) and self.schema_version < LIBRARY_SCHEMA_VERSION:
            raise ValueError(
                f"low-rank experts, gates and routers that read nothing are of version {LIBRARY_SCHEMA_VERSION}"
            )
        return self


def _is_library(manifest: Manifest) -> bool:
    """Whether a manifest says what versions before the one of low-rank experts do not know."""
    is_low_rank = manifest.extract is not None and manifest.extract.mode == "factors"
    is_blind = manifest.router is not None and manifest.router.features == "none"
    return manifest.gates is not None or is_low_rank or is_blind


def with_router(manifest: Manifest, router: RouterRecord | None) -> Manifest:
    """Give a manifest another router, and a version that knows what it then says."""
    # Not below 3 again: overrides may store single tensors in another way, which the manifest does not tell.
    version = min(manifest.schema_version, GATED_SCHEMA_VERSION)
    if is_late(router) or manifest.moe is not None or manifest.history:
        version = LATEST_SCHEMA_VERSION
    new = manifest.model_copy(update={"router": router, "schema_version": version})
    return new.model_copy(update={"schema_version": LIBRARY_SCHEMA_VERSION}) if _is_library(new) else new


def to_json(record: BaseModel) -> str:
    """Write a record as JSON text, the same for the same content; a manifest gets its checksum."""
    return _dump(with_checksum(record) if isinstance(record, Manifest) else record)


def with_checksum(manifest: Manifest) -> Manifest:
    """Give a manifest the checksum that its text has to have."""
    return manifest.model_copy(update={"checksum": sha256(_dump(manifest.model_copy(update={"checksum": ""})))})


def _dump(record: BaseModel) -> str:
    data = record.model_dump(mode="json")
    if isinstance(record, Manifest):
        if not record.history:
            del data["history"]
        _drop_later_fields(data, record.schema_version)
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _drop_later_fields(data: dict[str, Any], version: int) -> None:
    """Leave out what a version does not know, so that its readers read it and its bytes stay what they were."""
    if version < LIBRARY_SCHEMA_VERSION:
        del data["gates"]
    if version < LATEST_SCHEMA_VERSION:
        del data["moe"]
        drop_late_fields(data["router"])
    if version >= GATED_SCHEMA_VERSION:
        return
    del data["shared"]
    for name in ("mode", "scale", "mask_lambda", "directions") if data["extract"] else ():
        del data["extract"][name]


def bundle_digest(
    dense: Mapping[str, str], sparse: Mapping[str, Mapping[str, str]], shared: Mapping[str, str] | None = None
) -> str:
    """Digest a bundle's numbers, however they are shared among files: SHA-256 over lines `digest  name`.

    First the dense tensors, sorted by name, then those of the sparse experts as `experts/<expert>/<tensor>`, sorted
    by expert and name, then the arrays that experts share as `shared/<tensor>`.
    """
    lines = [f"{digest}  {name}\n" for name, digest in sorted(dense.items())]
    for expert, tensors in sorted(sparse.items()):
        lines += [f"{digest}  {EXPERTS_FOLDER}/{expert}/{name}\n" for name, digest in sorted(tensors.items())]
    lines += [f"{digest}  shared/{name}\n" for name, digest in sorted((shared or {}).items())]
    return sha256("".join(lines))


def read_record(file: Path, model: type[M], kind: str) -> M:
    """Read a JSON file into a record; raise BundleError naming the first field that does not fit."""
    try:
        data = read_json(file)
        if data.get("schema_version") == SCHEMA_VERSION - 1:
            message = f"is a {kind} of version {SCHEMA_VERSION - 1}, written by an older mediator"
            raise BundleError(Problem(str(file), message, "merge again" if model is Manifest else "measure it again"))
        return model.model_validate(data)
    except CheckpointError as error:
        raise BundleError(error.problems) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = f"{file} {'.'.join(str(part) for part in first['loc'])}"
        hint = "the file is damaged or written by a newer version"
        raise BundleError(Problem(place, f"not a {kind}: {first['msg'].lower()}", hint)) from None


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a bundle, the names of its files included."""
    file = folder / MANIFEST
    if not file.is_file():
        raise BundleError(Problem(str(folder), *_no_bundle(folder)))
    manifest = read_record(bundle_file(folder, MANIFEST), Manifest, "manifest")
    for name in [*file_names(manifest), *(tensor.file for tensor in manifest.tensors.values())]:
        bundle_file(folder, name)
    return manifest


def _no_bundle(folder: Path) -> tuple[str, str]:
    """Say what a folder without a manifest is, and what to do."""
    if not folder.is_dir():
        return "no such folder", "check the path"
    message = f"has no {MANIFEST}"
    if (folder / "adapter_config.json").is_file():
        return message, "it is an adapter; use it with PEFT, or as an expert of a recipe"
    return message, "is it a bundle? `mediator merge` writes one"


def file_names(manifest: Manifest) -> list[str]:
    """List all files that a manifest names, with their paths in the bundle."""
    shared = [] if manifest.shared is None else [manifest.shared]
    experts: list[SparseRecord | SharedRecord] = [*manifest.sparse, *shared]
    weights = [*manifest.shards, *(file for record in experts for file in record.files)]
    router = manifest.router.file if manifest.router is not None else None
    gates = manifest.gates.file if manifest.gates is not None else None
    others = [*manifest.files, *(file for file in (router, gates) if file is not None)]
    return [file.name for file in weights] + [file.name for file in others]


def bundle_file(folder: Path, name: str) -> Path:
    """Return the path of a bundle's file; raise BundleError if the name or a link leads out of the bundle."""
    try:
        for part in name.split("/"):
            check_plain_name(str(folder / MANIFEST), part)
    except CheckpointError:
        message = f"unsafe file name {name!r}"
        raise BundleError(Problem(str(folder / MANIFEST), message, "do not use this bundle")) from None
    path, whole = folder / name, folder.resolve()
    # In the Hub's cache a snapshot is a folder of links to the repository's blobs.
    inside = (whole, whole.parent.parent / "blobs") if whole.parent.name == "snapshots" else (whole,)
    if not any(path.resolve().is_relative_to(place) for place in inside):
        raise BundleError(Problem(str(path), "is a link that leads out of the bundle", "do not use this bundle"))
    return path
