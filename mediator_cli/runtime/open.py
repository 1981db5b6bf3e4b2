"""Open a bundle to answer: load the dense expert, stack the sparse experts, take over the modules of routed units."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mediator_cli.bundle.read import read_bundle
from mediator_cli.errors import BundleError, Problem, first_line
from mediator_cli.runtime.deltas import Deltas
from mediator_cli.runtime.forms import form_of
from mediator_cli.runtime.gates_file import read_gates
from mediator_cli.runtime.gating import set_gates
from mediator_cli.runtime.mixing import MixtureCache
from mediator_cli.runtime.model import Opened, make_routed
from mediator_cli.runtime.modules import Matrix, Mixer, take_over
from mediator_cli.runtime.parameters import match_parameters
from mediator_cli.runtime.prompts import load_tokenizer, prompt_reader
from mediator_cli.runtime.router import read_router

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedModel

    from mediator_cli.bundle.read import Bundle
    from mediator_cli.runtime.combine import Combine
    from mediator_cli.runtime.forms import Form
    from mediator_cli.runtime.mixing import Matrices, Mixture
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.runtime.parameters import Owner

CACHE_BYTES = 1 << 30
SWITCH_TOKENS = 128
SWITCH_GATED = 1
"""The same where a product costs as much as a mixed matrix: experts that are not stored sparsely, or do not fit."""
_DAMAGED = "fetch the bundle again or merge again"


def open_bundle(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    cache_bytes: int = CACHE_BYTES,
    switch_tokens: int | None = None,
    combine: Combine | None = None,
) -> RoutedModel:
    """Open a bundle as a transformers model that routes, mixes and generates.

    `dtype` None keeps the dtype of the dense expert. `cache_bytes` bounds the
    decoded experts and mixed matrices kept beside it;
    `switch_tokens` is how many tokens of one mixture pay for building them; None for what suits the bundle. `combine`
    None combines experts as the router's policy says. Raises BundleError or CheckpointError when the bundle is damaged
    or holds what cannot be mixed.
    """
    bundle = read_bundle(Path(folder))
    router, gates = read_router(bundle.path, bundle.manifest), read_gates(bundle.path, bundle.manifest)
    model = load_dense(bundle.path, dtype).to(device)  # type: ignore[arg-type]
    owners = _routed_owners(bundle, model)
    dense = {name: group[0].parameter.detach() for name, group in owners.items()}
    installed = tuple(_install(bundle, owners))
    mixers = tuple(mixer for _, mixer in installed)
    matrices = {mixer.name: mixer.matrix for mixer in mixers if mixer.matrix is not None}
    is_gated = any(matrix.deltas.is_gated for matrix in matrices.values())
    stacked = sum(matrix.deltas.stack_bytes for matrix in matrices.values())
    every = len(bundle.experts) * sum(dense[name].nbytes for name in matrices)
    # Of low-rank experts alone, products cost so little that no mixed matrix is worth building.
    is_low_rank = bool(matrices) and all(matrix.deltas.is_low_rank for matrix in matrices.values())
    # Where products make a mixed matrix anew, one for each expert is worth more than what products need.
    keeps = is_low_rank or stacked + (every if is_gated and every <= cache_bytes else 0) <= cache_bytes
    for matrix in matrices.values():
        matrix.keeps = keeps
    room = cache_bytes - stacked if keeps else cache_bytes
    cache = _cache(dense, matrices, 0 if is_low_rank else room)
    reader = prompt_reader(load_tokenizer(bundle.path)) if router else None
    suits = SWITCH_TOKENS if keeps and not is_gated else SWITCH_GATED
    switch = suits if switch_tokens is None else switch_tokens
    modules = tuple(module for module, _ in installed)
    names = tuple(source.name for source in bundle.manifest.experts)
    opened = Opened(bundle.path, names, bundle.manifest, reader, router, mixers, modules, cache, switch)
    how = combine or (router.record.policy.combine if router is not None else "parameters")
    routed = make_routed(model, opened, how)
    if gates is not None:
        set_gates(routed, gates)
    return routed


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
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_laid_out)
    return model.eval()  # type: ignore[no-any-return]


def _laid_out(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay the last tokens of several rows out one after the other: torch multiplies a slice 60 times slower."""
    return (args[0].contiguous(), *args[1:]) if args else args


def _install(bundle: Bundle, owners: Mapping[str, tuple[Owner, ...]]) -> Iterator[tuple[nn.Module, Mixer]]:
    by_module: dict[str, list[tuple[Owner, str]]] = {}
    for name, group in owners.items():
        for owner in group:
            by_module.setdefault(owner.path, []).append((owner, name))
    forms = {path: _form(bundle, members) for path, members in by_module.items()}
    matrices = {
        name: Matrix(Deltas(bundle, name, transposed=forms[group[0].path] == "transposed"))
        for name, group in owners.items()
    }
    for members in by_module.values():
        mixer = _mixer(bundle, members, matrices)
        take_over(members[0][0].module, mixer)
        yield members[0][0].module, mixer


def _routed_owners(bundle: Bundle, model: PreTrainedModel) -> dict[str, tuple[Owner, ...]]:
    """Find the modules of all tensors that a sparse expert adds to."""
    loaded = match_parameters(model, bundle.tensors)
    wanted = dict.fromkeys(name for sparse in bundle.experts.values() for name in sparse.tensors)
    for name in wanted:
        if name not in loaded.owners:
            raise BundleError(Problem(f"{bundle.path}: {name}", "no such parameter in the model", _DAMAGED))
    return {name: loaded.owners[name] for name in wanted}


def _form(bundle: Bundle, members: list[tuple[Owner, str]]) -> Form:
    owner, name = members[0]
    form = form_of(owner.module)
    if form is None:
        message = f"{type(owner.module).__name__} cannot be mixed for each input"
        raise BundleError(Problem(f"{bundle.path}: {name}", message, "merge again: what cannot be mixed is averaged"))
    return form


def _mixer(bundle: Bundle, members: list[tuple[Owner, str]], matrices: Mapping[str, Matrix]) -> Mixer:
    mixer = Mixer()
    for owner, name in members:
        _check_shapes(bundle, name, owner.parameter)
        if owner.parameter.ndim == 1:
            mixer.vectors[owner.name] = Deltas(bundle, name).rows().to(owner.parameter.device)
        else:
            mixer.matrix = matrices[name]
    return mixer


def _check_shapes(bundle: Bundle, name: str, tensor: torch.Tensor) -> None:
    for sparse in bundle.experts.values():
        if name in sparse.tensors and sparse.tensors[name].shape != tuple(tensor.shape):
            message = f"shape {list(sparse.tensors[name].shape)}, the model has {list(tensor.shape)}"
            raise sparse.file_of(name).fault(name, message)


def _cache(dense: Mapping[str, torch.Tensor], matrices: Mapping[str, Matrix], budget: int) -> MixtureCache:
    # A matrix that a mixture leaves as it is needs no copy.
    def changed(mixture: Mixture) -> Iterator[str]:
        used = [at for at, weight in enumerate(mixture) if weight]
        return (name for name in matrices if any(changers[name][at] for at in used))

    def build(mixture: Mixture) -> Matrices:
        return {name: matrices[name].deltas.mix(dense[name], mixture) for name in changed(mixture)}

    def count(mixture: Mixture) -> int:
        return sum(dense[name].nbytes for name in changed(mixture))

    changers = {name: matrix.deltas.changers for name, matrix in matrices.items()}
    return MixtureCache(budget, sum(dense[name].nbytes for name in matrices), build, count=count)
