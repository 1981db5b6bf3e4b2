"""GGUF files as a source: dequantised once into a folder of safetensors in the user's cache, and reused from there.

What quantisation took away stays lost; the notice says so. The packages that read GGUF are imported when one is opened.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import re
import struct
import sys
import tempfile
from collections import Counter
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.cache import cache_folder
from mediator_cli.checkpoint.formats import refuse_pointers
from mediator_cli.checkpoint.header import read_json, unreadable
from mediator_cli.errors import CheckpointError, OutputError, Problem, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

_RECORD = "dequantised.json"
_FORMAT = 1
"""Raise it when the same GGUF is to be converted anew."""
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_INSTALL = "pip install 'mediator-merge[gguf]'"
_DAMAGED = "the file is damaged, or holds what transformers cannot read; fetch it again, or use the float checkpoint"
# What transformers and gguf raise on files that they cannot read. Anything else is a defect of this program.
_BROKEN = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, NotImplementedError, AssertionError,
    ArithmeticError, MemoryError, EOFError, struct.error,
)  # fmt: skip


def find_gguf(folder: Path) -> Path | None:
    """Find the GGUF file of a folder without other weights; raise CheckpointError where there are several."""
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    if len(files) > 1 and not _PART.search(files[0].name):
        names = ", ".join(file.name for file in files)
        hint = f"name one of them, e.g. {files[0]}"
        raise CheckpointError(Problem(str(folder), f"holds several GGUF files: {names}", hint))
    return files[0]


def open_gguf(file: Path) -> Path:
    """Dequantise a GGUF file into the user's cache and give that folder; a folder made earlier is used again.

    Raises CheckpointError when the file cannot be read, OutputError when the cache cannot be written.
    """
    if _PART.search(file.name):
        hint = f"join the parts first: llama-gguf-split --merge {file.name} joined.gguf"
        raise CheckpointError(Problem(str(file), "is one part of a split GGUF", hint))
    refuse_pointers([file])
    folder = cache_root() / _key(file)
    if (folder / _RECORD).is_file():
        return folder
    _check_packages(file)
    kinds = _read_kinds(file)
    with _draft(folder) as draft, _bars_on_terminals_only():
        tokenizer = _convert(file, draft, _float_dtype(kinds))
        record = {"file": str(file.resolve()), "stored_as": kinds, "no_tokenizer": tokenizer}
        (draft / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def gguf_notice(folder: Path) -> str | None:
    """Say of a folder made from a GGUF file what it was made from and what that means; None for other folders."""
    if not (folder / _RECORD).is_file():
        return None
    record = read_json(folder / _RECORD)
    kinds: dict[str, int] = record["stored_as"]
    stored = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    lossy = any(not kind.startswith(("F", "BF")) for kind in kinds)
    loss = "quantisation is lossy, and what it took away is merged as if it were training" if lossy else "nothing lost"
    missing = f"; its tokenizer could not be rebuilt: {record['no_tokenizer']}" if record["no_tokenizer"] else ""
    return f"{record['file']} is a GGUF ({stored} tensors), dequantised into {folder}: {loss}{missing}"


def cache_root() -> Path:
    """Give the folder of all dequantised files."""
    return cache_folder() / "dequantised"


def _key(file: Path) -> str:
    try:
        facts = file.stat()
    except OSError as error:
        raise unreadable(file, error) from None
    parts = [_FORMAT, str(file.resolve()), facts.st_size, facts.st_mtime_ns, version("transformers")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _check_packages(file: Path) -> None:
    for package in ("gguf", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise CheckpointError(Problem(str(file), f"reading GGUF needs the package {package}", _INSTALL)) from None


def _read_kinds(file: Path) -> dict[str, int]:
    """Count the file's tensors by how they are stored, most frequent first."""
    from gguf import GGUFReader  # noqa: PLC0415 - optional

    with _readable(file):
        reader = GGUFReader(file)
        return dict(Counter(tensor.tensor_type.name for tensor in reader.tensors).most_common())


def _float_dtype(kinds: dict[str, int]) -> str:
    """Choose the narrowest dtype that keeps what the file holds; the scales of quantised blocks are float16."""
    if set(kinds) == {"F32"}:
        return "float32"
    return "bfloat16" if set(kinds) <= {"F32", "BF16"} else "float16"


def _convert(file: Path, folder: Path, dtype: str) -> str | None:
    """Write model and tokenizer as transformers understands them; say why where there is no tokenizer."""
    import transformers  # noqa: PLC0415 - takes seconds

    loader: Any = transformers.AutoModelForCausalLM

    how: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    # Before GgufConfig existed, transformers always dequantised.
    config = getattr(transformers, "GgufConfig", None)
    asked = {"quantization_config": config(dequantize=True)} if config else {}
    with _readable(file):
        model, report = loader.from_pretrained(str(file.parent), **how, **asked, dtype=dtype, output_loading_info=True)
        _check_complete(file, report)
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(_shortest_floats(read_json(config_file)), indent=2) + "\n", encoding="utf-8")
    try:
        transformers.AutoTokenizer.from_pretrained(str(file.parent), **how).save_pretrained(folder)
    except (*_BROKEN, OSError) as error:
        return first_line(error)
    return None


def _check_complete(file: Path, report: dict[str, Any]) -> None:
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(what) or ())):
            message = f"{len(names)} tensors of the model are not in the file as expected, e.g. {names[0]}"
            raise CheckpointError(Problem(str(file), message, _DAMAGED))


def _shortest_floats(value: Any) -> Any:  # noqa: ANN401 - parsed JSON
    """Undo the detour of settings through float32, so that 1e-05 is not 9.999999747378752e-06."""
    if isinstance(value, dict):
        return {key: _shortest_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortest_floats(item) for item in value]
    if not isinstance(value, float) or struct.unpack("f", struct.pack("f", value))[0] != value:
        return value
    digits = (float(f"{value:.{n}g}") for n in range(1, 10))
    return next(short for short in digits if struct.pack("f", short) == struct.pack("f", value))


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what the readers of other packages raise into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(Problem(str(file), f"cannot read the GGUF: {first_line(error)}", _DAMAGED)) from None
    except _BROKEN as error:
        raise CheckpointError(Problem(str(file), f"cannot read the GGUF: {first_line(error)}", _DAMAGED)) from None


def _bars_on_terminals_only() -> AbstractContextManager[object]:
    """Keep the bars of transformers out of files and pipes; what is wrong is raised, not printed."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `folder` at the end, or disappears when anything fails."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temporary:
            draft = Path(temporary) / folder.name
            draft.mkdir()
            yield draft
            # Another run may have finished the same file meanwhile; either copy will do.
            if not folder.exists():
                draft.rename(folder)
    except OSError as error:
        hint = "free some space, or point MEDIATOR_CACHE at another folder"
        reason = (error.strerror or str(error)).lower()
        raise OutputError(Problem(str(folder.parent), f"cannot write: {reason}", hint)) from None
