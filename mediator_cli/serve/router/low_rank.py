"""LoRA adapters by their factors: read, compared, and concatenated into one adapter of a mixture.

Σ p·B·A is one product: the A's stacked, and the B's scaled by p beside each other. Averages of factors are not that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.bundle.adapter import SAFE_RANKS
from mediator_cli.checkpoint.header import read_header, read_json
from mediator_cli.checkpoint.read import open_files, read_slab, widen
from mediator_cli.checkpoint.write import sync_tree, write_error
from mediator_cli.errors import BundleError, CheckpointError, Problem
from mediator_cli.runtime.arrays_file import write_arrays

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.header import TensorInfo

    Floats32 = NDArray[np.float32]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PATTERNS = ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "lora_bias")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter on disk: factors A [rank, in], B [out, rank] by module, `scale` of their product, its digest."""

    folder: Path
    config: Mapping[str, Any]
    factors: Mapping[str, tuple[TensorInfo, TensorInfo]]
    scale: float
    digest: str

    def read(self, module: str) -> tuple[Floats32, Floats32]:
        """Read the factors of a module as float32."""
        a, b = self.factors[module]
        return _read(a), _read(b)


def open_adapter(folder: Path) -> Adapter:
    """Open an adapter as `mediator export --to lora` writes them.

    Raises BundleError when it is damaged, or more than factors with one rank and scale.
    """
    try:
        config = read_json(folder / CONFIG)
        infos = {info.name: info for info in read_header(folder / WEIGHTS).tensors}
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except CheckpointError as error:
        raise BundleError(error.problems) from None
    except OSError as error:
        raise BundleError(Problem(str(folder), f"cannot be read: {error.strerror}", "check the path")) from None
    modules = sorted(name.removesuffix(_A) for name in infos if name.endswith(_A))
    others = set(infos) - {module + end for module in modules for end in (_A, _B)}
    odd = [name for name in _PATTERNS if config.get(name)] + sorted(others)
    if odd or not modules or any(module + _B not in infos for module in modules):
        message = f"has {odd[0]}, which no mixture can have" if odd else "has no pairs of factors"
        raise BundleError(Problem(str(folder), message, "write adapters with `mediator export DIR --to lora`"))
    return Adapter(folder, config, {one: (infos[one + _A], infos[one + _B]) for one in modules}, _scale(config), digest)


def _scale(config: Mapping[str, Any]) -> float:
    rank = float(config["r"])
    return float(config.get("lora_alpha") or rank) / (rank**0.5 if config.get("use_rslora") else rank)


def gram(adapters: Sequence[Adapter]) -> NDArray[np.float64]:
    """Give the inner products ⟨Δi, Δj⟩ [adapters, adapters] over all modules, from factors alone: no Δ is built."""
    found = np.zeros((len(adapters), len(adapters)))
    for module in sorted({module for adapter in adapters for module in adapter.factors}):
        own = [(at, *adapter.read(module)) for at, adapter in enumerate(adapters) if module in adapter.factors]
        for at, a, b in own:
            for other, c, d in own:
                # trace((BA)ᵀ DC) = Σ (BᵀD) ∘ (ACᵀ)
                inner = (b.T.astype(np.float64) @ d) * (a.astype(np.float64) @ c.T)
                found[at, other] += adapters[at].scale * adapters[other].scale * float(inner.sum())
    return found


def safe_rank(rank: int) -> int:
    """Give the least rank of SAFE_RANKS that holds so many directions; raise BundleError where none does."""
    found = next((safe for safe in SAFE_RANKS if safe >= rank), None)
    if found is None:
        hint = "export the adapters with a smaller --rank, or serve with --mixtures top1"
        raise BundleError(Problem("rank", f"{rank} is more than the {SAFE_RANKS[-1]} that vLLM takes", hint))
    return found


def concatenate(parts: Sequence[tuple[Adapter, float]], target: Path) -> None:
    """Write the adapter of Σ weight · Δ; nothing is done where it stands already, since names tell contents.

    Raises BundleError where the ranks are too many together, OutputError when the disk refuses.
    """
    if (target / CONFIG).is_file():
        return
    rank = safe_rank(sum(int(adapter.config["r"]) for adapter, _ in parts))
    modules = sorted({module for adapter, _ in parts for module in adapter.factors})
    arrays = {name: array for module in modules for name, array in _joined(parts, module, rank)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            building.chmod(0o755)
            write_arrays(building / WEIGHTS, arrays, {"format": "pt"})
            (building / CONFIG).write_text(json.dumps(_config(parts, modules, rank), indent=1), encoding="utf-8")
            sync_tree(building)
            building.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        # Another process may have been first, with the same bytes.
        if not (target / CONFIG).is_file():
            raise write_error(target, error) from None


def _joined(parts: Sequence[tuple[Adapter, float]], module: str, rank: int) -> Iterator[tuple[str, Floats32]]:
    """Give the factors of a mixture in a module, padded with zeros up to a rank."""
    read = [(*adapter.read(module), weight * adapter.scale) for adapter, weight in parts if module in adapter.factors]
    a = np.zeros((rank, read[0][0].shape[1]), np.float32)
    b = np.zeros((read[0][1].shape[0], rank), np.float32)
    start = 0
    for own_a, own_b, weight in read:
        stop = start + len(own_a)
        a[start:stop], b[:, start:stop] = own_a, np.float32(weight) * own_b
        start = stop
    yield module + _A, a
    yield module + _B, b


def _config(parts: Sequence[tuple[Adapter, float]], modules: Sequence[str], rank: int) -> dict[str, Any]:
    own = {"r": rank, "lora_alpha": rank, "use_rslora": False, "inference_mode": True}
    targets = sorted({module.rpartition(".")[2] for module in modules})
    return {**parts[0][0].config, **own, "target_modules": targets}


def _read(info: TensorInfo) -> Floats32:
    try:
        with open_files([info.file]) as handles:
            stored = read_slab(handles, info, 0, info.size)
    except CheckpointError as error:
        raise BundleError(error.problems) from None
    out = np.empty(info.size, np.float32)
    widen(stored, info.dtype, out)
    return out.reshape(info.shape)
