"""Fit an adapter to its base: which tensors it changes and how, or every reason why it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.adapter.changes import Change, Product, Rows, Shift, Whole
from mediator_cli.checkpoint.adapter.pairs import Fault, Pair, find_absent, find_pairs, find_rows, to_problems
from mediator_cli.checkpoint.adapter.places import Landing, find_landings
from mediator_cli.checkpoint.adapter.products import make_products, stacked_flipped, stored_flipped
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mediator_cli.checkpoint.adapter.config import AdapterConfig
    from mediator_cli.checkpoint.adapter.parts import Parts
    from mediator_cli.checkpoint.header import TensorInfo

_OTHER_BASE = "was the adapter trained on another base?"
_MERGE = "merge the adapter into its base with PEFT's merge_and_unload and name that folder"
_UNTIE = (
    "give the base a head of its own: load it with transformers, model.lm_head.weight ="
    " torch.nn.Parameter(model.lm_head.weight.clone()), model.config.tie_word_embeddings = False, save it as the base"
)


@dataclass(frozen=True)
class _Step:
    """One piece of a change of one of the base's tensors; `pair` still has to become products."""

    name: str
    landing: Landing
    piece: Whole | Pair | Shift | Rows


@dataclass(frozen=True)
class _Ground:
    """What the pieces are fitted to; `tied` is the base's embedding where it is the only tensor of the vocabulary.

    What is flipped is stored [in, out].
    """

    config: AdapterConfig
    base: Mapping[str, TensorInfo]
    landings: Mapping[str, tuple[Landing, ...]]
    tied: str | None
    layers_flipped: Mapping[str | None, bool]
    experts_flipped: bool | None


def fit_adapter(parts: Parts, config: AdapterConfig, base: Mapping[str, TensorInfo]) -> dict[str, Change]:
    """Find what the adapter makes of the base's tensors; raise CheckpointError with everything that does not fit."""
    pairs, faults = find_pairs(parts, config, base)
    faults += find_absent(parts, config)
    pieces: list[tuple[str, Pair | Shift | Rows]] = [(pair.tensor, pair) for pair in pairs]
    pieces += [
        (f"{wrapped.module}.bias", Shift(roles["bias"], config.scale_of(wrapped.module)))
        for wrapped, roles in parts.wraps.items()
        if "bias" in roles
    ]
    for item in find_rows(parts, config):
        if isinstance(item, Fault):
            faults.append(item)
        else:
            pieces.append(item)
    wanted = {name: _shape(piece) for name, piece in pieces}
    wanted |= {name: info.shape for name, info in parts.wholes.items()}
    landings = find_landings(wanted, {name: info.shape for name, info in base.items()})
    ground = _Ground(
        config, base, landings, _only_vocabulary(base), stored_flipped(base), stacked_flipped(pairs, landings, base)
    )
    found = [*_place_wholes(parts.wholes, ground), *chain.from_iterable(_place(*item, ground) for item in pieces)]
    steps = [item for item in found if isinstance(item, _Step)]
    faults += [item for item in found if isinstance(item, Fault)]
    made = _put_together(steps, ground)
    faults += [item for item in made.values() if isinstance(item, Fault)]
    if faults:
        raise CheckpointError(to_problems(parts.file, faults))
    return {name: change for name, change in made.items() if isinstance(change, Change)}


def _shape(piece: Pair | Shift | Rows) -> tuple[int, ...]:
    if isinstance(piece, Rows):
        return (0, piece.info.shape[1])
    return piece.info.shape if isinstance(piece, Shift) else piece.shape


def _only_vocabulary(base: Mapping[str, TensorInfo]) -> str | None:
    """Name the embedding if no other tensor has its shape: the head is then tied to it, or there is none."""
    outside = {n: info for n, info in base.items() if len(info.shape) == 2 and place_of(n).layer is None}
    most = max((info.shape[0] for info in outside.values()), default=0)
    found = [name for name, info in outside.items() if info.shape[0] == most]
    return found[0] if len(found) == 1 else None


def _place(name: str, piece: Pair | Shift | Rows, ground: _Ground) -> Iterator[_Step | Fault]:
    landings = ground.landings.get(name, ())
    if not landings:
        yield _missing(name, _shape(piece), ground)
    elif isinstance(piece, Pair) and piece.is_embedding and landings[0].name == ground.tied and ground.config.has_head:
        message = "changes the embeddings and not the head, but the base has one tensor for both"
        yield Fault(name, message, _UNTIE)
    else:
        yield from (_Step(landing.name, landing, piece) for landing in landings)


def _missing(name: str, shape: tuple[int, ...], ground: _Ground) -> Fault:
    tied = ground.base[ground.tied].shape if ground.tied else None
    if tied and len(shape) == 2 and shape[1] == tied[1] and place_of(name).layer is None and ground.config.has_head:
        return Fault(name, "the base has no such tensor; its head is tied to its embeddings", _UNTIE)
    return Fault(name, "the base has no such tensor, and a merge adds none", _OTHER_BASE)


def _place_wholes(wholes: Mapping[str, TensorInfo], ground: _Ground) -> Iterator[_Step | Fault]:
    twins: dict[str, TensorInfo] = {}
    for name, info in wholes.items():
        landings = ground.landings.get(name, ())
        if not landings and (embedding := _twin_of(name, wholes, ground)):
            twins[embedding] = info
        elif not landings:
            yield _missing(name, info.shape, ground)
    for name, info in wholes.items():
        for landing in ground.landings.get(name, ()):
            yield _place_whole(name, Whole(info, twin=twins.get(name)), landing, ground)


def _twin_of(name: str, wholes: Mapping[str, TensorInfo], ground: _Ground) -> str | None:
    """Find the saved embedding of which a saved head is the copy: a tied head, unless it was trained by itself."""
    for other, info in wholes.items():
        is_embedding = ground.tied and [place.name for place in ground.landings.get(other, ())] == [ground.tied]
        if is_embedding and (info.shape, info.dtype) == (wholes[name].shape, wholes[name].dtype):
            is_free = not _is_saved(name, ground) or ground.config.keeps_tied
            return other if is_free else None
    return None


def _is_saved(name: str, ground: _Ground) -> bool:
    """Whether modules_to_save names the module of a tensor."""
    return any(f".{name}".rpartition(".")[0].endswith(f".{module}") for module in ground.config.modules_to_save)


def _place_whole(name: str, whole: Whole, landing: Landing, ground: _Ground) -> _Step | Fault:
    info, stored = whole.info, ground.base[landing.name]
    if landing.rows is not None:
        if landing.at or stored.shape[0] != landing.rows:
            return Fault(name, "is one expert of those that the base holds in one tensor", _OTHER_BASE)
        return _Step(landing.name, landing, replace(whole, start=landing.first * info.shape[-1]))
    if landing.name == ground.tied and whole.twin is None and _is_saved(name, ground) and ground.config.has_head:
        message = "replaces the embeddings and not the head, but the base has one tensor for both"
        return Fault(name, message, _UNTIE)
    if info.shape == stored.shape or _has_other_tokens(landing.name, info, ground.base):
        return _Step(landing.name, landing, whole)
    return Fault(name, f"shape {list(info.shape)}, the base has {list(stored.shape)}", _OTHER_BASE)


def _has_other_tokens(name: str, info: TensorInfo, base: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor of the vocabulary differs from the base's in its number of tokens alone."""
    outside = [other for n, other in base.items() if len(other.shape) == 2 and place_of(n).layer is None]
    is_vocabulary = base[name].shape[:1] == (max((other.shape[0] for other in outside), default=0),)
    return is_vocabulary and place_of(name).layer is None and info.shape[1:] == base[name].shape[1:]


def _put_together(steps: Iterable[_Step], ground: _Ground) -> dict[str, Change | Fault]:
    by_name: dict[str, list[_Step]] = {}
    for step in steps:
        by_name.setdefault(step.name, []).append(step)
    return {name: _make_change(name, own, ground) for name, own in by_name.items()}


def _make_change(name: str, steps: list[_Step], ground: _Ground) -> Change | Fault:
    change = Change(ground.base[name].shape)
    for step in steps:
        piece = step.piece
        if isinstance(piece, Pair):
            made = _add_products(piece, step, change, ground)
        else:
            made = _add_stored(piece, step, change)
        if isinstance(made, Fault):
            return made
        change = made
    return change


def _add_products(pair: Pair, step: _Step, change: Change, ground: _Ground) -> Change | Fault:
    is_flipped = ground.layers_flipped.get(place_of(step.name).layer, ground.config.is_fan_in_fan_out)
    if pair.n_experts > 1:
        if ground.experts_flipped is None:
            return Fault(step.name, "its experts are square, so the file does not tell rows from columns", _MERGE)
        is_flipped = ground.experts_flipped
    made = make_products(pair, step.landing, change.shape, is_flipped)
    if made is None:
        return Fault(step.name, f"{pair} does not give {list(change.shape)}", _OTHER_BASE)
    if any(_overlap(one, other) for one in change.products for other in made):
        return Fault(step.name, "is changed by two modules of the adapter", _OTHER_BASE)
    return replace(change, products=(*change.products, *made))


def _add_stored(piece: Whole | Shift | Rows, step: _Step, change: Change) -> Change | Fault:
    if isinstance(piece, Whole):
        return replace(change, shape=change.shape if step.landing.rows else piece.info.shape, whole=piece)
    if isinstance(piece, Rows):
        return _check_rows(step.name, piece, change.shape) or replace(change, rows=piece)
    if piece.info.shape != change.shape:
        message = f"a bias of {list(piece.info.shape)} does not fit {list(change.shape)}"
        return Fault(step.name, message, _OTHER_BASE)
    return replace(change, shift=piece)


def _overlap(one: Product, other: Product) -> bool:
    return one.at < other.at + other.n_rows and other.at < one.at + one.n_rows


def _check_rows(name: str, rows: Rows, shape: tuple[int, ...]) -> Fault | None:
    if len(shape) != 2 or rows.info.shape[1] != shape[1]:
        return Fault(name, f"rows of {rows.info.shape[1]}, the base has {list(shape)}", _OTHER_BASE)
    if wrong := [number for number in rows.numbers if not 0 <= number < shape[0]]:
        return Fault(name, f"changes token {wrong[0]}, there are {shape[0]}", _OTHER_BASE)
    return None
