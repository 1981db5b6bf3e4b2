"""From prompts to mixtures: what the router reads, then what it decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from mediator_cli.runtime.ask import asked_ids, asking_reader
from mediator_cli.runtime.features import prompt_features, spec_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from mediator_cli.runtime.gradients import Experts
    from mediator_cli.runtime.prompts import PromptReader
    from mediator_cli.runtime.router import Router, Routing


def route_prompts(model: Experts, reader: PromptReader, router: Router, prompts: Sequence[Sequence[int]]) -> Routing:
    """Route prompts of token ids by the dense expert's features, or by asking the experts.

    Raises BundleError for an empty one.
    """
    if router.record.features == "none":
        return router.route(np.zeros((len(prompts), 0)))
    spec = spec_of(router.record)
    if spec.asks:
        asked = [asked_ids(reader, spec, prompt) for prompt in prompts]
        return router.route(asking_reader(model, reader, spec).read(asked))
    contents = [reader.content(list(prompt)) for prompt in prompts]
    return router.route(prompt_features(cast("PreTrainedModel", model), reader.tokenizer, spec, contents))
