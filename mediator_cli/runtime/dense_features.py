"""Prompt features from a bundle's folder, reading as little of the dense expert as they need."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from mediator_cli.bundle.tensors import as_tensor
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.checkpoint.read import open_files, read_slab
from mediator_cli.errors import BundleError, Problem, first_line
from mediator_cli.runtime.features import FeatureReader, FeatureSpec, embedding_means, model_reader, text_reader
from mediator_cli.runtime.prompts import prompt_reader

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.checkpoint.header import TensorInfo


def folder_reader(folder: Path, tokenizer: PreTrainedTokenizerBase, spec: FeatureSpec) -> FeatureReader:
    """Make a reader over the dense expert in a folder.

    `text` reads nothing of it, `embedding_mean` the rows of the tokens that occur, `hidden_mean` loads the model;
    where the experts are asked, the whole bundle is opened.
    Raises BundleError when the dense expert does not load.
    """
    if spec.kind == "text":
        return text_reader(tokenizer)
    if spec.asks:
        from mediator_cli.runtime.ask import asking_reader
        from mediator_cli.runtime.open import open_bundle

        return asking_reader(open_bundle(folder), prompt_reader(tokenizer), spec)
    table = input_embeddings(folder) if spec.kind == "embedding_mean" else None
    if table is not None:
        rows = partial(read_rows, table)
        return FeatureReader(spec, partial(embedding_means, rows), n_ids=table.shape[0])
    from mediator_cli.runtime.open import load_dense

    return model_reader(load_dense(folder), tokenizer, spec)


def input_embeddings(folder: Path) -> TensorInfo | None:
    """Find the input embeddings among the stored tensors; None where they are stored under another name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _fault(folder, error) from None
    weight = model.get_input_embeddings().weight
    name = next((name for name, parameter in model.named_parameters() if parameter is weight), "")
    info = read_tensors(folder).get(name)
    return info if info is not None and info.shape == tuple(weight.shape) else None


def read_rows(table: TensorInfo, tokens: list[int]) -> torch.Tensor:
    """Read rows of a stored table [tokens, hidden], in its own dtype."""
    width = table.shape[1]
    with open_files([table.file]) as descriptors:
        rows = np.stack([read_slab(descriptors, table, n * width, (n + 1) * width) for n in tokens])
    return as_tensor(rows, table.dtype)


def _fault(folder: Path, error: Exception) -> BundleError:
    hint = "the router needs a model that transformers knows; features text needs none"
    return BundleError(Problem(str(folder), f"the dense expert does not load: {first_line(error)}", hint))
