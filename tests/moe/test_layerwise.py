"""The layer-by-layer runner against a forward of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_moe import KINDS, tiny_moe
from transformers import AutoModelForCausalLM

from mediator_cli.errors import CheckpointError
from mediator_cli.moe.layerwise import (
    advance,
    embedded,
    expert_output,
    experts_of,
    open_layerwise,
    read_layer,
    router_of,
    router_states,
    start,
)

PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11]]


@pytest.mark.parametrize("kind", [*KINDS, "llama", "qwen2", "qwen3"])
def test_states_equal_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    folder = tiny_moe(tmp_path / kind, kind)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = open_layerwise(folder)
    batches = start(model, PROMPTS, batch_tokens=12)
    assert len(batches) > 1
    assert sorted(row for batch in batches for row in batch.rows) == [0, 1, 2, 3]
    for number in range(model.n_layers):
        layer = read_layer(model, number)
        is_sparse = model.layout is not None and number in model.layout.layers
        assert (router_of(layer) is not None) == is_sparse
        for batch in batches:
            states = router_states(layer, number, batch)
            assert len(states) == batch.real.sum() == len(batch.row_of_token)
            for at, row in enumerate(batch.rows):
                with torch.no_grad(), _inputs_of_router(whole, number) as seen:
                    told = whole(torch.tensor([PROMPTS[row]]), output_hidden_states=True)
                torch.testing.assert_close(states[batch.row_of_token == row], seen[0], atol=1e-5, rtol=0)
                mine = batch.hidden[at, : len(PROMPTS[row])]
                torch.testing.assert_close(mine, told.hidden_states[number][0], atol=1e-5, rtol=0)
            advance(layer, number, batch)
    for batch in batches:
        for at, row in enumerate(batch.rows):
            with torch.no_grad():
                last = whole.model(torch.tensor([PROMPTS[row]])).last_hidden_state[0]
                mine = whole.model.norm(batch.hidden[at, : len(PROMPTS[row])])
            torch.testing.assert_close(mine, last, atol=1e-5, rtol=0)


class _inputs_of_router:
    """Note what reaches the router, or the dense block, of one layer."""

    def __init__(self, whole: torch.nn.Module, number: int) -> None:
        layer = whole.model.layers[number]
        reader = router_of(layer) or layer.mlp
        self.seen: list[torch.Tensor] = []
        width = whole.config.hidden_size
        self.hook = reader.register_forward_pre_hook(lambda _, given: self.seen.append(given[0].reshape(-1, width)))

    def __enter__(self) -> list[torch.Tensor]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("kind", ["mixtral", "granitemoeshared"])
def test_experts_are_read_in_their_places(kind: str, tmp_path: Path) -> None:
    folder = tiny_moe(tmp_path / kind, kind)
    model = open_layerwise(folder)
    layer = read_layer(model, 1)
    stored = load_file(folder / "model.safetensors")
    states = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    names = "model.layers.1.block_sparse_moe"
    for expert in range(3):
        if kind == "mixtral":
            gate, down, up = (stored[f"{names}.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
        else:
            gate, up = stored[f"{names}.input_linear.weight"][expert].chunk(2)
            down = stored[f"{names}.output_linear.weight"][expert]
        right = (torch.nn.functional.silu(states @ gate.T) * (states @ up.T)) @ down.T
        torch.testing.assert_close(expert_output(layer, expert, states), right, atol=1e-5, rtol=0)
    experts = experts_of(layer)
    assert experts is not None
    assert experts.down_proj.shape == (3, 16, 12)


def test_embeddings_come_in_the_order_asked(tmp_path: Path) -> None:
    folder = tiny_moe(tmp_path / "m", "mixtral")
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedded(open_layerwise(folder), [7, 3, 7]), table[[7, 3, 7]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), "self_attn.q_proj.weight: is missing"),
        (
            lambda t: t.update({"model.layers.1.extra.weight": torch.ones(2)}),
            "extra.weight: is no part of such a layer",
        ),
        (lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.ones(4)}), r"has shape \[4\], the config"),
    ],
)
def test_damaged_layers_are_named(change: object, message: str, tmp_path: Path) -> None:
    folder = tiny_moe(tmp_path / "m", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_layerwise(folder)
    read_layer(model, 0)
    with pytest.raises(CheckpointError, match=message):
        read_layer(model, 1)


def test_prompts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    model = open_layerwise(tiny_moe(tmp_path / "m", "mixtral"))
    with pytest.raises(CheckpointError, match="prompt 2: has token id 20, the model knows 20"):
        start(model, [[1], [20]])
    with pytest.raises(CheckpointError, match="prompt 1: is empty"):
        start(model, [[]])


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    folder = tiny_moe(tmp_path / "m", "gpt_neox", num_key_value_heads=2)
    with pytest.raises(CheckpointError, match="cannot be run layer by layer"):
        open_layerwise(folder)
