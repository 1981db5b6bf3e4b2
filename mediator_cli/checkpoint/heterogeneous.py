"""How a heterogeneous Mixture of Experts calls itself and its tensors. No torch: who writes one needs only this."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MODEL_TYPE, ARCHITECTURE = "mediator_heterogeneous_moe", "HeterogeneousMoeForCausalLM"
EMBED, HEAD, HEAD_BIAS = "embed.weight", "head.weight", "head.bias"
ROUTER, ROUTER_BIAS = "router.weight", "router.bias"
MANIFEST = "heterogeneous_manifest.json"
"""Where a folder of this kind says what it was made of."""


def is_heterogeneous(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a heterogeneous Mixture of Experts."""
    return config.get("model_type") == MODEL_TYPE


def body_tensor(expert: int, name: str) -> str:
    """Name a tensor of an expert's body, which is `name` in the expert's own model without head."""
    return f"experts.{expert}.body.{name}"


def projector_tensors(expert: int, which: str, layer: int) -> tuple[str, str]:
    """Name weight and bias of one layer of a projector, `proj_in` or `proj_out`."""
    layer_name = f"experts.{expert}.{which}.layers.{layer}"
    return f"{layer_name}.weight", f"{layer_name}.bias"


def layer_sizes(sizes: tuple[int, int], depth: int, width: int | None) -> Sequence[tuple[int, int]]:
    """Give input and output size of each linear layer; inner layers are `width` wide, or as the wider end.

    >>> layer_sizes((8, 4), 1, None), layer_sizes((8, 4), 2, 6)
    ([(8, 4)], [(8, 6), (6, 4)])
    """
    inner = [width or max(sizes)] * (depth - 1)
    ends = [sizes[0], *inner, sizes[1]]
    return list(pairwise(ends))
