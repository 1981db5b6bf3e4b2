"""Make tests/golden/mergekit_moe: what mergekit-moe 0.1.5 makes of configurations, one folder for each kind of model.

Run it with the Python of mergekit's own environment (`make bench ARGS=--peers` builds one), never with ours:
`PEER/bin/python scripts/mergekit_moe_golden.py tests/golden/mergekit_moe`. The configurations stand there already. The
models are those of tests/golden/mergekit, and what other kinds have beside them.

mergekit-moe runs the base in bfloat16; here it runs in float32, so that gates can be compared to five digits. Its
packed experts are unpacked into one tensor each. Qwen2-MoE gets the shared expert that mergekit-moe wants, and it is
left out of the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

NAMES = ("base", "a", "b")
ALONE = ("hidden_last", "hidden_avg", "cheap_embed")
"""Configurations of which only the gates are kept: all else is as in `hidden`."""
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LETTERS = ["<unk>", "<s>", "</s>", "w", *"0123456789", "Ġ"]


def write_models(inputs: Path, folder: Path, kind: str) -> None:
    """Write base and experts of a kind, made of tiny Llamas."""
    for seed, name in enumerate(NAMES):
        target = folder / name
        shutil.copytree(inputs / name, target)
        tensors = load_file(target / "model.safetensors")
        save_file(tensors | _own_tensors(tensors, kind, seed), target / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((target / "config.json").read_text())
        own = {"model_type": kind, "architectures": [CLASSES[kind]]}
        (target / "config.json").write_text(json.dumps(config | own))
        if kind == "qwen2":
            _write_letters(target)


def _own_tensors(tensors: dict[str, torch.Tensor], kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Draw the tensors that this kind has beside those of Llama."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, part = name.removesuffix("_proj.weight").rpartition(".")
        if kind == "qwen2" and part in "qkv" and stem.endswith("self_attn"):
            found[f"{stem}.{part}_proj.bias"] = torch.randn(len(tensor), generator=generator)
        if kind == "qwen3" and part in "qk" and stem.endswith("self_attn"):
            found[f"{stem}.{part}_norm.weight"] = 1 + torch.randn(4, generator=generator) / 8
    return found


def _write_letters(folder: Path) -> None:
    """Write a tokenizer of letters: transformers reads any of Qwen2 as one of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(LETTERS)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(LETTERS[:3])
    made.save(str(folder / "tokenizer.json"))


def mixed(config: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Let mergekit-moe carry a configuration out in a folder of models; give its tensors under per-expert names."""
    from mergekit.moe.config import MoEMergeConfig  # type: ignore[import-not-found, unused-ignore]
    from mergekit.options import MergeOptions  # type: ignore[import-not-found, unused-ignore]
    from mergekit.scripts.moe import build  # type: ignore[import-not-found, unused-ignore]

    target = folder / "out"
    build(MoEMergeConfig.model_validate(config), str(target), MergeOptions(device="cpu"), device="cpu")
    stored = {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}
    shutil.rmtree(target)
    return unpacked({name: tensor for name, tensor in stored.items() if "shared_expert" not in name})


def unpacked(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give each expert its own matrices."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        stem, _, part = name.rpartition(".")
        for number, matrix in enumerate(tensor if part in ("gate_up_proj", "down_proj") else ()):
            halves = matrix.chunk(2) if part == "gate_up_proj" else (matrix,)
            for own, half in zip(("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",), halves, strict=True):
                found[f"{stem}.{number}.{own}.weight"] = half.clone()
        if part not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
    return found


def in_float32() -> None:
    """Let mergekit-moe run the base in float32."""
    from mergekit.moe import router  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoModelForCausalLM

    class Exact:
        """Stands where mergekit-moe finds the class that opens models."""

        @staticmethod
        def from_pretrained(path: str, **_: Any) -> Any:  # noqa: ANN401 - a model
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    router.AutoModelForCausalLM = Exact


def make(target: Path) -> None:
    """Write expected results beside the configurations in the folders of each kind."""
    in_float32()
    for kind in CLASSES:
        with tempfile.TemporaryDirectory() as work:
            write_models(target.parent / "mergekit" / "inputs", Path(work), kind)
            os.chdir(work)
            for recipe in sorted((target / kind).glob("*.yaml")):
                sys.stderr.write(f"{kind} {recipe.stem}\n")
                config = yaml.safe_load(recipe.read_text())
                if kind == "qwen2":
                    config["shared_experts"] = [{"source_model": "./base", "positive_prompts": ["w1"]}]
                tensors = mixed(config, Path(work))
                kept = {name: tensors[name] for name in sorted(tensors) if _is_kept(name, recipe.stem)}
                save_file(kept, recipe.with_suffix(".safetensors"))
        os.chdir(target)


def _is_kept(name: str, case: str) -> bool:
    return case not in ALONE or name.endswith("mlp.gate.weight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="folder of the configurations")
    make(parser.parse_args().target.absolute())
