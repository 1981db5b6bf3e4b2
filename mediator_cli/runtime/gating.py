"""Put gates into a model, and look at what they choose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mediator_cli.errors import BundleError, Problem
from mediator_cli.runtime.gates import make_gating

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mediator_cli.runtime.gates import Chooser, Gates, Gating
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.runtime.modules import Mixer

_DAMAGED = "write the bundle again"


def set_gates(model: RoutedModel, gates: Gates | None) -> None:
    """Let gates choose the experts of a model from now on, None = no more.

    Matrices that no expert changes need no gate. Raises BundleError where another one has none, or mixes in a way that
    gates cannot choose for, and for gates that do not fit the model.
    """
    _take_out(model)
    if gates is None:
        return
    if gates.experts != model.expert_names:
        raise BundleError(Problem(str(model.opened.path), "its gates choose among other experts", _DAMAGED))
    gating = make_gating(gates, model.device)
    modules = dict(model.named_modules())
    _check(model, gates, modules)
    paths = {id(module): path for path, module in modules.items()}
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}  # type: ignore[no-untyped-call]
    choices = [
        _choice(gating, mixer, paths[id(module)], is_end=id(module) in ends)
        for module, mixer in zip(model.opened.modules, model.opened.mixers, strict=True)
    ]
    for mixer, choice in zip(model.opened.mixers, choices, strict=True):
        mixer.choose = choice
    for path, chooser in gating.choosers.items() if gates.rule.at == "layer" else ():
        hook = _choose_before(model, chooser)
        gating.hooks.append(modules[path].register_forward_pre_hook(hook, with_kwargs=True))
    model.gating = gating


def _check(model: RoutedModel, gates: Gates, modules: Mapping[str, torch.nn.Module]) -> None:
    """Refuse gates that stand nowhere in the model, or read or choose other numbers of things than there are."""
    width = int(model.config.get_text_config().hidden_size)
    sizes = dict.fromkeys(modules, width) if gates.rule.at == "layer" else gate_sizes(model)
    for name, gate in gates.by_name.items():
        place = f"{model.opened.path}: gate {name}"
        if name not in sizes:
            raise BundleError(Problem(place, "the model has nothing there that mixes", _DAMAGED))
        n_experts, k, size = gate.directions.shape
        if (n_experts, size) != (len(gates.experts), sizes[name]) or gate.bias.shape != (n_experts,):
            message = f"reads {size} numbers and chooses among {n_experts}, not {sizes[name]} and {len(gates.experts)}"
            raise BundleError(Problem(place, message, _DAMAGED))
        if k != 1 and gates.rule.score != "length":
            raise BundleError(Problem(place, f"has {k} directions for each expert, 1 for this score", _DAMAGED))


def _take_out(model: RoutedModel) -> None:
    if model.gating is None:
        return
    for hook in model.gating.hooks:
        hook.remove()
    for mixer in model.opened.mixers:
        # Parts that gates fill in mean nothing without them.
        mixer.choose, mixer.parts = None, ()
    model.gating = None


def _choice(gating: Gating, mixer: Mixer, path: str, *, is_end: bool) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Find the gate of one module: its own, or that of the layer, or part of a layer, that it lies in."""
    if mixer.matrix is None or not mixer.matrix.deltas.is_low_rank:
        raise BundleError(Problem(path, "gates choose among low-rank experts of matrices alone", _DAMAGED))
    if not any(mixer.matrix.deltas.changers):
        return None
    if is_end:
        message = "experts change the embeddings or the head, where gates do not choose"
        raise BundleError(Problem(path, message, "leave out these experts, or let a router read the prompt"))
    if gating.gates.rule.at == "module":
        chooser = gating.choosers.get(mixer.name)
        if chooser is not None:
            return chooser.weights
    else:
        above = [chooser for name, chooser in gating.choosers.items() if path.startswith(f"{name}.")]
        if above:
            return above[0].current
    raise BundleError(Problem(path, "has no gate", _DAMAGED))


def _choose_before(model: RoutedModel, chooser: Chooser) -> Callable[..., None]:
    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.is_gated:
            chooser.held = chooser.weights(states_of(args, kwargs))

    return hook


def states_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Find the hidden states [rows, tokens, in] that a module is called with."""
    given = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(given, torch.Tensor):
        raise BundleError(Problem("gates", "stand before a module that is called without hidden states", _DAMAGED))
    return given


def gate_sizes(model: RoutedModel) -> dict[str, int]:
    """List the matrices that mix, which are those that gates are needed for, with the width of their input."""
    found: dict[str, int] = {}
    for module, mixer in zip(model.opened.modules, model.opened.mixers, strict=True):
        if mixer.matrix is not None:
            shape = module.get_parameter("weight").shape
            found[mixer.name] = shape[0] if mixer.matrix.deltas.transposed else shape[1]
    return found


def gate_places(model: RoutedModel, parts: Sequence[str] = ()) -> dict[str, int]:
    """List the decoder layers that hold matrices that mix, which are those for gates `at: layer`, with their width.

    With `parts`, the parts of those layers with one of these words in their name, such as `mlp`, instead.
    """
    held = {id(module) for module in model.opened.modules}
    width = int(model.config.get_text_config().hidden_size)
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        above, _, last = path.rpartition(".")
        is_part = any(word in last for word in parts) and above.rpartition(".")[2].isdigit()
        is_layer = last.isdigit() and isinstance(model.get_submodule(above), torch.nn.ModuleList)
        is_wanted = is_part if parts else is_layer
        if is_wanted and any(id(inner) in held for inner in module.modules()):
            found.setdefault(path, width)
    return {path: size for path, size in found.items() if not any(path.startswith(f"{other}.") for other in found)}
