"""From a model's prompts to their mixtures: what the router reads, then what it decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.errors import BundleError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.runtime.router import Routing


def route_prompts(model: RoutedModel, prompts: Sequence[Sequence[int]]) -> Routing:
    """Route prompts of token ids; raise BundleError when the bundle has no router or tokenizer."""
    from mediator_cli.runtime.features import FeatureSpec, prompt_features
    from mediator_cli.runtime.prompts import prompt_reader

    opened = model.opened
    if opened.router is None or opened.tokenizer is None:
        hint = "fit one with `mediator fit-router`, or give a mixture"
        raise BundleError(Problem(str(opened.path), "the bundle has no router", hint))
    reader = prompt_reader(opened.tokenizer)
    record = opened.router.record
    contents = [reader.content(list(prompt)) for prompt in prompts]
    spec = FeatureSpec(record.features, record.layer)
    return opened.router.route(prompt_features(model, opened.tokenizer, spec, contents))
