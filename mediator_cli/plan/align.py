"""Which hidden units of a model may change places: found from tensor names, shapes and config.

Units are what computes the same in any order: the hidden units of a feed-forward block, attention heads inside the
group that shares key and value, the numbers of the residual stream. Inside a head rotary embeddings fix the order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.errors import Problem, some_names
from mediator_cli.plan.residual import residual_units
from mediator_cli.plan.units import HEAD_NORMS, AlignPlan, Side, Units, UnknownUnitsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.plan.model import ExpertSource, Plan
    from mediator_cli.recipe.load import LoadedRecipe

Shapes = dict[str, tuple[int, ...]]
_INTO = ("gate_proj", "up_proj", "w1", "w3", "fc1", "fc_in", "dense_h_to_4h")
"""Matrices whose rows are the hidden units of a feed-forward block."""
_OUT_OF = ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h")
"""Matrices whose columns they are."""
_HEADS = ("q_proj", "k_proj", "v_proj")
_OUTPUTS = ("o_proj", "out_proj")


def plan_align(
    loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource], kept: frozenset[str]
) -> tuple[AlignPlan | None, list[Problem]]:
    """Find what the recipe's `align` means for these sources, or all that stands in its way; `kept` is never merged."""
    spec = loaded.recipe.align
    if spec is None:
        return None, []
    target = "base" if spec.to == "base" else spec.to.removeprefix("expert:")
    problems = list(_check_target(loaded, target, experts))
    shapes = {name: info.shape for name, info in base.tensors.items()}
    units, faults = find_units(shapes, base.config, spec.groups, kept, moves_base=target != "base")
    problems += [Problem(loaded.place("align", "groups"), fault, hint) for fault, hint in faults]
    full = [expert.name for expert in experts if not isinstance(expert.source, Adapter)]
    moving = tuple(name for name in (*(["base"] if target != "base" else []), *full) if name != target)
    seed = loaded.recipe.seed if spec.seed is None else spec.seed
    return AlignPlan(spec, units, target, moving, seed, tuple(_notices(units, moving))), problems


def with_align(plan: Plan, align: AlignPlan | None) -> Plan:
    """Add what is aligned, and what there is to say of it, to a plan."""
    return plan if align is None else replace(plan, align=align, notices=(*plan.notices, *align.notices))


def _check_target(loaded: LoadedRecipe, target: str, experts: Sequence[ExpertSource]) -> Iterator[Problem]:
    place = loaded.place("align", "to")
    if target != "base" and target not in [spec.name for spec in loaded.recipe.experts]:
        yield Problem(place, f"'{target}' is no expert", "give base, or expert: and a name under `experts`")
    if any(expert.name == target and isinstance(expert.source, Adapter) for expert in experts):
        yield Problem(place, f"adapter {target} has the base's order", "write `to: base`")
    if loaded.recipe.slices:
        yield Problem(loaded.place("align"), "layers that are stacked are not aligned", "leave out align or slices")


def _notices(units: Sequence[Units], moving: Sequence[str]) -> Iterator[str]:
    if not moving:
        yield "align has nothing to do: every expert is an adapter of the base, and has its order"
        return
    largest = max((one.size for one in units), default=0)
    yield (
        f"align compares {sum(one.size for one in units)} units of {some_names(moving)} before the merge, "
        f"in groups of up to {largest}; neither is in the time and memory that the plan tells"
    )


def find_units(
    shapes: Shapes,
    config: Mapping[str, Any],
    groups: Sequence[str],
    kept: frozenset[str] = frozenset(),
    *,
    moves_base: bool = False,
) -> tuple[tuple[Units, ...], list[tuple[str, str]]]:
    """Find the units of the asked groups, and what stands in the way of others with a hint each.

    Blocks that are `kept` as a whole have none. Where the base does not move, what is kept has the right order already.
    """
    text, faults = _text_config(config), list[tuple[str, str]]()
    found: list[Units] = []
    passed_over = frozenset() if moves_base else kept
    by_group = {
        "mlp": lambda: mlp_units(shapes, kept),
        "heads": lambda: head_units(shapes, text, kept),
        "residual": lambda: [
            residual_units(shapes, text, [*mlp_units(shapes, kept), *head_units(shapes, text, kept)], passed_over)
        ],
    }
    for group in dict.fromkeys(groups):
        try:
            units = by_group[group]()
            if not units:
                raise UnknownUnitsError(f"its units are not known in {_some_matrices(shapes)}")
            found += units
        except UnknownUnitsError as error:
            faults.append((f"{group}: {error}", f"leave {group} out of `align.groups`"))
    return tuple(found), faults


def _some_matrices(shapes: Shapes) -> str:
    inside = [name for name, shape in shapes.items() if len(shape) > 1 and place_of(name).layer is not None]
    return some_names(inside) if inside else "a model without layers"


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the part of a config that tells of the language model."""
    inside = config.get("text_config")
    return inside if isinstance(inside, dict) and "num_attention_heads" in inside else config


def _modules(shapes: Shapes, kinds: Sequence[str], kept: frozenset[str]) -> dict[str, dict[str, str]]:
    """Gather the weights of some kinds in layers by the module that they stand in, unless all are kept."""
    found: dict[str, dict[str, str]] = {}
    for name in shapes:
        place = place_of(name)
        if place.layer is not None and place.modules and place.kind in kinds and place.parameter == "weight":
            found.setdefault(name.rsplit(".", 2)[0], {})[place.kind] = name
    return {parent: names for parent, names in found.items() if not kept.issuperset(names.values())}


def mlp_units(shapes: Shapes, kept: frozenset[str]) -> list[Units]:
    """Find the hidden units of every feed-forward block, those of experts too; raise UnknownUnitsError."""
    return [_mlp(shapes, parent, kinds) for parent, kinds in _modules(shapes, (*_INTO, *_OUT_OF), kept).items()]


def _mlp(shapes: Shapes, parent: str, kinds: Mapping[str, str]) -> Units:
    into = [name for kind, name in kinds.items() if kind in _INTO]
    out_of = [name for kind, name in kinds.items() if kind in _OUT_OF]
    if not into or len(out_of) != 1:
        others = [name for name in shapes if name.startswith(f"{parent}.") and name not in kinds.values()]
        raise UnknownUnitsError(f"the hidden units of {some_names([*kinds.values(), *others])} are not known")
    size = shapes[into[0]][0]
    expected = {name: (size, shapes[out_of[0]][0]) for name in into} | {out_of[0]: (shapes[out_of[0]][0], size)}
    _check_shapes(shapes, expected)
    biases = [bias for name in into if (bias := _bias(shapes, name, size))]
    known = {*into, *out_of, *biases, f"{out_of[0].removesuffix('weight')}bias"}
    _check_others(shapes, parent, known, size)
    sides = [*(Side(name, 0) for name in into), Side(out_of[0], 1), *(Side(name, 0) for name in biases)]
    return Units(parent, "mlp", size, tuple(sides))


def head_units(shapes: Shapes, config: Mapping[str, Any], kept: frozenset[str]) -> list[Units]:
    """Find the query heads of every attention, in groups that share key and value; raise UnknownUnitsError."""
    modules = _modules(shapes, (*_HEADS, *_OUTPUTS), kept)
    attentions = {parent: kinds for parent, kinds in modules.items() if any(kind in kinds for kind in _HEADS)}
    return [_attention(shapes, parent, kinds, config) for parent, kinds in attentions.items()]


def _attention(shapes: Shapes, parent: str, kinds: Mapping[str, str], config: Mapping[str, Any]) -> Units:
    output = next((kind for kind in _OUTPUTS if kind in kinds), "o_proj")
    if missing := [kind for kind in (*_HEADS, output) if kind not in kinds]:
        raise UnknownUnitsError(f"{parent} has no {some_names(missing)}")
    heads = config.get("num_attention_heads")
    shared = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(shared, int) or heads < 1 or shared < 1 or heads % shared:
        raise UnknownUnitsError(f"the config does not tell how many heads {parent} has")
    if config.get("alibi"):
        raise UnknownUnitsError(f"{parent} has a slope for each head (alibi), which no tensor tells")
    inner, outer = shapes[kinds[output]][::-1]
    width = config.get("head_dim") or inner // heads
    rows = {"q_proj": heads * width, "k_proj": shared * width, "v_proj": shared * width}
    expected = {kinds[kind]: (length, shapes[kinds[kind]][-1]) for kind, length in rows.items()}
    _check_shapes(shapes, expected | {kinds[output]: (outer, heads * width)})
    per_group = heads // shared
    sides = [Side(kinds[output], 1, width)]
    for kind, length in rows.items():
        share = 1 if kind == "q_proj" else per_group
        names = [kinds[kind], _bias(shapes, kinds[kind], length)]
        sides += [Side(name, 0, width, share) for name in names if name]
    norms = _head_norms(shapes, parent, rows, width)
    sides += [Side(name, 0, width, 1 if kind == "q_proj" else per_group) for name, kind in norms.items() if kind]
    known = {*norms, *(side.tensor for side in sides), f"{kinds[output].removesuffix('weight')}bias"}
    _check_others(shapes, parent, known)
    return Units(parent, "heads", heads, tuple(sides), per_group)


def _head_norms(shapes: Shapes, parent: str, rows: Mapping[str, int], width: int) -> dict[str, str]:
    """Find norms of queries and keys: with the matrix whose rows they go with, or with none where heads share them."""
    found: dict[str, str] = {}
    for norm, kind in HEAD_NORMS.items():
        for name in (f"{parent}.{norm}.weight", f"{parent}.{norm}.bias"):
            if shapes.get(name) in ((width,), (rows[kind],)):
                found[name] = kind if shapes[name] == (rows[kind],) else ""
    return found


def _bias(shapes: Shapes, weight: str, size: int) -> str:
    name = f"{weight.removesuffix('weight')}bias"
    return name if shapes.get(name) == (size,) else ""


def _check_shapes(shapes: Shapes, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UnknownUnitsError(f"{name} is {list(shapes[name])}, not {list(shape)}")


def _check_others(shapes: Shapes, parent: str, known: set[str], size: int | None = None) -> None:
    """Refuse other tensors of a module, only those with an axis of some size where one is given."""
    others = [name for name in shapes if name.startswith(f"{parent}.") and name not in known]
    if strange := [name for name in others if size is None or size in shapes[name]]:
        raise UnknownUnitsError(f"the part of {some_names(strange)} in it is not known")
