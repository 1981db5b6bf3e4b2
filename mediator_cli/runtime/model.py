"""A bundle as a transformers model that mixes its experts for each row of a batch."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from mediator_cli.errors import BundleError, Problem
from mediator_cli.runtime.combine import Combine, expand, find_members, join_hidden, join_logits
from mediator_cli.runtime.gates import Gating
from mediator_cli.runtime.mixing import as_weights, divide, gated_division, spread
from mediator_cli.runtime.routing import route_prompts
from mediator_cli.runtime.watch import watch_gates

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.runtime.combine import Members
    from mediator_cli.runtime.mixing import Division, MixtureCache, Wanted
    from mediator_cli.runtime.modules import Mixer
    from mediator_cli.runtime.prompts import PromptReader
    from mediator_cli.runtime.router import Router, Routing


@dataclass(frozen=True)
class Opened:
    """What is behind a model, and how mixtures are computed: `switch` tokens pay for a mixed matrix.

    `modules` are what the mixers mix, in the same order. Without experts that mix, all is answered by the dense model.
    `manifest` is None of a model whose experts were given by hand.
    """

    path: Path
    experts: tuple[str, ...]
    manifest: Manifest | None
    reader: PromptReader | None
    router: Router | None
    mixers: tuple[Mixer, ...]
    modules: tuple[Any, ...]
    cache: MixtureCache
    switch: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that prompts are read with; None without a router."""
        return self.reader.tokenizer if self.reader else None

    @property
    def is_mixed(self) -> bool:
        """Whether there is anything to mix."""
        return bool(self.mixers)


@dataclass(frozen=True)
class Planned:
    """How the last pass was divided, and the batch that it was for."""

    weights: torch.Tensor
    shape: tuple[int, int]
    division: Division


@dataclass(frozen=True)
class MixState:
    """What is mixed at present: the weights [rows, experts] that were set, None = route; and the last pass.

    `is_prompt` [rows, tokens] says where prompts are, if a caller knows. `members` answer the rows of the last call
    where outputs are combined; `is_called` while such a call runs.
    """

    weights: torch.Tensor | None = None
    planned: Planned | None = None
    members: Members | None = None
    is_called: bool = False
    is_prompt: torch.Tensor | None = None


class RoutedModel(PreTrainedModel):
    """A model of a bundle; made by `open_bundle`, which derives it from the model's own class.

    `generate` reads the prompt, routes it, and mixes experts for each row. `mixing` sets the mixture by hand. Calling
    the model itself outside `mixing` routes every row on all its tokens, so score answers inside `mixing`. `combine`
    says how several experts of a mixture answer, and may be set at any time between two sequences.
    """

    opened: Opened
    state: MixState
    combine: Combine
    gating: Gating | None

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Name the experts in the order of a mixture's weights."""
        return self.opened.experts

    def route(self, prompts: Sequence[Sequence[int]]) -> Routing:
        """Decide the mixture of each prompt, given as token ids, chat template included or not.

        Of a bundle with gates: the mean of what they choose on the prompt, over all of them. Raises BundleError when
        the bundle has no router or a prompt is empty.
        """
        if self.gating is not None:
            return watch_gates(self, self.gating, prompts)
        router, reader = self.opened.router, self.opened.reader
        if router is None or reader is None:
            hint = "fit one with `mediator fit-router`, or give a mixture"
            raise BundleError(Problem(str(self.opened.path), "the bundle has no router", hint))
        with self.mixing("dense"):
            return route_prompts(self, reader, router, prompts)

    @contextmanager
    def mixing(self, mixture: Wanted) -> Iterator[None]:
        """Answer with this mixture inside the block: `dense`, an expert, {expert: weight}, or [rows, experts].

        One row serves batches of any size; several serve batches of that many rows, or whole multiples of it whose
        rows stay together, as beams do. Raises BundleError for unknown experts and wrong shapes.
        """
        before = self.state
        weights = as_weights(mixture, self.expert_names, str(self.opened.path)).to(self.device)
        self.state = MixState(weights)
        try:
            yield
        finally:
            self.state = replace(before, planned=None)
            self._set_division(None)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,  # noqa: ANN401
        mixture: Wanted | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Generate as the model's own `generate` does, with each row's mixture decided by its prompt.

        `mixture` sets it by hand. Raises BundleError when there are no token ids to route on, and for beams of experts
        that are run apart.
        """
        generate = super().generate  # type: ignore[misc]
        self._refuse_beams(kwargs)
        if mixture is None and (self.state.weights is not None or self.gating is not None):
            # Some caches turn the mask into another form before the pass that reads the prompt.
            mask = kwargs.get("attention_mask")
            with self.reading(None if mask is None or mask.ndim != 2 else mask.bool()):
                return generate(inputs, *args, **kwargs)
        if mixture is None:
            ids = inputs if inputs is not None else kwargs.get("input_ids")
            mixture = self._route_batch(ids, kwargs.get("attention_mask"))
        with self.mixing(mixture):
            return generate(inputs, *args, **kwargs)

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Refuse: the bundle's folder is the saved form, and this would write the dense expert alone."""
        raise BundleError(
            Problem(str(self.opened.path), "a routed model is not saved anew", "copy the bundle's folder")
        )

    def watch(self) -> None:
        """Hear of every call of the model and of its decoder."""
        self.register_forward_pre_hook(self.before_call, with_kwargs=True)
        self.base_model.register_forward_pre_hook(self.before_pass, with_kwargs=True)
        self.base_model.register_forward_hook(self.after_pass)
        self.register_forward_hook(self.after_call, always_call=True)

    def before_call(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Repeat the rows of a call for their experts, where these are run apart; a forward hook of the model."""
        if self.combine == "parameters" or self.is_gated:
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        given = ids if ids is not None else kwargs["inputs_embeds"]
        weights = self.state.weights
        if weights is None:
            weights = self._weights_of_call(ids, kwargs)
        rows = spread(weights, given.shape[0], str(self.opened.path))
        before = self.state.members
        # The same tensor for every token of a sequence tells that nothing has changed since the last pass.
        is_same = before is not None and before.rows is not None and torch.equal(before.rows, rows)
        members = before if is_same else find_members(rows, self.combine, str(self.opened.path))
        self.state = replace(self.state, members=members, is_called=True)
        return None if members is None or members.is_alone else expand(args, kwargs, members)

    def after_pass(self, _: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        """Average hidden states where these are combined; a forward hook of the decoder."""
        members = self._joined()
        if members is None or self.combine != "hidden":
            return None
        name = 0 if isinstance(output, tuple) else "last_hidden_state"
        return _with_value(output, name, join_hidden(output[name], members))

    def after_call(self, _: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        """Combine the logits of the members of each row; a forward hook of the model, called after errors too."""
        members = self._joined()
        self.state = replace(self.state, is_called=False)
        if members is None or output is None:
            return None
        name = 0 if isinstance(output, tuple) else "logits"
        return _with_value(output, name, join_logits(output[name], members, self.combine))

    def _joined(self) -> Members | None:
        """Give the members of the call that runs, where there is something to combine."""
        members = self.state.members if self.state.is_called else None
        return None if members is None or members.is_alone else members

    def _refuse_beams(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or self.generation_config
        n_beams = kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
        if self.combine != "parameters" and n_beams > 1:
            message = f"{n_beams} beams cannot be followed while experts run apart (combine {self.combine})"
            raise BundleError(Problem("num_beams", message, "use one beam, or combine parameters"))

    def before_pass(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell all mixers the parts of the batch that is about to run; a forward hook of the decoder."""
        ids = args[0] if args else kwargs.get("input_ids")
        given = ids if ids is not None else kwargs["inputs_embeds"]
        shape = (given.shape[0], given.shape[1])
        if self.is_gated:
            self._begin_gated(shape[0], kwargs)
            return
        called = self.state.members if self.state.is_called else None
        weights = self.state.weights if called is None else called.weights
        if weights is None:
            weights = self._weights_of_call(ids, kwargs)
        last = self.state.planned
        if last and last.weights is weights and last.shape == shape and not last.division.waits:
            return
        rows = spread(weights, shape[0], str(self.opened.path))
        division = divide(rows, shape[1], self.opened.cache, self.opened.switch)
        self.state = replace(self.state, planned=Planned(weights, shape, division))
        self._set_division(division)

    @property
    def is_gated(self) -> bool:
        """Whether gates choose the experts of what runs; a mixture given by hand comes before them."""
        return self.gating is not None and self.state.weights is None

    def _begin_gated(self, n_rows: int, kwargs: dict[str, Any]) -> None:
        mask = self.state.is_prompt
        if mask is None and isinstance(given := kwargs.get("attention_mask"), torch.Tensor) and given.ndim == 2:
            mask = given.bool()
        if mask is not None and len(mask) != n_rows:
            mask = spread(mask, n_rows, str(self.opened.path))
        continues = _goes_on(kwargs)
        if self.gating is not None:
            self.gating.begin(None if continues else mask, continues=continues)
        self.state = replace(self.state, planned=None)
        self._set_division(gated_division(n_rows, len(self.expert_names), self.device))

    @contextmanager
    def reading(self, is_prompt: torch.Tensor | None) -> Iterator[None]:
        """Say where prompts are [rows, tokens] in the calls inside the block, for gates that choose by sequence."""
        before = self.state.is_prompt
        self.state = replace(self.state, is_prompt=is_prompt)
        try:
            yield
        finally:
            self.state = replace(self.state, is_prompt=before)

    def _weights_of_call(self, ids: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor:
        if _goes_on(kwargs):
            hint = "wrap the calls in `with model.mixing(...)`, or use generate"
            raise BundleError(Problem("", "the mixture of a sequence that goes on is not known", hint))
        return self._route_batch(ids, kwargs.get("attention_mask"))

    def _route_batch(self, ids: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        if ids is None:
            raise BundleError(Problem("", "there are no token ids to route on", "give a mixture, as mixture='dense'"))
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        prompts = [row[kept].tolist() for row, kept in zip(ids, keep, strict=True)]
        return torch.from_numpy(self.route(prompts).weights).to(self.device)

    def _set_division(self, division: Division | None) -> None:
        parts = division.parts if division else ()
        for mixer in self.opened.mixers:
            mixer.parts = parts


def make_routed(model: PreTrainedModel, opened: Opened, combine: Combine) -> RoutedModel:
    """Turn a loaded model, whose modules mix by now, into a RoutedModel of its own class, in place."""
    model.__class__ = type(f"Routed{type(model).__name__}", (RoutedModel, type(model)), {})
    if not isinstance(model, RoutedModel):
        raise TypeError(type(model).__name__)
    model.opened, model.combine, model.state, model.gating = opened, combine, MixState(), None
    model.watch()
    return model


def _with_value(output: Any, name: str | int, value: torch.Tensor) -> Any:  # noqa: ANN401 - a tuple or a ModelOutput
    if isinstance(output, tuple):
        return (value, *output[1:])
    output[cast("str", name)] = value
    return output


def _goes_on(kwargs: dict[str, Any]) -> bool:
    """Whether a call goes on with a sequence that an earlier one began."""
    return any(_has_begun(kwargs.get(name)) for name in ("past_key_values", "cache_params"))


def _has_begun(cache: Any) -> bool:  # noqa: ANN401 - caches differ by model
    """Whether a cache holds something of the sequence; those without attention know no length, only that they do."""
    if cache is None:
        return False
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:
        return bool(cache.has_previous_state())
