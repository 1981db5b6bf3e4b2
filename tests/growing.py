"""Bundles of experts a and b, a third expert to add, and the bundle merged of all three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import Workshop, add_prompts, fine_tune, make_workshop, with_prompts, write_checkpoint
from tiny_tokens import WORDS, task_prompts, word_tokenizer, write_prompts

from mediator_cli.bundle.digest import digest_tensors, file_digest, sparse_digests
from mediator_cli.bundle.factors import write_factors
from mediator_cli.bundle.manifest import (
    LIBRARY_SCHEMA_VERSION,
    MANIFEST,
    SparseRecord,
    SparseUnitRecord,
    bundle_digest,
    read_manifest,
    to_json,
)
from mediator_cli.bundle.sparse_file import open_sparse_file
from mediator_cli.checkpoint.adapter.factors import read_factors
from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.header import read_tensors

SPARSE: dict[str, Any] = {
    "assign": {"rule": "all"},
    "extract": {"dense": "base", "density": 0.3, "values": "int8"},
}
RIDGE = {"classifier": "ridge"}
SMALL = tuple(WORDS[15:])
"""The words of the third task: and, the, is, a, of."""


def growing_workshop(folder: Path) -> Workshop:
    """Make a workshop with a third expert c, with prompts of its own task."""
    shop = add_prompts(make_workshop(folder))
    write_checkpoint(folder / "c", fine_tune(shop.base, 7))
    (folder / "c" / "chat_template.jinja").unlink()
    word_tokenizer().save_pretrained(folder / "c")
    write_prompts(folder / "c.jsonl", task_prompts(SMALL))
    return shop


def low_rank(shop: Workshop, name: str, *adapters: str, **fields: Any) -> Path:
    """Make a bundle of adapters of the base that are stored as they are, as factors."""
    experts = [{"name": each, "model": f"./{each}"} for each in adapters]
    bundle = shop.merge(name, experts=experts, **(SPARSE | fields))
    manifest = read_manifest(bundle)
    records = []
    for old in manifest.sparse:
        (file,) = old.files
        (bundle / file.name).unlink()
        adapter = open_adapter(shop.folder / old.expert, read_tensors(bundle))
        write_factors(bundle / file.name, old.expert, read_factors(adapter))
        sparse = open_sparse_file(bundle / file.name)
        arrays = digest_tensors(sparse.arrays)
        known = file.model_copy(update={"bytes": sparse.file.stat().st_size, "xxh3": file_digest(sparse.file, arrays)})
        own = sparse_digests(sparse, arrays)
        units = {unit: kept for unit, kept in old.units.items() if any(n.startswith(f"{unit}.") for n in own)}
        kept = {
            unit: SparseUnitRecord(n_kept=size, n_entries=size, energy=1.0)
            for unit in units
            if (size := sum(s.size for n, s in sparse.tensors.items() if n.startswith(f"{unit}.")))
        }
        records.append(SparseRecord(expert=old.expert, files=(known,), tensors=own, units=kept))
    dense = {tensor: record.xxh3 for tensor, record in manifest.tensors.items()}
    new = manifest.model_copy(
        update={
            "schema_version": LIBRARY_SCHEMA_VERSION,
            "sparse": tuple(records),
            "extract": manifest.extract.model_copy(update={"mode": "factors", "values": "factors"}),
            "sizes": manifest.sizes.model_copy(update={"sparse": sum(r.files[0].bytes for r in records)}),
            "digest": bundle_digest(dense, {record.expert: record.tensors for record in records}),
        }
    )
    (bundle / MANIFEST).write_text(to_json(new))
    return bundle


def merged(shop: Workshop, name: str, *experts: str, **fields: Any) -> Path:
    """Merge some of the experts, with a router as asked for; with `router=None` without prompts and router."""
    wanted = with_prompts(*experts)
    if fields.get("router", RIDGE) is None:
        wanted = [{"name": each["name"], "model": each["model"]} for each in wanted]
        del fields["router"]
    return shop.merge(name, experts=wanted, **(SPARSE | fields))
