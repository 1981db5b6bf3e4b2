"""Which tensors of a bundle an adapter can carry: linear weights inside layers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.adapter.products import stored_flipped
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.export.origin import routed_tensors
from mediator_cli.export.report import Left

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mediator_cli.bundle.read import Bundle
    from mediator_cli.export.origin import Origin
    from mediator_cli.export.report import ExpertReport
    from mediator_cli.kernels.arrays import Floats

_SIDES = 2


def module_of(tensor: str) -> str:
    """Name the module that a weight is of."""
    return tensor.removesuffix(".weight")


def linear_targets(bundle: Bundle) -> dict[str, bool]:
    """List the routed weights that are linear maps; True for those stored [in, out]."""
    flipped = stored_flipped(bundle.tensors)
    names = [name for name in routed_tensors(bundle) if not reason_against(bundle, name)]
    return {name: flipped.get(place_of(name).layer, False) for name in names}


def reason_against(bundle: Bundle, name: str) -> str:
    """Say why no adapter that servers load can change a tensor; empty where one can."""
    place, shape = place_of(name), bundle.tensors[name].shape
    if ".experts." in name:
        return "belongs to experts, which are one tensor in memory"
    if len(shape) != _SIDES:
        return "is a vector" if len(shape) < _SIDES else f"has {len(shape)} dimensions"
    if place.layer is None:
        return "is an embedding or a head"
    return "" if name.endswith(".weight") else "is not the weight of a module"


def left_behind(bundle: Bundle, origin: Origin) -> Iterator[Left]:
    """List what an expert changes and an adapter cannot carry, with its size in that of the dense tensor."""
    for name in routed_tensors(bundle):
        reason = reason_against(bundle, name)
        if reason and (size := norm(origin.read(name))):
            dense = float(bundle.dense(name).double().norm())
            yield Left(tensor=name, reason=reason, size=round(size / dense, 6) if dense else 1.0)


def left_notices(experts: Iterable[ExpertReport]) -> Iterator[str]:
    """Say in one sentence what stays behind of all experts, and which of it changes most."""
    left = [(each.name, one) for each in experts for one in each.not_carried]
    if left:
        counts = Counter(name for name, _ in left)
        told = ", ".join(f"{count} tensors of {name}" for name, count in counts.items())
        name, most = max(left, key=lambda pair: pair[1].size)
        yield (
            f"adapters carry linear weights alone, so these stay as the dense expert has them: {told}; the largest "
            f"change is that of {most.tensor} by {name}, {most.size:.2%} of the dense tensor"
        )


def norm(values: Floats) -> float:
    """Give the root of the sum of squares, in float64."""
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))
