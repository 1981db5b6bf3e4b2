"""Run prompts through a model folder one decoder layer at a time, so that memory holds one layer, never the model.

For all that changes a layer by what it sees there, layer after layer (gates, merged or dropped experts): read a layer,
look, change its parameters in place, then advance all prompts through the changed layer:

    model = open_layerwise(folder)
    batches = start(model, prompts)                        # lists of token ids; the embeddings are read, no layer
    for number in range(model.n_layers):
        layer = read_layer(model, number)                  # an nn.Module of transformers; freed when dropped
        if (router := router_of(layer)) is not None:       # None where the layer is dense
            for batch in batches:
                states = router_states(layer, number, batch)       # [real tokens, hidden]: what the gates read
                logits = states @ router.weight.T                  # [real tokens, experts]
                output = expert_output(layer, 0, states)           # [real tokens, hidden]: expert 0, not weighted
            router.weight.data.copy_(...)
        for batch in batches:
            advance(layer, number, batch)                  # batch.hidden: input of the next layer

States equal those of a forward of the whole model in the same dtype up to rounding. Beside the layer, the hidden
states of all prompts are kept: 4 bytes × tokens × hidden size in float32. No dropout, no gradients, no random numbers.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from mediator_cli.bundle.tensors import as_tensor
from mediator_cli.checkpoint.header import read_json, read_tensors
from mediator_cli.checkpoint.moe_layout import FORMATS, MoeLayout, moe_layout
from mediator_cli.checkpoint.read import open_files, read_slab
from mediator_cli.errors import CheckpointError, Problem, first_line
from mediator_cli.runtime.dense_features import read_rows
from mediator_cli.runtime.features import length_batches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from mediator_cli.checkpoint.header import TensorInfo

_ROUTERS = ("mlp.gate", "block_sparse_moe.router")
_EXPERTS = ("mlp.experts", "block_sparse_moe.experts")
_ONE_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_HALVES = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1}
_RENAMED = (
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
)
_DAMAGED = "is the checkpoint complete? merge or fetch it again"


@dataclass(frozen=True)
class LayerwiseModel:
    """A model folder opened for reading layer by layer; `layout` is None where the model is dense.

    `skeleton` is the model without weights, its layers replaced by recorders; `layers` are the layers, on `meta`.
    """

    folder: Path
    layout: MoeLayout | None
    skeleton: PreTrainedModel
    layers: tuple[torch.nn.Module, ...]
    tensors: Mapping[str, TensorInfo]
    dtype: torch.dtype

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return int(self.skeleton.config.hidden_size)

    def bytes_before(self, number: int) -> int:
        """Bytes of all layers before one, as they are stored: how much is read by then; of all, for the last + 1."""
        names = tuple(self.prefix_of(each) for each in range(number))
        return sum(info.n_bytes for name, info in self.tensors.items() if name.startswith(names))

    def prefix_of(self, number: int) -> str:
        """Give what the names of a layer's tensors begin with."""
        return f"{self.skeleton.base_model_prefix}.layers.{number}."


@dataclass
class Batch:
    """Some prompts on their way through the layers, padded at the right.

    `rows` are their places among all prompts, `hidden` [rows, width, hidden] is the input of the next layer, `real`
    [rows, width] is true at tokens that are no padding, `arguments` are what each layer takes besides.
    """

    rows: tuple[int, ...]
    hidden: torch.Tensor
    real: torch.Tensor
    arguments: tuple[Mapping[str, Any], ...]

    @property
    def lengths(self) -> torch.Tensor:
        """Number of real tokens of each row [rows]."""
        return self.real.sum(dim=1)

    @property
    def row_of_token(self) -> torch.Tensor:
        """For each real token [real tokens], the place of its prompt among all prompts."""
        return torch.tensor(self.rows).repeat_interleave(self.lengths)


class _Recorder(torch.nn.Module):
    """Stands where a layer was: notes what that layer would be called with and passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:  # noqa: ANN401 - models differ
        self.seen = arguments
        return hidden


class _Reached(Exception):
    """Ends a pass at the router, which the state has reached."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states


def open_layerwise(folder: Path, dtype: torch.dtype = torch.float32) -> LayerwiseModel:
    """Open a model folder, MoE or dense, reading only its config and headers.

    Layers are computed in `dtype`, whatever they are stored in. Raises CheckpointError where transformers knows no
    such model, or its layers are not where those of Llama are.
    """
    tensors = read_tensors(folder)
    skeleton = _skeleton(folder, dtype)
    config = read_json(folder / "config.json")
    is_moe = config.get("model_type") in FORMATS
    layout = moe_layout(str(folder), config, tensors) if is_moe else None
    decoder = cast("Any", skeleton.base_model)
    if not all(hasattr(decoder, part) for part in ("layers", "norm", "rotary_emb", "embed_tokens")):
        message = f"{type(skeleton).__name__} cannot be run layer by layer"
        raise CheckpointError(Problem(str(folder), message, "use a model of the Llama, Mistral, Qwen or Granite kind"))
    layers = tuple(decoder.layers)
    # Neither rotary frequencies nor recorders have weights; all else of the skeleton is never computed with.
    decoder.rotary_emb = type(decoder.rotary_emb)(config=skeleton.config)
    decoder.layers = torch.nn.ModuleList(_Recorder() for _ in layers)
    decoder.norm = torch.nn.Identity()
    return LayerwiseModel(folder, layout, skeleton, layers, tensors, dtype)


def model_layout(model: LayerwiseModel) -> MoeLayout:
    """Give the layout of an MoE; raise CheckpointError where the model is dense or of an unknown format."""
    if model.layout is not None:
        return model.layout
    return moe_layout(str(model.folder), read_json(model.folder / "config.json"), model.tensors)


def start(model: LayerwiseModel, prompts: Sequence[Sequence[int]], batch_tokens: int = 4096) -> list[Batch]:
    """Lay prompts, given as token ids, out in batches of about one length and read their embeddings.

    Raises CheckpointError for a prompt that is empty or has ids that the model lacks.
    """
    table = _embeddings(model)
    for number, prompt in enumerate(prompts, 1):
        if not prompt or max(prompt) >= table.shape[0]:
            message = f"has token id {max(prompt)}, the model knows {table.shape[0]}" if prompt else "is empty"
            raise CheckpointError(Problem(f"prompt {number}", message, "give prompts and tokenizer of this model"))
    return [_batch(model, table, prompts, rows) for rows in length_batches(prompts, batch_tokens)]


def embedded(model: LayerwiseModel, tokens: Sequence[int]) -> torch.Tensor:
    """Read the input embeddings [tokens, hidden] as they are stored, in the model's dtype."""
    known = sorted(set(tokens))
    places = {token: place for place, token in enumerate(known)}
    rows = read_rows(_embeddings(model), known).to(model.dtype)
    return rows[[places[token] for token in tokens]]


def read_layer(model: LayerwiseModel, number: int) -> torch.nn.Module:
    """Read one decoder layer from disk as the module of transformers, in evaluation mode.

    Raises CheckpointError naming a tensor that is missing, superfluous or of another shape.
    """
    layer = copy.deepcopy(model.layers[number]).to_empty(device="cpu")
    wanted = dict(layer.named_parameters())
    prefix = model.prefix_of(number)
    filled: set[str] = set()
    for name, info in model.tensors.items():
        if name.startswith(prefix):
            target, part = parameter_of(name.removeprefix(prefix), wanted)
            _fill(info, part)
            filled.add(target)
    if missing := wanted.keys() - filled:
        raise CheckpointError(Problem(f"{model.folder}: {prefix}{min(missing)}", "is missing", _DAMAGED))
    return layer.eval().requires_grad_(False)


def router_of(layer: torch.nn.Module) -> torch.nn.Module | None:
    """Find the router of a layer, whose `weight` [experts, hidden] are the gates; None where the layer is dense."""
    return _part(layer, _ROUTERS)


def experts_of(layer: torch.nn.Module) -> torch.nn.Module | None:
    """Find the routed experts of a layer: `gate_up_proj` [experts, 2 × inner, hidden], `down_proj` [experts, hidden,
    inner]; None where the layer is dense.
    """
    return _part(layer, _EXPERTS)


@torch.no_grad()
def router_states(layer: torch.nn.Module, number: int, batch: Batch) -> torch.Tensor:
    """Compute what the gates of a layer read [real tokens, hidden]; neither router nor experts run.

    Tokens come row by row. Of a dense layer, it is what its feed-forward block reads.
    """
    reader = router_of(layer) or layer.get_submodule("mlp")

    def stop(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    hook = reader.register_forward_pre_hook(stop)
    try:
        layer(batch.hidden, **batch.arguments[number])
    except _Reached as reached:
        return reached.states.reshape(batch.hidden.shape)[batch.real]
    finally:
        hook.remove()
    raise CheckpointError(Problem(f"layer {number}", "never reads its gates", "report the model's architecture"))


@torch.no_grad()
def expert_output(layer: torch.nn.Module, expert: int, states: torch.Tensor) -> torch.Tensor:
    """Compute what one routed expert gives for states [tokens, hidden], with weight 1."""
    experts = experts_of(layer)
    if experts is None:
        raise ValueError("the layer is dense")
    chosen = torch.full((len(states), 1), expert)
    return cast("torch.Tensor", experts(states, chosen, torch.ones(len(states), 1, dtype=states.dtype)))


def walk(model: LayerwiseModel, batches: Sequence[Batch]) -> Iterator[tuple[int, torch.nn.Module]]:
    """Read one layer after the other; behind each the batches go through it as it is then, but for the last."""
    for number in range(model.n_layers):
        layer = read_layer(model, number)
        yield number, layer
        if number < model.n_layers - 1:
            for batch in batches:
                advance(layer, number, batch)


@torch.no_grad()
def advance(layer: torch.nn.Module, number: int, batch: Batch) -> None:
    """Run a batch through the layer as it is now: `batch.hidden` becomes the input of the next layer."""
    output = layer(batch.hidden, **batch.arguments[number])
    batch.hidden = output[0] if isinstance(output, tuple) else output


def _part(layer: torch.nn.Module, names: Sequence[str]) -> torch.nn.Module | None:
    modules = dict(layer.named_modules())
    return next((modules[name] for name in names if name in modules), None)


def _skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(Problem(str(folder), f"transformers knows no such model: {first_line(error)}")) from None
    return cast("PreTrainedModel", model.eval())


def _embeddings(model: LayerwiseModel) -> TensorInfo:
    name = f"{model.skeleton.base_model_prefix}.embed_tokens.weight"
    if name not in model.tensors:
        raise CheckpointError(Problem(f"{model.folder}: {name}", "is missing", _DAMAGED))
    return model.tensors[name]


@torch.no_grad()
def _batch(model: LayerwiseModel, table: TensorInfo, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Batch:
    """Run the skeleton once: it scales embeddings, makes masks and positions as the whole model does."""
    chosen = [prompts[row] for row in rows]
    width = max(map(len, chosen))
    # Padding stands behind the tokens, where a causal model cannot see it.
    padded = [[*prompt, *[prompt[-1]] * (width - len(prompt))] for prompt in chosen]
    vectors = embedded(model, [token for prompt in padded for token in prompt]).view(len(chosen), width, -1)
    real = torch.arange(width)[None, :] < torch.tensor([len(prompt) for prompt in chosen])[:, None]
    decoder = cast("Any", model.skeleton.base_model)
    hidden = decoder(inputs_embeds=vectors, use_cache=False).last_hidden_state
    return Batch(tuple(rows), hidden, real, tuple(recorder.seen for recorder in decoder.layers))


def parameter_of(name: str, wanted: Mapping[str, torch.nn.Parameter]) -> tuple[str, torch.Tensor]:
    """Find the parameter, or the part of it, that a stored tensor of a layer belongs in."""
    for stored, target in _RENAMED:
        name = target if name == stored else name
    if name not in wanted:
        name = name.replace("block_sparse_moe.", "mlp.")
    if name in wanted:
        return name, wanted[name].data
    found = _ONE_EXPERT.fullmatch(name)
    target = f"mlp.experts.{'gate_up_proj' if found and found[2] in _HALVES else 'down_proj'}"
    if found is None or target not in wanted or int(found[1]) >= len(wanted[target]):
        raise CheckpointError(Problem(name, "is no part of such a layer", _DAMAGED))
    one = wanted[target].data[int(found[1])]
    return target, one.chunk(2)[_HALVES[found[2]]] if found[2] in _HALVES else one


def _fill(info: TensorInfo, part: torch.Tensor) -> None:
    if info.shape != tuple(part.shape):
        message = f"has shape {list(info.shape)}, the config says {list(part.shape)}"
        raise CheckpointError(Problem(f"{info.file}: {info.name}", message, _DAMAGED))
    with open_files([info.file]) as descriptors:
        part.copy_(as_tensor(read_slab(descriptors, info, 0, info.size), info.dtype).view(info.shape))
