"""Answers: prompts in a batch, and conversations whose mixture is decided anew for each turn or kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mediator_cli.errors import BundleError, Problem
from mediator_cli.runtime.features import context_length
from mediator_cli.runtime.mixing import as_weights
from mediator_cli.runtime.prompts import chat_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Cache, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from mediator_cli.runtime.mixing import Wanted
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.runtime.prompts import Message
    from mediator_cli.runtime.router import Routing


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the most probable at temperature 0, else drawn with a seed."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The options of transformers' `generate`."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, "temperature": None, "top_p": None}
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **drawn}


@dataclass(frozen=True)
class Conversation:
    """What was said so far, the mixture that answered last and how, and the keys and values of the tokens `seen`.

    Where gates answered there is no one mixture, so `weights` is None.
    """

    messages: tuple[Message, ...] = ()
    weights: torch.Tensor | None = None
    seen: tuple[int, ...] = ()
    cache: Cache | None = None
    combine: str = "parameters"


@dataclass(frozen=True)
class Turn:
    """An answer, the conversation after it, and how the turn was routed; None when the mixture was given or kept."""

    text: str
    conversation: Conversation
    routing: Routing | None


def answer(
    model: RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    mixture: Wanted | None,
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Answer prompts of token ids in one batch, each with its row of the mixture; None = as router or gates choose.

    Raises BundleError when a prompt is empty or leaves no room for an answer.
    """
    for prompt in prompts:
        check_length(model, prompt)
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    torch.manual_seed(sampling.seed)
    output = model.generate(
        ids, attention_mask=mask, mixture=mixture, streamer=streamer, pad_token_id=pad, **sampling.options
    )
    return list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))


def check_length(model: RoutedModel, prompt: Sequence[int]) -> None:
    """Raise BundleError when a prompt is empty or fills the model's context."""
    limit = context_length(model.config)
    if not prompt:
        raise BundleError(Problem("prompt", "is empty", "give some text"))
    if limit is not None and len(prompt) >= limit:
        message = f"{len(prompt)} tokens, the model reads {limit} with its answer"
        raise BundleError(Problem("prompt", message, "shorten it, or start a new conversation"))


def reply(
    model: RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    text: str,
    sampling: Sampling,
    *,
    mixture: Wanted | None = None,
    streamer: BaseStreamer | None = None,
) -> Turn:
    """Answer the next turn of a conversation, routed anew, or with a mixture: `conversation.weights` keeps the last.

    Keys and values of earlier turns are used again as long as the mixture stays: those of another would be wrong.
    """
    messages: tuple[Message, ...] = (*conversation.messages, {"role": "user", "content": text})
    ids = chat_ids(tokenizer, messages)
    check_length(model, ids)
    weights, routing = _decide(model, ids, mixture)
    # Gates that choose for a sequence choose anew for a longer one: what was kept of the shorter would be wrong.
    same = conversation.weights is not None and weights is not None and torch.equal(conversation.weights, weights)
    same = same and conversation.combine == model.combine
    cache = _usable(conversation, ids) if same else None
    torch.manual_seed(sampling.seed)
    given = torch.tensor([ids], device=model.device)
    output = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        mixture=weights,
        past_key_values=cache,
        streamer=streamer,
        pad_token_id=tokenizer.eos_token_id,
        return_dict_in_generate=True,
        **sampling.options,
    )
    tokens = output.sequences[0].tolist()
    said = str(tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True))
    after = (*messages, {"role": "assistant", "content": said})
    kept = Conversation(after, weights, tuple(tokens[:-1]), output.past_key_values, model.combine)
    return Turn(said, kept, routing)


def _decide(model: RoutedModel, ids: list[int], mixture: Wanted | None) -> tuple[torch.Tensor | None, Routing | None]:
    """Decide on the mixture of a turn; None where gates choose inside the model."""
    if mixture is not None:
        return as_weights(mixture, model.expert_names, str(model.opened.path)), None
    routing = model.route([ids])
    return None if model.gating is not None else torch.from_numpy(routing.weights), routing


def _usable(conversation: Conversation, ids: list[int]) -> Cache | None:
    """Cut the cache back to the tokens that the next prompt shares; None when it cannot be cut."""
    seen, cache = conversation.seen, conversation.cache
    differing = (at for at, (old, new) in enumerate(zip(seen, ids, strict=False)) if old != new)
    # At least one token has to be read, for the logits after it.
    n_same = min(next(differing, len(seen)), len(ids) - 1)
    if cache is None or n_same == 0 or not getattr(cache, "is_croppable", True):
        return None
    cache.crop(n_same - len(seen))
    return cache
