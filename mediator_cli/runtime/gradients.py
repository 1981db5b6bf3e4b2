"""The cosine between the step that would make the dense expert predict a prompt better and each expert's delta.

MergeME's task-vector router (arXiv:2502.00997, appendix C). With g the gradient of the prompt's loss, a small step
along -g lowers the loss, so the right expert is the one whose delta has the largest cosine with -g.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from mediator_cli.runtime.features import Floats32, Prompts
    from mediator_cli.runtime.mixing import Matrices, Wanted

    Deltas = Callable[[int], torch.Tensor | None]

_LOGIT_ROWS = 128


class Experts(Protocol):
    """What asking the experts needs of a bundle's model; `opened` is what `open_bundle` noted of it."""

    opened: Any
    config: Any

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Name the experts in the order of a mixture's weights."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    def mixing(self, mixture: Wanted) -> AbstractContextManager[None]:
        """Answer with this mixture inside the block."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Give all parameters."""

    def get_input_embeddings(self) -> Any:  # noqa: ANN401 - a module
        """Give the embedding."""

    def __call__(self, **inputs: Any) -> Any:  # noqa: ANN401 - the model's own output
        """Run a pass."""


@torch.inference_mode(mode=False)
def cosines(model: Experts, prompts: Prompts) -> Floats32:
    """Give cos(-g, delta) for prompts of token ids and each expert, and the tokens predicted [rows, experts + 1].

    g is of the mean loss over the prompt's tokens but the first, over all routed tensors of the dense expert together.
    The cosine of an expert that changes nothing is 0. One backward pass a prompt; each tensor's gradient is let go of
    when it has been compared.
    """
    found = np.zeros((len(prompts), len(model.expert_names) + 1), np.float32)
    deltas = _all_deltas(model)
    lengths: dict[str, torch.Tensor] = {}
    for row, prompt in enumerate(prompts):
        if len(prompt) > 1:
            found[row, :-1] = _compare(model, prompt, deltas, lengths)
            found[row, -1] = len(prompt) - 1
    return found


def _compare(
    model: Experts, prompt: Sequence[int], deltas: Mapping[str, tuple[Any, Deltas]], lengths: dict[str, Any]
) -> list[float]:
    """Compare one prompt's gradient with all deltas; `lengths` keep the squared length of what was decoded before."""
    n_experts = len(model.expert_names)
    products, squares = torch.zeros(n_experts, dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def compare(name: str, of_expert: Deltas, parameter: torch.Tensor) -> None:
        gradient = torch.empty(0) if parameter.grad is None else parameter.grad.flatten().float()
        parameter.grad = None
        squares.add_(gradient.square().sum().double().cpu())
        own = lengths.setdefault(name, torch.full((n_experts,), math.nan, dtype=torch.float64))
        for expert in range(n_experts):
            delta = of_expert(expert)
            products[expert] -= 0.0 if delta is None else torch.dot(gradient, delta).double().cpu()
            if own[expert].isnan():
                own[expert] = 0.0 if delta is None else delta.square().sum().double().cpu()

    _backward(model, prompt, deltas, compare)
    length = torch.sqrt(squares * torch.stack(list(lengths.values())).sum(0))
    return torch.where(length > 0, products / length, 0.0).tolist()


def _backward(
    model: Experts,
    prompt: Sequence[int],
    deltas: Mapping[str, tuple[Any, Deltas]],
    compare: Any,  # noqa: ANN401
) -> None:
    """Run the dense expert on a prompt and back; `compare` hears of each routed tensor when its gradient is whole."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(model.mixing("dense"))
        stack.enter_context(_only([parameter for parameter, _ in deltas.values()], model))
        for name, (parameter, of_expert) in deltas.items():

            def hear(tensor: torch.Tensor, name: str = name, of_expert: Deltas = of_expert) -> None:
                compare(name, of_expert, tensor)

            stack.callback(parameter.register_post_accumulate_grad_hook(hear).remove)
        ids = torch.tensor([prompt], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        token_losses(logits[:, :-1], ids[:, 1:]).mean().backward()


@contextmanager
def _only(wanted: Sequence[torch.Tensor], model: Experts) -> Iterator[None]:
    """Let gradients be computed for these parameters alone, and put everything back."""
    chosen = {id(parameter) for parameter in wanted}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
            parameter.grad = None


def _all_deltas(model: Experts) -> dict[str, tuple[torch.Tensor, Deltas]]:
    """Find the parameter of each routed tensor, and what gives an expert's delta of it, flat in float32."""
    found: dict[str, tuple[torch.Tensor, Deltas]] = {}
    seen: set[int] = set()
    mixed = _expert_matrices(model)
    for at, (module, mixer) in enumerate(zip(model.opened.modules, model.opened.mixers, strict=True)):
        if mixer.matrix is not None and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[mixer.name] = (module.weight, _of_matrix(module.weight, mixer, mixed))
        for name, rows in mixer.vectors.items():
            found[f"{at}.{name}"] = (module.get_parameter(name), rows.__getitem__)
    return found


def _expert_matrices(model: Experts) -> list[Matrices] | None:
    """Give every expert's own matrices where all of them fit into the budget at once; None where they do not."""
    cache = model.opened.cache
    one_hot = [tuple(row) for row in torch.eye(len(model.expert_names)).tolist()]
    if sum(map(cache.size, one_hot)) > cache.budget:
        return None
    found = [cache.get(mixture, 1, 0) for mixture in one_hot]
    return [matrices for matrices in found if matrices is not None] if None not in found else None


def _of_matrix(dense: torch.Tensor, mixer: Any, mixed: list[Matrices] | None) -> Deltas:  # noqa: ANN401
    deltas = mixer.matrix.deltas
    keepers, changers = deltas.keepers, deltas.changers

    def of_expert(expert: int) -> torch.Tensor | None:
        if not changers[expert]:
            return None
        if mixed is None:
            flat: torch.Tensor = deltas.read(keepers[expert]).flat().to(dense.device)
            return flat
        return (mixed[expert][mixer.name].float() - dense.detach().float()).flatten()

    return of_expert


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute -ln p of targets [rows, tokens] by logits [rows, tokens, vocabulary], in float32; few rows at a time."""
    flat = logits.reshape(-1, logits.shape[-1]).split(_LOGIT_ROWS)
    wanted = targets.reshape(-1).split(_LOGIT_ROWS)
    parts = [functional.cross_entropy(x.float(), y, reduction="none") for x, y in zip(flat, wanted, strict=True)]
    return torch.cat(parts).view(targets.shape)
