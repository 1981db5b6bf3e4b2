"""What every export shares: bundles that can be exported, the files beside the weights, the card, the report."""

from __future__ import annotations

import errno
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mediator_cli.bundle.lineage import card_facts, parents_of, with_facts, with_lineage
from mediator_cli.bundle.manifest import CONFLICTS, EXPERTS_FOLDER, bundle_file
from mediator_cli.bundle.read import read_bundle
from mediator_cli.checkpoint.remote.url import is_url
from mediator_cli.checkpoint.write import write_error
from mediator_cli.engine.publish import check_output, publish
from mediator_cli.errors import BundleError, OutputError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pydantic import BaseModel

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.bundle.read import Bundle
    from mediator_cli.export.settings import Run

CARD, REPORT = "README.md", "export.json"


def open_for_export(folder: Path) -> Bundle:
    """Open a bundle; raise BundleError where it is a Mixture of Experts, which is a checkpoint as it lies."""
    bundle = read_bundle(folder)
    if bundle.manifest.moe is not None:
        message = "is a Mixture of Experts, which stock software loads as it is"
        raise BundleError(Problem(str(folder), message, "use the folder itself"))
    return bundle


def check_experts(bundle: Bundle) -> None:
    """Raise BundleError where a bundle holds no sparse experts."""
    if not bundle.experts:
        hint = "it is one dense model: export it with --to dense --static, or use the folder as it is"
        raise BundleError(Problem(str(bundle.path), "no unit is routed, so it has no experts to export", hint))


def chosen_experts(bundle: Bundle, names: Sequence[str]) -> tuple[str, ...]:
    """Give the experts named, all where none is; raise BundleError for unknown names."""
    known = [source.name for source in bundle.manifest.experts]
    unknown = [name for name in names if name not in known]
    if unknown:
        place = str(bundle.path)
        raise BundleError([Problem(place, f"no expert '{name}'", did_you_mean(name, known)) for name in unknown])
    return tuple(dict.fromkeys(names)) or tuple(known)


def losses(manifest: Manifest) -> Iterator[str]:
    """Say what of the bundle's behaviour no export of weights carries."""
    policy = manifest.router.policy if manifest.router is not None else None
    if policy is not None and policy.combine != "parameters":
        yield (
            f"the bundle's policy runs several experts apart and averages their {policy.combine}: that does not travel"
        )
    if manifest.gates is not None:
        yield f"gates inside the model ({manifest.gates.method}) choose among the experts: they do not travel"


@contextmanager
def building(target: Path, run: Run, key: str) -> Iterator[Path]:
    """Give a folder that becomes `target` when all went well; a full disk is an OutputError, and nothing stays."""
    if is_url(str(target)):
        raise OutputError(Problem("--output", "an export is written into a folder", "choose one, then copy it"))
    target = target.absolute()
    check_output(target, run.mode)
    try:
        with publish(target, run.mode, {"export": key}) as place:
            yield place.folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise write_error(target, error) from None
        raise


def copy_side_files(bundle: Bundle, folder: Path, *, config: bool = True) -> tuple[str, ...]:
    """Copy config, generation config, tokenizer and template of the dense expert; return their names.

    Raises BundleError where the manifest names a file that is not there.
    """
    left_out = {CARD, CONFLICTS, *(() if config else ("config.json", "generation_config.json"))}
    names = [file.name for file in bundle.manifest.files if file.name not in left_out]
    names = [name for name in names if not name.startswith(f"{EXPERTS_FOLDER}/")]
    for name in names:
        source, copy = bundle_file(bundle.path, name), folder / name
        if not source.is_file():
            message = "is missing, and the manifest names it"
            raise BundleError(Problem(str(source), message, "the bundle is damaged; fetch it or merge again"))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return tuple(names)


def write_card(bundle: Bundle, folder: Path, title: str, lines: Iterable[str], *, tags: Sequence[str]) -> None:
    """Write a model card: what it is, how it is loaded, the parents with their licences, the recipe."""
    manifest = bundle.manifest
    parents = parents_of((manifest.base, *manifest.experts))
    recipe = ["Recipe of the bundle:", "", "```yaml", manifest.recipe.text.rstrip("\n"), "```"]
    text = "\n".join([f"# {title}", "", *lines, *recipe]) + "\n"
    library = "peft" if "lora" in tags or "shira" in tags else "transformers"
    facts = {"library_name": library, "tags": [*tags, "merge", "mediator"], **card_facts(parents)}
    (folder / CARD).write_text(with_facts(with_lineage(text, parents), facts), encoding="utf-8")


def write_report(folder: Path, report: BaseModel) -> None:
    """Write what an export came to beside its files."""
    (folder / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """Count the bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def made_by(bundle: Bundle) -> str:
    """Say on a card which bundle it is of."""
    return f"Exported by mediator from a bundle with digest `{bundle.manifest.digest[:16]}`."
