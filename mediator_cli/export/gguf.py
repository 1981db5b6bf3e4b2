"""A bundle for llama.cpp: its dense model and an adapter an expert, through the converters of llama.cpp itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from mediator_cli.errors import OutputError, Problem
from mediator_cli.export.dense import check_mixture, told, write_dense
from mediator_cli.export.folder import building, chosen_experts, folder_bytes, made_by, write_card, write_report
from mediator_cli.export.lora import LoraJob, check_lora, write_lora
from mediator_cli.export.report import ExpertReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.bundle.read import Bundle
    from mediator_cli.export.report import AdapterReport
    from mediator_cli.export.settings import Run

MODEL, ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
OUT_TYPES = ("f16", "bf16", "f32", "q8_0")
VARIABLE = "LLAMA_CPP"
_WORK = ".work"
_HINT = f"give --converter FOLDER of llama.cpp's source, or set {VARIABLE}"


@dataclass(frozen=True)
class Converter:
    """llama.cpp's converters and the Python that runs them; `adapter` is None where only the model's is there."""

    model: Path
    adapter: Path | None
    python: str = sys.executable


@dataclass(frozen=True)
class GgufJob:
    """What to convert: a mixture alone, {} is the dense expert; with `lora` the dense expert and its adapters."""

    mixture: Mapping[str, float] = field(default_factory=dict)
    lora: LoraJob | None = None
    out_type: str = "f16"
    timeout: float = 3600


class GgufReport(BaseModel):
    """What was written; `experts` are those of the adapters, whose `folder` is the name of a file."""

    model_config = ConfigDict(frozen=True)

    format: str = "gguf"
    folder: str
    bundle: str
    model: str
    mixture: dict[str, float]
    out_type: str
    rank: int = 0
    experts: tuple[ExpertReport, ...] = ()
    bytes: int
    notices: tuple[str, ...] = ()


def find_converter(given: Path | None, python: str | None = None) -> Converter:
    """Find llama.cpp's converters: where the user says, else where LLAMA_CPP says, else on PATH.

    Raises OutputError where there are none, naming what was looked at.
    """
    place = given or (Path(found) if (found := os.environ.get(VARIABLE)) else None)
    if place is None:
        on_path = shutil.which(MODEL)
        if on_path is None:
            message = f"no converter of llama.cpp: {VARIABLE} is not set, and {MODEL} is not on PATH"
            raise OutputError(Problem("--converter", message, _HINT))
        place = Path(on_path)
    file = (place / MODEL if place.is_dir() else place).absolute()
    if not file.is_file():
        source = "--converter" if given else VARIABLE
        raise OutputError(Problem(source, f"{file} is not there", _HINT))
    beside = file.with_name(ADAPTER)
    return Converter(file, beside if beside.is_file() else None, python or sys.executable)


def export_gguf(bundle: Bundle, target: Path, job: GgufJob, converter: Converter, run: Run) -> GgufReport:
    """Write model.gguf, and with `job.lora` one adapter an expert; all appear together or not at all.

    Raises OutputError where a converter fails or takes longer than `job.timeout` seconds.
    """
    _check(bundle, job, converter)
    with building(target, run, f"gguf {job!r} {bundle.manifest.digest}") as folder:
        work = folder / _WORK
        work.mkdir()
        dense, adapters = work / "model", work / "adapters"
        dense.mkdir()
        written = write_dense(bundle, dense, job.mixture, run)
        _convert(converter.python, converter.model, dense, folder / "model.gguf", job, run)
        found = _adapters(bundle, adapters, dense, folder, job, converter, run)
        shutil.rmtree(work)
        _card(bundle, folder, target.name, job)
        report = GgufReport(
            folder=str(target.absolute()),
            bundle=bundle.manifest.digest,
            model="model.gguf",
            mixture=dict(job.mixture),
            out_type=job.out_type,
            rank=found.rank if found else 0,
            experts=tuple(_as_file(each, folder) for each in found.experts) if found else (),
            bytes=folder_bytes(folder),
            notices=tuple(dict.fromkeys((*written.notices, *(found.notices if found else ())))),
        )
        write_report(folder, report)
    return report


def _check(bundle: Bundle, job: GgufJob, converter: Converter) -> None:
    check_mixture(bundle, job.mixture)
    if job.lora is None:
        return
    check_lora(bundle, job.lora)
    if converter.adapter is None:
        message = f"has no {ADAPTER} beside it, and the experts are to become adapters"
        raise OutputError(Problem(str(converter.model), message, f"{_HINT}; --static leaves the experts out"))


def _adapters(
    bundle: Bundle, scratch: Path, dense: Path, folder: Path, job: GgufJob, converter: Converter, run: Run
) -> AdapterReport | None:
    if job.lora is None or converter.adapter is None:
        return None
    scratch.mkdir()
    found = write_lora(bundle, scratch, job.lora, run)
    for name in chosen_experts(bundle, job.lora.experts):
        more = ("--base", str(dense))
        _convert(converter.python, converter.adapter, scratch / name, folder / f"{name}.gguf", job, run, more)
        shutil.rmtree(scratch / name)
    return found


def _convert(
    python: str, script: Path, source: Path, file: Path, job: GgufJob, run: Run, more: Sequence[str] = ()
) -> None:
    """Run one of llama.cpp's scripts in a process of its own, which never outlives the time it may take."""
    stage = f"convert {file.name}"
    size = folder_bytes(source)
    run.progress(stage, 0, size)
    out_type = "f16" if job.out_type == "q8_0" and more else job.out_type
    command = [python, str(script), str(source), "--outfile", str(file), "--outtype", out_type, *more]
    try:
        # Its own environment but for what would make it ask the Hub, or take packages of this program.
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_LOCAL_GGUF": os.environ.get("NO_LOCAL_GGUF", "")}
        env = {name: value for name, value in env.items() if value}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=job.timeout, check=False, env=env, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        message = f"took longer than {job.timeout:g} s for {file.name}, and was stopped"
        raise OutputError(Problem(str(script), message, "give --timeout SECONDS")) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        hint = "give --python PROGRAM, that of an environment with torch, gguf and transformers"
        raise OutputError(Problem(python, f"cannot be run: {reason}", hint)) from None
    if done.returncode or not file.is_file() or not file.stat().st_size:
        raise OutputError(Problem(str(script), f"failed on {file.name}: {_last_line(done)}", _next_step(done.stderr)))
    run.progress(stage, size, size)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with {done.returncode} and wrote no file"


def _next_step(text: str) -> str:
    if "ModuleNotFoundError" in text:
        return "give --python PROGRAM, that of an environment with the packages that llama.cpp's converter needs"
    if "not supported" in text or "NotImplementedError" in text:
        return "this converter does not know the model; take a newer llama.cpp, or export --to dense"
    return "run the converter by hand on an export --to dense to see all that it says"


def _as_file(report: ExpertReport, folder: Path) -> ExpertReport:
    file = f"{report.name}.gguf"
    return report.model_copy(update={"folder": file, "bytes": (folder / file).stat().st_size})


def _card(bundle: Bundle, folder: Path, title: str, job: GgufJob) -> None:
    lines = [
        f"A bundle for llama.cpp: `model.gguf` is {told(job.mixture)}, as {job.out_type}. {made_by(bundle)}",
        "",
    ]
    if job.lora is not None:
        names = chosen_experts(bundle, job.lora.experts)
        flags = " ".join(f"--lora {name}.gguf" for name in names)
        lines += [
            "The other files are the experts as adapters. A request mixes them by a list `lora` of id and scale,",
            f"by their order in the command line, here {', '.join(f'{n} {name}' for n, name in enumerate(names))}.",
            "",
            "```sh",
            f"llama-server -m model.gguf {flags} --lora-init-without-apply",
            "```",
            "",
        ]
    write_card(bundle, folder, title, lines, tags=("gguf",))
