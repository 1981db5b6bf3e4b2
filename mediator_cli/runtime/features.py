"""Prompts as numbers for a router, from the dense expert's embeddings or first layers, or from the text alone."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from mediator_cli.errors import BundleError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mediator_cli.bundle.router_record import RouterRecord

    Floats32 = NDArray[np.float32]
    Prompts = Sequence[Sequence[int]]

Kind = Literal["embedding_mean", "hidden_mean", "text", "perplexity", "gradient"]
TEXT_SIZE = 4096
_NGRAMS = (3, 4, 5)
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class FeatureSpec:
    """Which features: `layer` is the number of decoder layers that run before the mean of `hidden_mean`.

    `reads` and `first_token` say which tokens the experts are asked about, for perplexity and gradient.
    """

    kind: Kind
    layer: int | None = None
    reads: Literal["turn", "prompt"] = "turn"
    first_token: Literal["skip", "bos"] = "skip"

    @property
    def asks(self) -> bool:
        """Whether the experts themselves are asked; then a last column counts the tokens that were predicted."""
        return self.kind in ("perplexity", "gradient")


def spec_of(record: RouterRecord) -> FeatureSpec:
    """Tell which features a router reads; one that reads nothing has none to tell of."""
    if record.features == "none":
        raise ValueError("the router reads nothing")
    return FeatureSpec(record.features, record.layer, record.reads, record.first_token)


@dataclass(frozen=True)
class FeatureReader:
    """Gives the features [rows, features] of prompts.

    `limit` is the most tokens that a prompt may have, `n_ids` the number of token ids that the model knows.
    """

    spec: FeatureSpec
    compute: Callable[[Prompts], Floats32]
    limit: int | None = None
    n_ids: int | None = None

    def read(self, prompts: Prompts) -> Floats32:
        """Read the features of prompts, given as content ids; raise BundleError naming one that has none."""
        for number, prompt in enumerate(prompts, 1):
            self._check(f"prompt {number}", prompt)
        return self.compute(prompts)

    def is_too_long(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt has more tokens than these features can be computed of."""
        return self.limit is not None and len(prompt) > self.limit

    def _check(self, place: str, prompt: Sequence[int]) -> None:
        if not prompt:
            raise BundleError(Problem(place, "is empty", "a router needs some text from the user"))
        if self.is_too_long(prompt):
            message = f"has {len(prompt)} tokens, the model reads {self.limit} at most"
            hint = "shorten it, or fit the router with features embedding_mean or text"
            raise BundleError(Problem(place, message, hint))
        if self.n_ids is not None and max(prompt) >= self.n_ids:
            message = f"has token id {max(prompt)}, the model knows {self.n_ids} ids"
            raise BundleError(Problem(place, message, "the tokenizer does not belong to this model"))


def prompt_features(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: FeatureSpec, prompts: Prompts
) -> Floats32:
    """Read the features [rows, features] of prompts, given as content ids, from a model in memory.

    A routed model must mix `dense` meanwhile. Raises BundleError for a prompt that is empty, or too long for the model.
    """
    return model_reader(model, tokenizer, spec).read(prompts)


def model_reader(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: FeatureSpec) -> FeatureReader:
    """Make a reader over a model in memory; raises BundleError when the model has not as many layers."""
    if spec.kind == "text":
        return text_reader(tokenizer)
    weight = cast("torch.Tensor", model.get_input_embeddings().weight).detach()
    if spec.kind == "embedding_mean":
        return FeatureReader(spec, lambda prompts: embedding_means(weight.__getitem__, prompts), n_ids=len(weight))
    layer = _decoder_layer(model, spec.layer or 0)
    limit = context_length(model.config)
    return FeatureReader(spec, lambda prompts: _hidden_means(model, layer, prompts), limit, len(weight))


def text_reader(tokenizer: PreTrainedTokenizerBase) -> FeatureReader:
    """Make a reader that needs no model."""

    def read(prompts: Prompts) -> Floats32:
        texts = [tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False) for prompt in prompts]
        return np.stack([text_counts(cast("str", text)) for text in texts])

    return FeatureReader(FeatureSpec("text"), read)


def embedding_means(rows: Callable[[list[int]], torch.Tensor], prompts: Prompts) -> Floats32:
    """Average the input embeddings of each prompt's tokens [rows, hidden]; `rows` reads those of some ids."""
    return row_means(lambda tokens: rows(tokens).float().cpu().numpy(), prompts)


def row_means(rows: Callable[[list[int]], Floats32], prompts: Prompts) -> Floats32:
    """Average the rows of each prompt's tokens [rows, hidden]; `rows` gives those of some ids as float32."""
    tokens = sorted({token for prompt in prompts for token in prompt})
    table = rows(tokens)
    places = {token: place for place, token in enumerate(tokens)}
    means = [table[[places[token] for token in prompt]].mean(axis=0, dtype=np.float64) for prompt in prompts]
    return np.stack(means).astype(np.float32)


def text_counts(text: str) -> Floats32:
    """Count words and runs of 3 to 5 characters, hashed into 4096 features [4096], scaled to length 1.

    Letter case and white space do not matter. The hash is CRC-32, which is the same on every machine.
    """
    counts = np.zeros(TEXT_SIZE, dtype=np.float64)
    for part in _parts(text):
        counts[zlib.crc32(part.encode("utf-8", "replace")) % TEXT_SIZE] += 1.0
    length = np.linalg.norm(counts)
    return (counts / length if length else counts).astype(np.float32)


def _parts(text: str) -> Iterator[str]:
    plain = f" {' '.join(text.lower().split())} "
    for word in re.findall(r"\w+", plain):
        yield f"word:{word}"
    for n in _NGRAMS:
        for start in range(len(plain) - n + 1):
            yield plain[start : start + n]


def context_length(config: Any) -> int | None:  # noqa: ANN401 - configs differ by model
    """Return the most tokens that a model reads; None where its config names no limit."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


class _Stop(Exception):
    """Ends a pass that has given what is wanted."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def _decoder_layer(model: PreTrainedModel, number: int) -> torch.nn.Module:
    """Find the decoder layer with this number, from 1."""
    import torch  # here: features of the text alone, and of a table of embeddings, need none

    count = int(model.config.get_text_config().num_hidden_layers)
    stacks = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    stack = next(stacks, None)
    if stack is None or not 1 <= number <= count:
        message = f"has no decoder layer {number}" + (f", only 1 to {count}" if stack is not None else "")
        raise BundleError(Problem("the dense expert", message, "fit the router with another layer"))
    return stack[number - 1]


def _hidden_means(model: PreTrainedModel, layer: torch.nn.Module, prompts: Prompts) -> Floats32:
    """Average the hidden state behind a decoder layer over each prompt's tokens [rows, hidden]; no later layer runs."""
    found: dict[int, Floats32] = {}
    for batch in length_batches(prompts):
        means = _batch_means(model, layer, [prompts[row] for row in batch])
        found |= dict(zip(batch, means, strict=True))
    return np.stack([found[row] for row in range(len(prompts))])


def length_batches(prompts: Prompts, most: int = _BATCH_TOKENS) -> Iterator[list[int]]:
    """Group the rows of prompts, shortest first, into batches of at most so many tokens with padding."""
    batch: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
        if batch and (len(batch) + 1) * len(prompts[row]) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _batch_means(model: PreTrainedModel, layer: torch.nn.Module, prompts: Prompts) -> Floats32:
    import torch

    width = max(len(prompt) for prompt in prompts)
    # Padding stands behind the tokens, where a causal model cannot see it.
    ids = torch.tensor([[*prompt, *[prompt[-1]] * (width - len(prompt))] for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = torch.arange(width, device=model.device)[None, :] < lengths[:, None]
    hidden = _run_to(model, layer, ids, mask.long()).float()
    means: Floats32 = ((hidden * mask[..., None]).sum(dim=1) / lengths[:, None]).cpu().numpy()
    return means


def _run_to(model: PreTrainedModel, layer: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Run a model up to a layer and return that layer's output [rows, tokens, hidden]."""
    import torch

    def stop(_: torch.nn.Module, __: Any, output: Any) -> None:  # noqa: ANN401 - layers give a tensor or a tuple
        raise _Stop(output[0] if isinstance(output, tuple) else output)

    hook = layer.register_forward_hook(stop)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Stop as reached:
        return reached.hidden
    finally:
        hook.remove()
    raise RuntimeError("the pass did not reach the layer")
