"""Where the tensors that an adapter changes lie in the base: an adapter names the modules of the model in memory.

On disk they may stand under other names, and the experts of MoE layers, one tensor in memory, may be one tensor each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.fused import find_singles, fused_shape, is_fused, other_modules
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.checkpoint.matching import match_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Landing:
    """`rows` rows of a tensor in memory, from `first` on, are those of the base's tensor `name` from `at` on.

    None rows: all of both. A tensor of more than two dimensions counts the rows of all its matrices.
    """

    name: str
    first: int = 0
    at: int = 0
    rows: int | None = None


def find_landings(wanted: Shapes, base: Shapes) -> dict[str, tuple[Landing, ...]]:
    """Find where each tensor in memory lies in the base; those that the base lacks are left out."""
    found: dict[str, tuple[Landing, ...]] = {name: (Landing(own),) for name, own in _rename(wanted, base).items()}
    modules = _expert_modules(wanted, base)
    for name in wanted:
        module = modules.get(place_of(name).layer or "")
        if name in found or module is None:
            continue
        if own := _beside_experts(name, module, base):
            found[name] = (Landing(own),)
        elif split := _split(name, wanted[name], module, base):
            found[name] = split
    return found | {name: (landing,) for name, landing in _fuse(wanted, base) if name not in found}


def _rename(wanted: Shapes, base: Shapes) -> dict[str, str]:
    # Whether a matrix is stored transposed is not known yet, so shapes are compared without their order.
    found = match_names(_sorted(wanted), _sorted(base))
    # Where some layers of a stack go by their own names, the others are missing: no other stack may stand in for them.
    own = {_stack(name) for name in found if found[name] == name} - {""}
    return {name: other for name, other in found.items() if name == other or _stack(name) not in own}


def _sorted(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sorted(shape)) for name, shape in shapes.items()}


def _stack(name: str) -> str:
    return (place_of(name).layer or "").rpartition(".")[0]


def _expert_modules(wanted: Shapes, base: Shapes) -> dict[str, str]:
    """Give the base's module that holds experts, by the layer as the adapter names it."""
    layers = {layer for name in wanted if (layer := place_of(name).layer)}
    found = other_modules({f"{layer}.any.experts.down_proj": () for layer in sorted(layers)}, base)
    return {module.removesuffix(".any"): own for module, own in found.items()}


def _beside_experts(name: str, module: str, base: Shapes) -> str | None:
    """Find a tensor of the module that holds the experts, which changed its name between versions of transformers."""
    layer = place_of(name).layer or ""
    _, _, rest = name.removeprefix(f"{layer}.").partition(".")
    own = f"{module}.{rest}"
    return own if own in base else None


def _split(name: str, shape: tuple[int, ...], module: str, base: Shapes) -> tuple[Landing, ...] | None:
    """Cut a fused tensor into the base's single ones."""
    singles = find_singles(name, module, base)
    if singles is None or fused_shape(singles, base) != shape:
        return None
    return tuple(_in_a_row(singles.members, base))


def _in_a_row(members: Iterable[str], shapes: Shapes) -> Iterator[Landing]:
    first = 0
    for name in members:
        yield Landing(name, first, 0, shapes[name][0])
        first += shapes[name][0]


def _fuse(wanted: Shapes, base: Shapes) -> Iterator[tuple[str, Landing]]:
    """Put single experts where they lie in the base's fused tensors."""
    fused_names = [name for name in base if is_fused(name)]
    for module, target in other_modules(wanted, base).items():
        for fused in (name for name in fused_names if name.startswith(f"{target}.")):
            singles = find_singles(fused, module, wanted)
            if singles and fused_shape(singles, wanted) == base[fused]:
                for place in _in_a_row(singles.members, wanted):
                    yield place.name, Landing(fused, 0, place.first, place.rows)
