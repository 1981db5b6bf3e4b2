"""From prompts to mixtures: what the router reads, then what it decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.runtime.features import FeatureSpec, prompt_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from mediator_cli.runtime.prompts import PromptReader
    from mediator_cli.runtime.router import Router, Routing


def route_prompts(
    model: PreTrainedModel, reader: PromptReader, router: Router, prompts: Sequence[Sequence[int]]
) -> Routing:
    """Route prompts of token ids by the features of the dense expert `model`; raise BundleError for an empty one."""
    contents = [reader.content(list(prompt)) for prompt in prompts]
    spec = FeatureSpec(router.record.features, router.record.layer)
    return router.route(prompt_features(model, reader.tokenizer, spec, contents))
