"""Parameters of a model folder: in all, and those that a token passes through."""

import json
import math
from pathlib import Path

from mediator_cli.checkpoint.moe_layout import FORMATS, moe_layout
from mediator_cli.checkpoint.source import open_checkpoint


def parameters(folder: Path) -> dict[str, int]:
    """Count all parameters of the dense model or MoE in a folder, and the active ones."""
    checkpoint = open_checkpoint(folder)
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
    total = sum(sizes.values())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in FORMATS:
        return {"total": total, "active": total}
    layout = moe_layout(str(folder), config, sizes)
    routed = sum(size for name, size in sizes.items() if _is_routed(name))
    return {"total": total, "active": total - routed + routed * layout.top_k // layout.n_experts}


def _is_routed(name: str) -> bool:
    granite = "block_sparse_moe.input_linear" in name or "block_sparse_moe.output_linear" in name
    return ".experts." in name or granite
