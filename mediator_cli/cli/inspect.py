"""`mediator inspect`: headers, configs and manifests alone; never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediator_cli.cli.options import JsonOption, OfflineOption
from mediator_cli.cli.output import print_json, print_table, say
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.bundle.gates_record import GatesRecord
    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.hub.repo import HubRepo


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            help="A bundle, a checkpoint or an adapter: a folder, a URL, or ORG/NAME on the Hub.",
            metavar="SOURCE",
            show_default=False,
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a source holds: tensors, dtypes, sizes; for a bundle also assignment, experts and lineage."""
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.checkpoint.source import find_location

    location = find_location(source, Path(source).absolute(), Access(offline))
    # A folder is shown as it was written, not by its long path.
    folder = Path(source) if location.folder == Path(source).absolute() else location.folder
    facts = describe(folder, location.repo) | ({"path": location.shown} if location.remote else {})
    if as_json:
        print_json(facts)
        return
    say(f"{source}: {facts['kind']}, {facts['n_tensors']} tensors, {human_bytes(facts['bytes'])}")
    if tensors:
        rows = [
            (t["name"], t["dtype"], _shape(t["shape"]), human_bytes(t["bytes"]), t["file"]) for t in facts["tensors"]
        ]
        print_table(("tensor", "dtype", "shape", "bytes#", "file"), rows)
    else:
        rows = [
            (g["kind"], str(g["n_tensors"]), g["dtype"], _shape(g["shape"]), human_bytes(g["bytes"]))
            for g in facts["groups"]
        ]
        print_table(("tensors", "count#", "dtype", "shape", "bytes#"), rows)
    if facts["commit"]:
        say(f"commit        {facts['commit']}")
    if facts["config"]:
        say("config        " + ", ".join(f"{name}={value}" for name, value in facts["config"].items()))
    if facts["kind"] == "bundle":
        _print_bundle(folder, location.shown if location.remote else None)


def describe(folder: Path, repo: HubRepo | None = None) -> dict[str, Any]:
    """Gather the facts of a folder, or of a repository whose weights may still be on the Hub, from headers alone."""
    from mediator_cli.bundle.manifest import MANIFEST, read_manifest
    from mediator_cli.checkpoint.header import read_json
    from mediator_cli.checkpoint.hub.find import read_far_header
    from mediator_cli.checkpoint.source import is_adapter, look_at

    kind = "bundle" if (folder / MANIFEST).is_file() else "LoRA adapter" if is_adapter(folder) else "checkpoint"
    if kind == "LoRA adapter":
        found = {info.name: info for info in read_far_header(folder / "adapter_model.safetensors", repo).tensors}
        config = read_json(folder / "adapter_config.json")
        shown = {name: config.get(name) for name in ("peft_type", "r", "lora_alpha", "base_model_name_or_path")}
    else:
        checkpoint = look_at(folder, repo)
        found, config = dict(checkpoint.tensors), dict(checkpoint.config)
        names = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "tie_word_embeddings")
        shown = {name: config[name] for name in names if name in config}
    return {
        "path": repo.source if repo else str(folder),
        "commit": repo.commit if repo else None,
        "kind": kind,
        "n_tensors": len(found),
        "bytes": sum(info.n_bytes for info in found.values()),
        "config": shown,
        "groups": _groups(found),
        "tensors": [
            {"name": i.name, "dtype": i.dtype, "shape": list(i.shape), "bytes": i.n_bytes, "file": i.file.name}
            for i in found.values()
        ],
        "manifest": read_manifest(folder).model_dump(mode="json") if kind == "bundle" else None,
    }


def _groups(tensors: Mapping[str, TensorInfo]) -> list[dict[str, Any]]:
    """Gather tensors of the same module, dtype and shape over all layers."""
    from mediator_cli.checkpoint.layout import place_of

    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorInfo]] = {}
    for info in tensors.values():
        place = place_of(info.name)
        name = ".".join([*(["*"] if place.layer else []), *place.modules, place.parameter])
        groups.setdefault((name, info.dtype, info.shape), []).append(info)
    return [
        {"kind": k, "dtype": d, "shape": list(s), "n_tensors": len(g), "bytes": sum(i.n_bytes for i in g)}
        for (k, d, s), g in groups.items()
    ]


def _shape(shape: list[int]) -> str:
    return " × ".join(str(side) for side in shape) or "()"


def _stored_as(manifest: Manifest) -> str:
    """Tell how experts are stored that are not sparse, what they share, and what they have of their own."""
    extract = manifest.extract
    own = sum(file.bytes for record in manifest.sparse for file in record.files)
    text = f"{human_bytes(own)} of their own"
    if extract is not None:
        named = {"scale": extract.scale, "mask_lambda": extract.mask_lambda, "directions": extract.directions}
        given = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
        text = f"mode {extract.mode}{f' ({given})' if given else ''}, {text}"
    if manifest.shared is None:
        return text
    stored = f" as {extract.values}" if extract is not None else ""
    return f"{text}, {human_bytes(sum(file.bytes for file in manifest.shared.files))} shared by the experts{stored}"


def _gated_by(gates: GatesRecord) -> str:
    """Tell how gates inside the model choose."""
    rule = gates.rule
    kept = f"the best {rule.top_k}" if rule.top_k and rule.top_k < len(gates.experts) else "all"
    where = "each matrix" if rule.at == "module" else "each layer"
    size = human_bytes(gates.file.bytes)
    return f"{gates.method}: {kept} of {len(gates.experts)} experts for each {rule.per}, at {where}, {size}"


def _print_bundle(folder: Path, url: str | None) -> None:
    from mediator_cli.bundle.manifest import SCHEMA_VERSION, read_manifest
    from mediator_cli.cli.merge import print_bundle
    from mediator_cli.cli.output import shown_folder

    manifest = read_manifest(folder)
    print_bundle(url or shown_folder(folder), manifest)
    for method in manifest.methods:
        parameters = ", ".join(f"{name}={value}" for name, value in method.parameters.items())
        say(f"method        {method.method}({parameters}) on {method.n_tensors} tensors")
    if manifest.extract is not None and manifest.schema_version != SCHEMA_VERSION:
        say(f"experts       {_stored_as(manifest)}")
    if manifest.gates is not None:
        say(f"gates         {_gated_by(manifest.gates)}")
    sources = [manifest.base, *manifest.experts]
    rows = [
        (
            s.name,
            s.kind,
            s.path,
            "" if s.weight is None else str(s.weight),
            s.license or "not declared",
            s.files[0].digest[:12] if s.files else "",
        )
        for s in sources
    ]
    print_table(("source", "kind", "from", "weight#", "licence", "digest"), rows)
    for change in manifest.history:
        say(f"changed       {change.source.name} {change.change}; router: {change.router}")
    changes = f", changed by {', '.join(manifest.recipe.changes)}" if manifest.recipe.changes else ""
    say(f"recipe        {manifest.recipe.name} {manifest.recipe.sha256[:12]}{changes}")
    say(f"digest        {manifest.digest}")
