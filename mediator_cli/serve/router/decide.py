"""A router without its experts: opened from a bundle or from an exported folder, it decides who answers.

Reads what the bundle's own router reads, so that both decide alike, bit for bit. An exported folder needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mediator_cli.bundle.manifest import MANIFEST, bundle_file, read_manifest
from mediator_cli.bundle.router_folder import ROUTER_RECORD, TABLE, read_router_folder
from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.read import STORED_DTYPES, widen
from mediator_cli.errors import BundleError, CheckpointError, Problem
from mediator_cli.runtime.features import FeatureReader, row_means, spec_of, text_reader
from mediator_cli.runtime.prompts import chat_ids, load_tokenizer, prompt_reader
from mediator_cli.runtime.router import read_recorded, read_router

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.bundle.router_folder import TableRecord
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.runtime.features import Floats32
    from mediator_cli.runtime.prompts import Message, PromptReader
    from mediator_cli.runtime.router import Router

_DAMAGED = "the folder is damaged; export the router again"


@dataclass(frozen=True)
class Decision:
    """Who answers: weights of the experts that take part, none for the dense expert alone.

    `probabilities` of all experts, `uncertainty` in [0, 1] and `score` are what the router made of the prompt, and
    absent where nobody asked it.
    """

    weights: Mapping[str, float]
    probabilities: Mapping[str, float] = field(default_factory=dict)
    uncertainty: float | None = None
    score: float | None = None
    is_outside: bool = False


@dataclass(frozen=True, eq=False)
class OpenRouter:
    """A router that is ready to decide; `models` are a server's names of the experts, `dense` that of the dense one.

    Its tokenizer is not made for several threads: ask it from one at a time.
    """

    folder: Path
    router: Router
    dense: str
    models: Mapping[str, str]
    prompts: PromptReader | None = None
    features: FeatureReader | None = None

    @property
    def record(self) -> RouterRecord:
        """What the router reads and how it decides."""
        return self.router.record

    def decide_chat(self, messages: Sequence[Message]) -> Decision:
        """Decide for a chat by its last user turn; raise BundleError where the features cannot be computed."""
        if self.prompts is None:
            return self._decide([])
        try:
            ids = chat_ids(self.prompts.tokenizer, messages)
        except Exception:  # noqa: BLE001 - a template is a program of the model's authors; the server will judge
            turns = [message["content"] for message in messages if message["role"] == "user"]
            return self._decide(self.prompts.encode(turns[-1]) if turns else [], is_content=True)
        return self._decide(ids)

    def decide_text(self, text: str) -> Decision:
        """Decide for a prompt as it is, chat template included where it has one."""
        return self._decide(self.prompts.tokenizer.encode(text) if self.prompts is not None else [])

    def decide_ids(self, ids: Sequence[int]) -> Decision:
        """Decide for a prompt of token ids."""
        return self._decide(ids)

    def _decide(self, ids: Sequence[int], *, is_content: bool = False) -> Decision:
        if self.features is None or self.prompts is None:
            return self._of(np.zeros((1, 0)))
        content = list(ids) if is_content else self.prompts.content(ids)
        if self.features.spec.asks and not is_content and content and self.features.spec.reads == "prompt":
            content = list(ids)
        # Nothing to read, such as a chat without a user: the dense expert answers, as in our own server.
        return self._of(self.features.read([content])) if content else Decision({})

    def _of(self, features: NDArray[np.floating[Any]]) -> Decision:
        routing = self.router.route(features)
        weights = dict(zip(routing.experts, routing.weights[0].tolist(), strict=True))
        return Decision(
            {name: weight for name, weight in weights.items() if weight},
            dict(zip(routing.experts, routing.probabilities[0].tolist(), strict=True)),
            float(routing.entropy[0]),
            float(routing.score[0]),
            bool(routing.is_outside[0]),
        )


def open_router(folder: Path) -> OpenRouter:
    """Open the router of a bundle, or one that `mediator export --to router` wrote.

    Raises BundleError when there is none, or it is damaged.
    """
    return _open_exported(folder) if (folder / ROUTER_RECORD).is_file() else _open_bundle(folder)


def _open_exported(folder: Path) -> OpenRouter:
    whole = read_router_folder(folder)
    router = read_recorded(folder, whole.router)
    if whole.router.features == "none":
        return OpenRouter(folder, router, whole.dense, whole.models)
    reader = prompt_reader(load_tokenizer(folder))
    if whole.router.features == "text":
        features = text_reader(reader.tokenizer)
    elif whole.embeddings is not None:
        rows = _rows_of(folder, whole.embeddings)
        spec = spec_of(whole.router)
        features = FeatureReader(spec, lambda prompts: row_means(rows, prompts), n_ids=whole.embeddings.shape[0])
    else:
        place = f"{folder / ROUTER_RECORD} embeddings"
        raise BundleError(Problem(place, f"are missing, which features {whole.router.features} need", _DAMAGED))
    return OpenRouter(folder, router, whole.dense, whole.models, reader, features)


def _rows_of(folder: Path, record: TableRecord) -> Callable[[list[int]], Floats32]:
    """Map a table of embeddings into memory and give rows of it as float32; pages are read as they are needed."""
    file = bundle_file(folder, record.file.name)
    try:
        info = {info.name: info for info in read_header(file).tensors}.get(TABLE)
    except CheckpointError as error:
        raise BundleError(error.problems) from None
    if info is None or (info.dtype, info.shape) != (record.dtype, record.shape):
        message = f"is not {record.dtype} {list(record.shape)} as {ROUTER_RECORD} says"
        raise BundleError(Problem(f"{file}: {TABLE}", message, _DAMAGED))
    table = np.memmap(file, STORED_DTYPES[info.dtype], "r", info.start, cast("Any", info.shape))

    def rows(tokens: list[int]) -> Floats32:
        stored = table[tokens]
        out = np.empty(stored.shape, np.float32)
        widen(stored.reshape(-1), info.dtype, out.reshape(-1))
        return out

    return rows


def _open_bundle(folder: Path) -> OpenRouter:
    manifest = read_manifest(folder)
    router = read_router(folder, manifest)
    if router is None:
        what = "gates inside the model, which no other server runs" if manifest.gates else "no router"
        hint = f"fit one with `mediator fit-router {folder}`"
        raise BundleError(Problem(str(folder / MANIFEST), f"the bundle has {what}", hint))
    models = {name: name for name in router.record.experts}
    if router.record.features == "none":
        return OpenRouter(folder, router, "dense", models)
    from mediator_cli.runtime.dense_features import folder_reader

    reader = prompt_reader(load_tokenizer(folder))
    features = folder_reader(folder, reader.tokenizer, spec_of(router.record))
    return OpenRouter(folder, router, "dense", models, reader, features)
