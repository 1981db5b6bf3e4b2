"""Which experts answer a sequence, decided by its prompt: α = softmax(top-k(θ · mean(e_1 … e_t))). Pure functions."""

from __future__ import annotations

import torch


def prompt_mean(embeddings: torch.Tensor, is_prompt: torch.Tensor) -> torch.Tensor:
    """Average embeddings [rows, tokens, width] over the tokens marked in [rows, tokens]; gives [rows, width], float32.

    A row without marked tokens gives zeros.
    """
    marked = is_prompt.to(torch.float32)
    total = torch.einsum("btd,bt->bd", embeddings.float(), marked)
    return total / marked.sum(dim=1, keepdim=True).clamp(min=1.0)


def before_labels(mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mark the tokens [rows, tokens] before the first label of each row; all of a row that starts with a label.

    What is to be answered must not choose who answers: when a text is generated, the router sees its prompt alone.
    """
    has_come = (labels != -100).cumsum(dim=1) > 0
    prompt = mask.bool() & ~has_come
    is_empty = ~prompt.any(dim=1, keepdim=True)
    return torch.where(is_empty, mask.bool(), prompt)


def mixture_of(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Turn router logits [rows, experts] into weights that sum to 1 [rows, experts], zero outside the top k.

    Of equal logits the first expert's counts as higher.
    """
    k = min(top_k, logits.shape[1])
    chosen = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = logits.gather(1, chosen).softmax(dim=1)
    return torch.zeros_like(logits).scatter(1, chosen, weights)


def balance_loss(logits: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    """Give E · Σ f_i · p_i: 1 where all experts get as much, up to E where one gets all.

    f_i is the share of the chosen places that expert i has among the rows, p_i its mean probability over all experts:
    the loss of Fedus et al. 2021, "Switch Transformers", with sequences in the place of tokens.
    """
    chosen = (mixture > 0).float()
    shares = chosen.sum(dim=0) / chosen.sum()
    return logits.shape[1] * (shares * logits.softmax(dim=1).mean(dim=0)).sum()
