"""A Mixture of Experts opened for training: frozen parameters in half precision, trained ones in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from mediator_cli.bundle.tensors import read_tensor
from mediator_cli.checkpoint.header import read_json, read_tensors
from mediator_cli.checkpoint.heterogeneous import is_heterogeneous
from mediator_cli.checkpoint.moe_layout import moe_layout
from mediator_cli.errors import CheckpointError, Problem, first_line
from mediator_cli.moe.layerwise import parameter_of, router_of
from mediator_cli.moe.train.loss import GridPasses, LinePasses

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedModel

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.moe_layout import MoeLayout
    from mediator_cli.moe.train.loss import Passes
    from mediator_cli.moe.train.settings import TrainSettings

_DAMAGED = "is the checkpoint complete? merge again"
_SHORT = 512
"""Tokens up to which attention by plain products is faster than torch's kernel for long texts, on a CPU."""


@dataclass(frozen=True)
class Source:
    """A Mixture of Experts on disk; `layout` is None where its experts are of different architectures."""

    folder: Path
    config: Mapping[str, Any]
    places: Mapping[str, TensorInfo]
    layout: MoeLayout | None


def open_source(folder: Path) -> Source:
    """Read config and headers of a Mixture of Experts; raise CheckpointError where it is none, or damaged."""
    config, places = read_json(folder / "config.json"), read_tensors(folder)
    layout = None if is_heterogeneous(config) else moe_layout(str(folder), config, places)
    return Source(folder, config, places, layout)


@dataclass(frozen=True)
class Trained(Mapping[str, "NDArray[Any]"]):
    """Trained tensors by the names that they are stored under; each is a view of a parameter's part."""

    parts: Mapping[str, torch.Tensor]

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Give a tensor as it is now, in float32."""
        return self.parts[name].detach().float().cpu().numpy()

    def __iter__(self) -> Iterator[str]:
        """Give the stored names."""
        return iter(self.parts)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.parts)


@dataclass(frozen=True)
class Student:
    """The model in training, its trained parameters by name, and the stored tensors that these are of.

    `layout` is None where experts are of different architectures, and chosen row by row.
    """

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]
    trained: Trained
    layout: MoeLayout | None

    @property
    def n_trained(self) -> int:
        """Count the numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def passes(self, call: nn.Module) -> Passes:
        """Run rows through the model, or through what wraps it."""
        if self.layout is None:
            pad = getattr(self.model.config, "pad_token_id", None)
            return GridPasses(call, self.model, 0 if pad is None else int(pad))
        layers = cast("Any", self.model.base_model).layers
        routers = tuple(router for layer in layers if (router := router_of(layer)) is not None)
        return LinePasses(call, self.model, routers, self.layout.top_k, self.model.dtype)


def open_student(source: Source, names: tuple[str, ...], settings: TrainSettings, longest: int) -> Student:
    """Load a model and make the parameters of the named tensors trainable, exactly as they are stored.

    `longest` is the most tokens that a pass will have. Raises CheckpointError where transformers cannot load it, or a
    trained tensor holds NaN or infinity.
    """
    model = _load(source, settings, longest)
    known = dict(model.named_parameters(remove_duplicate=False))
    owners = dict.fromkeys(_owner(known, name)[0] for name in names)
    # Tied matrices are one parameter under two names.
    parameters = {name: known[name] for name in {id(known[owner]): owner for owner in owners}.values()}
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    parts = {name: _owner(known, name)[1] for name in names}
    for name, part in parts.items():
        part.copy_(_finite(source, name))
    if settings.checkpointing:
        _keep_no_states(model)
    return Student(model, parameters, Trained(parts), source.layout)


def _keep_no_states(model: PreTrainedModel) -> None:
    # transformers is about to rename it, and warns of the old name where it knows the new one.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _finite(source: Source, name: str) -> torch.Tensor:
    stored = read_tensor(source.places[name])
    if not bool(stored.isfinite().all()):
        message = "holds NaN or infinity"
        raise CheckpointError(Problem(f"{source.folder}: {name}", message, "make the gates anew, or merge again"))
    return stored


def _load(source: Source, settings: TrainSettings, longest: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True,
            **_kernels(source, settings, longest),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        message = f"cannot be loaded: {first_line(error)}"
        raise CheckpointError(Problem(str(source.folder), message, _DAMAGED)) from None
    model, found = loaded
    if found["missing_keys"]:
        raise CheckpointError(Problem(str(source.folder), f"lacks {sorted(found['missing_keys'])[0]}", _DAMAGED))
    return cast("PreTrainedModel", model)


def _kernels(source: Source, settings: TrainSettings, longest: int) -> dict[str, str]:
    """Choose how experts and attention are computed; README.md has the times."""
    if source.layout is None:
        import mediator_cli.moe.heterogeneous  # noqa: F401 - teaches transformers the class

        return {}
    # Autocast, by which trained experts are rounded, knows plain products alone; grouped ones want rows of 16 bytes.
    sides = (source.config.get("hidden_size"), source.config.get(source.layout.format.inner))
    is_grouped = settings.what != "all" and all(isinstance(side, int) and side % 8 == 0 for side in sides)
    is_short = longest <= _SHORT and not torch.cuda.is_available()
    return {
        "experts_implementation": "grouped_mm" if is_grouped else "eager",
        "attn_implementation": "eager" if is_short else "sdpa",
    }


def _owner(known: Mapping[str, nn.Parameter], name: str) -> tuple[str, torch.Tensor]:
    """Find the parameter that a stored tensor belongs in, by its name, and the part of it that it is."""
    if name in known:
        return name, known[name].data
    prefix, number, rest = _layer(name)
    layer = f"{prefix}{number}."
    wanted = {own.removeprefix(layer): known[own] for own in known if own.startswith(layer)}
    inner, part = parameter_of(rest, wanted)
    return layer + inner, part


def _layer(name: str) -> tuple[str, str, str]:
    prefix, found, behind = name.partition("layers.")
    number, dot, rest = behind.partition(".")
    if not (found and dot and number.isdecimal()):
        raise CheckpointError(Problem(name, "is no parameter of the model", _DAMAGED))
    return prefix + found, number, rest
