"""Bundles whose entries are shared out over the model run: tensors of which an expert keeps nothing, or all."""

import pytest
import torch
from conftest import VOCAB
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mediator_cli import read_bundle
from mediator_cli.runtime.open import open_bundle

MIXTURES = [[1.0, 0.0], [0.25, 0.75], [0.0, 0.0], [0.0, 1.0]]
PROMPTS = torch.randint(3, VOCAB, (len(MIXTURES), 6), generator=torch.Generator().manual_seed(4))
FULL = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(params=["sign", "int8", "bf16"])
def bundle(workshop, request):
    """Expert a differs from the base in one matrix alone, expert b everywhere; small weights for mild attention."""
    for name in ("base", "a", "b"):
        tensors = load_file(workshop.folder / name / "model.safetensors")
        if name == "a":
            other = {n: workshop.base[n].clone() for n in tensors}
            tensors = other | {FULL: tensors[FULL]}
        scaled = {n: t if n.endswith("norm.weight") else 0.3 * t for n, t in tensors.items()}
        save_file(scaled, workshop.folder / name / "model.safetensors", metadata={"format": "pt"})
    share = workshop.base[FULL].numel() / sum(tensor.numel() for tensor in workshop.base.values())
    extract = {"over": "model", "density": share, "dense": "base", "values": request.param}
    return workshop.merge("routed", assign={"rule": "all"}, extract=extract)


def test_some_tensors_keep_nothing_and_one_all(bundle):
    sparse = read_bundle(bundle).experts
    counts = {name: spec.n_kept for name, spec in sparse["a"].tensors.items()}
    assert counts.pop(FULL) > 90
    assert set(counts.values()) == {0}
    assert min(spec.n_kept for spec in sparse["b"].tensors.values()) == 0


@pytest.mark.parametrize("switch", [1, 10**9], ids=["matrices", "products"])
def test_every_mixture_is_that_of_the_complete_checkpoint(bundle, switch):
    model = open_bundle(bundle, dtype=torch.float32, switch_tokens=switch)
    with torch.no_grad(), model.mixing(MIXTURES):
        found = model(PROMPTS).logits
    opened = read_bundle(bundle)
    for row, weights in enumerate(MIXTURES):
        complete = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in complete.named_parameters():
                mixed = opened.dense(name).float().flatten()
                for expert, weight in zip("ab", weights, strict=True):
                    delta = opened.experts[expert].read(name)
                    mixed[delta.positions] += delta.values * weight
                parameter.copy_(mixed.view(parameter.shape))
            expected = complete(PROMPTS[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
