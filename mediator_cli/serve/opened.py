"""A bundle opened to be served: the engine that answers, and what its clients may know."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.bundle.manifest import MANIFEST, read_manifest
from mediator_cli.runtime.wanted import answering, chooses
from mediator_cli.serve.api.settings import Served
from mediator_cli.serve.engine.engine import start_engine
from mediator_cli.serve.engine.request import Draw

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.serve.engine.engine import Engine, Limits


@dataclass(frozen=True)
class Serving:
    """An engine at work, and what it serves."""

    engine: Engine
    served: Served


def start_serving(folder: Path, model: RoutedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Serving:
    """Start to answer for an opened bundle, which nobody else must use from now on."""
    manifest = read_manifest(folder)
    engine = start_engine(model, tokenizer, limits)
    names = answering(manifest)
    served = Served(
        name=folder.resolve().name,
        experts=names,
        # The engine's thread uses the other one.
        tokenizer=copy.deepcopy(tokenizer),
        n_ids=engine.words.n_ids,
        context=engine.context,
        routes=bool(names) and chooses(manifest),
        pins=bool(names) and manifest.router is not None and manifest.gates is None,
        draw=usual_draw(model),
        created=int((folder / MANIFEST).stat().st_mtime),
    )
    return Serving(engine, served)


def usual_draw(model: RoutedModel) -> Draw:
    """Draw as the model's authors recommend in its generation config, and at temperature 1 where they say nothing."""
    config = model.generation_config
    temperature, top_p, top_k = (getattr(config, name, None) for name in ("temperature", "top_p", "top_k"))
    return Draw(
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=int(top_k or 0),
    )
