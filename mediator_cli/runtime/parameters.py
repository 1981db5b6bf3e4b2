"""Which parameter of a model, in which modules, a tensor of its checkpoint becomes when transformers loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Owner:
    """A module that uses a parameter, under the parameter's name there."""

    path: str
    module: nn.Module
    name: str

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter itself."""
        return self.module.get_parameter(self.name)


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint's tensors become: `owners` of those that are parameters as they are, by tensor.

    A tied matrix has one name in the checkpoint and several owners. `made` are the tensors that others are made of,
    fused or reshaped; `missing` the parameters that no tensor gives.
    """

    owners: Mapping[str, tuple[Owner, ...]]
    made: tuple[str, ...]
    missing: tuple[str, ...]


def match_parameters(model: PreTrainedModel, names: Iterable[str]) -> Loaded:
    """Match the tensor names of a checkpoint with the parameters of a model, which may be on `meta`."""
    owners = _owners(model)
    found: dict[str, tuple[Owner, ...]] = {}
    made: list[str] = []
    given: set[int] = set()
    for name, (key, is_as_stored) in _keys(model, names).items():
        if key not in owners:
            continue
        given.add(id(owners[key][0].parameter))
        if is_as_stored:
            found[name] = owners[key]
        else:
            made.append(name)
    missing = (key for key, group in owners.items() if id(group[0].parameter) not in given)
    return Loaded(found, tuple(made), tuple(missing))


def _owners(model: PreTrainedModel) -> dict[str, tuple[Owner, ...]]:
    names: dict[int, list[str]] = {}
    owners: dict[int, list[Owner]] = {}
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            names.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
            owners.setdefault(id(tensor), []).append(Owner(path, module, name))
    return {name: tuple(owners[key]) for key, group in names.items() for name in group}


def _keys(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Rename tensors as `from_pretrained` does; tell which become a parameter as they are."""
    from transformers import conversion_mapping, core_model_loading

    state: Any = model.state_dict()
    prefix = model.base_model_prefix
    transforms: Any = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, core_model_loading.WeightConverter)]
    found: dict[str, tuple[str, bool]] = {}
    for name in names:
        key, source = core_model_loading.rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, source = core_model_loading.rename_source_key(name, [], [], prefix, state)
        found[name] = (key, source is None)
    return found
