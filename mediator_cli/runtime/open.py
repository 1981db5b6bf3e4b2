"""Open a bundle to answer: load the dense expert, stack the sparse experts, take over the modules of routed units."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mediator_cli.bundle.read import read_bundle
from mediator_cli.errors import BundleError, Problem, first_line
from mediator_cli.runtime.deltas import Deltas
from mediator_cli.runtime.mixing import MixtureCache
from mediator_cli.runtime.model import MixState, Opened, RoutedModel
from mediator_cli.runtime.modules import Matrix, MixedEmbedding, MixedLinear, MixedVectors, Mixer
from mediator_cli.runtime.prompts import load_tokenizer, prompt_reader
from mediator_cli.runtime.router import read_router

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from mediator_cli.bundle.read import Bundle
    from mediator_cli.runtime.mixing import Matrices, Mixture

CACHE_BYTES = 1 << 30
SWITCH_TOKENS = 128
_DAMAGED = "fetch the bundle again or merge again"


def open_bundle(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    cache_bytes: int = CACHE_BYTES,
    switch_tokens: int = SWITCH_TOKENS,
) -> RoutedModel:
    """Open a bundle as a transformers model that routes, mixes and generates.

    `dtype` None keeps the dtype of the dense expert. `cache_bytes` bounds the
    decoded experts and mixed matrices kept beside it;
    `switch_tokens` is how many tokens of one mixture pay for building them. Raises BundleError or CheckpointError when
    the bundle is damaged or holds what cannot be mixed.
    """
    bundle = read_bundle(Path(folder))
    router = read_router(bundle.path, bundle.manifest)
    model = load_dense(bundle.path, dtype).to(device)  # type: ignore[arg-type]
    mixers = tuple(_install(bundle, model))
    model.__class__ = type(f"Routed{type(model).__name__}", (RoutedModel, type(model)), {})
    if not isinstance(model, RoutedModel):
        raise TypeError(type(model).__name__)
    matrices = {mixer.name: mixer.matrix for mixer in mixers if mixer.matrix is not None}
    stacked = sum(matrix.deltas.stack_bytes for matrix in matrices.values())
    for matrix in matrices.values():
        matrix.keeps = stacked <= cache_bytes
    cache = _cache(model, matrices, cache_bytes - stacked if stacked <= cache_bytes else cache_bytes)
    reader = prompt_reader(load_tokenizer(bundle.path)) if router else None
    model.opened = Opened(bundle.path, bundle.manifest, reader, router, mixers, cache, switch_tokens)
    model.state = MixState()
    getattr(model, model.base_model_prefix).register_forward_pre_hook(model.before_pass, with_kwargs=True)
    return model


def load_dense(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the dense expert of a bundle, or any model folder, for inference; no remote code, no network."""
    from transformers import AutoModelForCausalLM

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BundleError(Problem(str(folder), f"transformers cannot load it: {first_line(error)}", _DAMAGED)) from None
    model, info = found
    # transformers only warns of these, and fills what is missing with random numbers.
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        for name in sorted(map(str, info[fault])):
            place, what = f"{folder}: {name}", fault.partition("_")[0]
            raise BundleError(Problem(place, f"is {what} in the model's weights", _DAMAGED))
    return model.eval()  # type: ignore[no-any-return]


def _install(bundle: Bundle, model: PreTrainedModel) -> Iterator[Mixer]:
    owners = _owners(model)
    wanted = dict.fromkeys(name for sparse in bundle.experts.values() for name in sparse.tensors)
    for name in wanted:
        if name not in owners:
            raise BundleError(Problem(f"{bundle.path}: {name}", "no such parameter in the model", _DAMAGED))
    by_module: dict[str, list[tuple[str, str]]] = {}
    for name in wanted:
        for path, parameter in owners[name]:
            by_module.setdefault(path, []).append((parameter, name))
    matrices = {name: Matrix(Deltas(bundle, name)) for name in wanted}
    for path, members in by_module.items():
        module = model.get_submodule(path)
        mixer = _mixer(bundle, module, members, matrices)
        _take_over(model, path, module, mixer)
        yield mixer


def _owners(model: PreTrainedModel) -> dict[str, list[tuple[str, str]]]:
    # A tied matrix has one name in the checkpoint and several modules that use it.
    names: dict[int, list[str]] = {}
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            names.setdefault(id(tensor), []).append(f"{path}.{parameter}" if path else parameter)
            owners.setdefault(id(tensor), []).append((path, parameter))
    return {name: owners[key] for key, group in names.items() for name in group}


def _mixer(bundle: Bundle, module: nn.Module, members: list[tuple[str, str]], matrices: Mapping[str, Matrix]) -> Mixer:
    mixer = Mixer()
    for parameter, name in members:
        tensor = module.get_parameter(parameter)
        _check_shapes(bundle, name, tensor)
        if tensor.ndim == 1:
            mixer.vectors[parameter] = matrices[name].deltas.rows().to(tensor.device)
        elif parameter == "weight" and type(module) in (nn.Linear, nn.Embedding):
            mixer.matrix = matrices[name]
        else:
            message = f"{type(module).__name__} cannot be mixed for each input"
            raise BundleError(Problem(f"{bundle.path}: {name}", message, "average it: assign.rule=listed without it"))
    return mixer


def _check_shapes(bundle: Bundle, name: str, tensor: torch.Tensor) -> None:
    for sparse in bundle.experts.values():
        if name in sparse.tensors and sparse.tensors[name].shape != tuple(tensor.shape):
            message = f"shape {list(sparse.tensors[name].shape)}, the model has {list(tensor.shape)}"
            raise BundleError(Problem(f"{sparse.file}: {name}", message, _DAMAGED))


def _take_over(model: PreTrainedModel, path: str, module: nn.Module, mixer: Mixer) -> None:
    kinds: Mapping[type, Any] = {nn.Linear: MixedLinear, nn.Embedding: MixedEmbedding}
    if type(module) in kinds:
        module.__class__ = kinds[type(module)]
        module.mixer = mixer  # type: ignore[assignment]
        return
    model.set_submodule(path, MixedVectors(module, mixer))


def _cache(model: PreTrainedModel, matrices: Mapping[str, Matrix], budget: int) -> MixtureCache:
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters() if name in matrices}

    def build(mixture: Mixture) -> Matrices:
        return {name: matrices[name].deltas.mix(tensor, mixture) for name, tensor in parameters.items()}

    return MixtureCache(budget, sum(tensor.nbytes for tensor in parameters.values()), build)
