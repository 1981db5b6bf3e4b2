"""Where the routed experts of a Mixture-of-Experts checkpoint are, and the names that each format gives them.

Only formats that stock software serves: one linear router without bias a layer, which reads the state behind the
post-attention norm. Tensors are named one expert at a time, as all servers read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.checkpoint.layout import layer_counts
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

FormatName = Literal["mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared"]
Projection = Literal["gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = ("gate_proj", "up_proj", "down_proj")
"""The three matrices of a gated feed-forward block: gate and up [inner, hidden], down [hidden, inner]."""


@dataclass(frozen=True)
class MoeFormat:
    """How a format names its parts: tensors below a layer, and fields of config.json.

    `expert` has places for expert and projection, `projections` what it calls the three; empty where the experts of a
    layer are stored as one tensor. `router` is the matrix [experts, hidden] of the gates.
    """

    name: FormatName
    architecture: str
    router: str
    expert: str
    projections: Mapping[Projection, str]
    n_experts: str
    top_k: str
    inner: str
    takes_dense_layers: bool

    def router_of(self, layer: int) -> str:
        """Name the gates [experts, hidden] of a layer."""
        return f"model.layers.{layer}.{self.router}"

    def expert_of(self, layer: int, expert: int, projection: Projection) -> str:
        """Name one matrix of an expert."""
        part = self.expert.format(expert=expert, projection=self.projections[projection])
        return f"model.layers.{layer}.{part}"


_OWN_NAMES: Mapping[Projection, str] = {name: name for name in PROJECTIONS}
FORMATS: Mapping[str, MoeFormat] = {
    found.name: found
    for found in (
        MoeFormat(
            "mixtral", "MixtralForCausalLM", "block_sparse_moe.gate.weight",
            "block_sparse_moe.experts.{expert}.{projection}.weight",
            {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
            "num_local_experts", "num_experts_per_tok", "intermediate_size", takes_dense_layers=False,
        ),
        MoeFormat(
            "qwen2_moe", "Qwen2MoeForCausalLM", "mlp.gate.weight", "mlp.experts.{expert}.{projection}.weight",
            _OWN_NAMES, "num_experts", "num_experts_per_tok", "moe_intermediate_size", takes_dense_layers=True,
        ),
        MoeFormat(
            "qwen3_moe", "Qwen3MoeForCausalLM", "mlp.gate.weight", "mlp.experts.{expert}.{projection}.weight",
            _OWN_NAMES, "num_experts", "num_experts_per_tok", "moe_intermediate_size", takes_dense_layers=True,
        ),
        MoeFormat(
            "granitemoeshared", "GraniteMoeSharedForCausalLM", "block_sparse_moe.router.layer.weight", "", {},
            "num_local_experts", "num_experts_per_tok", "intermediate_size", takes_dense_layers=False,
        ),
    )
}  # fmt: skip
"""All formats by their `model_type`."""


@dataclass(frozen=True)
class MoeLayout:
    """The experts of one checkpoint: its format, their number, how many a token gets, and the layers that have any."""

    format: MoeFormat
    n_experts: int
    top_k: int
    layers: tuple[int, ...]

    @property
    def routers(self) -> tuple[str, ...]:
        """The names of all gates, layer by layer."""
        return tuple(self.format.router_of(layer) for layer in self.layers)

    def experts_of(self, layer: int) -> tuple[dict[Projection, str], ...]:
        """Name the matrices of all experts of a layer."""
        return tuple(
            {projection: self.format.expert_of(layer, expert, projection) for projection in PROJECTIONS}
            for expert in range(self.n_experts)
        )


def moe_layout(place: str, config: Mapping[str, Any], names: Container[str]) -> MoeLayout:
    """Find the experts of a checkpoint by its config and tensor names; `place` is what errors call it.

    Raises CheckpointError where it is of none of the formats, or lacks gates or experts that its config promises.
    """
    kind = config.get("model_type")
    found = FORMATS.get(str(kind))
    if found is None:
        hint = f"formats are {', '.join(FORMATS)}; `mediator merge` writes them from a recipe with `kind: moe`"
        raise CheckpointError(Problem(place, f"is no Mixture of Experts that can be read: model_type {kind}", hint))
    counts = [_number_of_experts(found, config), config.get(found.top_k)]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        message = f"says no number of experts: {found.n_experts} {counts[0]}, {found.top_k} {counts[1]}"
        raise CheckpointError(Problem(f"{place}/config.json", message, "is the checkpoint complete?"))
    n_layers = next(iter(layer_counts(config)), 0)
    layers = tuple(layer for layer in range(n_layers) if found.router_of(layer) in names)
    layout = MoeLayout(found, counts[0], counts[1], layers)
    missing = [name for name in _promised(layout, config) if name not in names]
    if missing:
        raise CheckpointError(Problem(place, f"lacks {missing[0]}", "is the checkpoint complete?"))
    return layout


def sparse_layers(config: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    """List the layers that have routed experts, as a config says: all but `mlp_only_layers` and those between steps.

    >>> sparse_layers({"mlp_only_layers": [1]}, 3), sparse_layers({"decoder_sparse_step": 2}, 4)
    ((0, 2), (1, 3))
    """
    dense = config.get("mlp_only_layers") or ()
    step = config.get("decoder_sparse_step") or 1
    return tuple(layer for layer in range(n_layers) if layer not in dense and (layer + 1) % step == 0)


def _number_of_experts(form: MoeFormat, config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON
    # transformers 5 renames Qwen3's field when it saves; what it reads under either name, so do we.
    return next((config[field] for field in (form.n_experts, "num_local_experts") if field in config), None)


def _promised(layout: MoeLayout, config: Mapping[str, Any]) -> list[str]:
    form = layout.format
    layers = sparse_layers(config, next(iter(layer_counts(config)), 0))
    found = [form.router_of(layer) for layer in layers]
    if form.expert:
        found += [
            form.expert_of(layer, expert, projection)
            for layer in layers
            for expert in range(layout.n_experts)
            for projection in PROJECTIONS
        ]
    return found
