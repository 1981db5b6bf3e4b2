"""MergeME's heterogeneous Mixture of Experts (arXiv 2502.00997) as a transformers model.

For a prompt with embeddings e_1 … e_t of the shared matrix M_e:
α = softmax(top-k(θ · mean(e_1 … e_t))), r_i = out_i(body_i(in_i(e))), y = M_h · Σ α_i r_i.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from mediator_cli.checkpoint.heterogeneous import EMBED, HEAD
from mediator_cli.moe.heterogeneous.cache import ExpertCaches
from mediator_cli.moe.heterogeneous.configuration import HeterogeneousMoeConfig
from mediator_cli.moe.heterogeneous.projector import Projector
from mediator_cli.moe.heterogeneous.routing import balance_loss, before_labels, mixture_of, prompt_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Cache, PreTrainedConfig

_OWN_ATTENTION = ("eager", "flash_attention_2")
"""Kernels that are asked of all bodies when the user asks for them; else each takes what it prefers."""


@dataclass
class HeterogeneousMoeOutput(ModelOutput):
    """What a pass gives: `logits` [rows, tokens, vocabulary], `mixture` and `router_logits` [rows, experts].

    With labels, `logits` [n, vocabulary] are those of the positions that predict one, in order.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    mixture: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class NoEmbedding(nn.Module):
    """Stands where a body's own embedding was: it reads projected states instead."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:  # noqa: ANN401 - never answered
        """Refuse."""
        raise RuntimeError("the body of an expert takes inputs_embeds, not token ids")


class Expert(nn.Module):
    """One expert: projector in, its decoder without embedding and head, projector out."""

    def __init__(self, config: HeterogeneousMoeConfig, number: int) -> None:
        super().__init__()
        facts, own = config.experts[number], config.expert_config(number)
        width, start = facts["width"], facts["start"]
        self.proj_in = Projector(config.projector_config, (config.hidden_size, width), start)
        self.body = _body(config, own)
        self.proj_out = Projector(config.projector_config, (width, config.hidden_size), start)
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters

    def forward(
        self, embeddings: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """Answer embeddings [rows, tokens, shared width] with states of the same shape."""
        placed = {"position_ids": positions} if self.takes_positions else {}
        found = self.body(
            inputs_embeds=self.proj_in(embeddings),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **placed,
        )
        return cast("torch.Tensor", self.proj_out(found.last_hidden_state))


def _body(config: HeterogeneousMoeConfig, own: PreTrainedConfig) -> PreTrainedModel:
    asked = getattr(config, "_attn_implementation", None)
    chosen = {"attn_implementation": asked} if asked in _OWN_ATTENTION else {}
    body: PreTrainedModel = AutoModel.from_config(own, **chosen)
    body.set_input_embeddings(NoEmbedding())
    return body


class HeterogeneousMoeForCausalLM(PreTrainedModel, GenerationMixin):
    """Experts of any architecture between one embedding and one head, mixed for each sequence by its prompt."""

    config_class = HeterogeneousMoeConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _tied_weights_keys = {HEAD: EMBED}  # noqa: RUF012 - as in transformers

    def __init__(self, config: HeterogeneousMoeConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.router = nn.Linear(config.hidden_size, len(config.experts))
        self.experts = nn.ModuleList(Expert(config, number) for number in range(len(config.experts)))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The shared embedding."""
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Change the shared embedding."""
        self.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """The shared head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Change the shared head."""
        self.head = new_embeddings  # type: ignore[assignment]

    def forward(  # noqa: PLR0913 - the inputs of transformers' models
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: ExpertCaches | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        prompt_mask: torch.Tensor | None = None,
        mixture: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> HeterogeneousMoeOutput:
        """Run the experts that each row's mixture names, and no others.

        The mixture [rows, experts] is the one given, else that of `past_key_values`, else decided by the tokens in
        `prompt_mask` [rows, tokens]: by default those before the first label, or all in `attention_mask`.
        """
        embeddings = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache, labels)
        seen = cache.seen if cache is not None else 0
        mask = _mask(attention_mask, embeddings, seen)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, seen:] if position_ids is None else position_ids
        router_logits = None
        if mixture is None and cache is not None:
            mixture = cache.mixture
        if mixture is None:
            router_logits = self._route(embeddings, mask[:, seen:], prompt_mask, labels)
            mixture = mixture_of(router_logits, self.config.experts_per_prompt)
        states = self._mixed(embeddings, mask, positions, mixture, cache)
        if cache is not None:
            cache.mixture, cache.seen = mixture.detach(), seen + embeddings.shape[1]
        if labels is not None:
            return self._scored(states, labels, mixture, router_logits, num_items_in_batch)
        kept = states[:, -logits_to_keep:] if logits_to_keep else states
        return HeterogeneousMoeOutput(
            logits=self.head(kept), past_key_values=cache, mixture=mixture, router_logits=router_logits
        )

    def _route(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        prompt_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute router logits [rows, experts] from the tokens of the prompts."""
        read = mask if prompt_mask is None else prompt_mask
        if labels is not None and prompt_mask is None:
            read = before_labels(read, labels)
        logits: torch.Tensor = self.router(prompt_mean(embeddings, read).to(embeddings.dtype))
        return logits.float()

    def _cache(
        self, given: ExpertCaches | None, use_cache: bool | None, labels: torch.Tensor | None
    ) -> ExpertCaches | None:
        if given is not None and not isinstance(given, ExpertCaches):
            raise ValueError("past_key_values are those of an earlier pass of this model, or none")
        wanted = self.config.use_cache if use_cache is None else use_cache
        if given is not None or not wanted or labels is not None or self.training:
            return given
        return self.new_cache()

    def new_cache(self) -> ExpertCaches:
        """Make an empty cache."""
        return ExpertCaches([expert.body.config for expert in self._experts()])

    def _experts(self) -> Iterator[Expert]:
        return (cast("Expert", expert) for expert in self.experts)

    def _mixed(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        mixture: torch.Tensor,
        cache: ExpertCaches | None,
    ) -> torch.Tensor:
        """Sum up what the experts say of the rows that they answer, by the rows' weights."""
        total = torch.zeros_like(embeddings)
        positions = positions.expand(len(embeddings), -1)
        for number, expert in enumerate(self._experts()):
            rows = (mixture[:, number] > 0).nonzero().squeeze(1)
            if not len(rows):
                continue
            own = cache.caches[number] if cache is not None else None
            states = expert(embeddings[rows], mask[rows], positions[rows], own)
            weights = mixture[rows, number].to(states.dtype)
            # Under autocast an expert may answer in another dtype than that of the embedding.
            total = total.index_add(0, rows, (weights[:, None, None] * states).to(total.dtype))
        return total

    def _scored(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        mixture: torch.Tensor,
        router_logits: torch.Tensor | None,
        n_items: torch.Tensor | int | None,
    ) -> HeterogeneousMoeOutput:
        """Compute cross-entropy where a label is due, and nowhere else: the head is the dearest matrix."""
        targets = labels[:, 1:]
        due = targets != -100
        logits = self.head(states[:, :-1][due])
        total = nn.functional.cross_entropy(logits.float(), targets[due], reduction="sum")
        loss = total / (due.sum().clamp(min=1) if n_items is None else n_items)
        balance = balance_loss(router_logits, mixture) if router_logits is not None else None
        if balance is not None and self.config.router_aux_loss_coef:
            loss = loss + self.config.router_aux_loss_coef * balance
        return HeterogeneousMoeOutput(
            loss=loss, logits=logits, mixture=mixture, router_logits=router_logits, aux_loss=balance
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,  # noqa: ANN401 - as in transformers
        model_kwargs: dict[str, Any],
        *_: Any,  # noqa: ANN401 - differs by version
        **__: Any,  # noqa: ANN401 - differs by version
    ) -> None:
        """Give `generate` a cache that holds all experts'."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation {generation_config.cache_implementation} is not possible here")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        *args: Any,  # noqa: ANN401 - as in transformers
        **options: Any,  # noqa: ANN401 - as in transformers
    ) -> dict[str, Any]:
        """Keep the mixture that the prompt decided, also where no cache is kept."""
        found = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **options)
        if not isinstance(found.get("past_key_values"), ExpertCaches):
            found["mixture"] = outputs["mixture"]
        return found


def _mask(given: torch.Tensor | None, embeddings: torch.Tensor, seen: int) -> torch.Tensor:
    """Give the mask [rows, seen + tokens]."""
    if given is not None and given.ndim != 2:
        raise ValueError(f"attention_mask is [rows, tokens] here, and has {given.ndim} dimensions")
    if given is None:
        return embeddings.new_ones((len(embeddings), seen + embeddings.shape[1]), dtype=torch.long)
    return given
