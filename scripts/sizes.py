"""What the recipes for large models need: the `# Needs:` line of each, from shapes and the package's own estimate.

`python scripts/sizes.py` prints the lines, `--write` puts them into the recipes. Nothing is downloaded: hollow
checkpoints with the true headers are made in a temporary folder, whose files take no room on disk.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mediator_cli.pipeline.estimate import describe_plan
from mediator_cli.pipeline.moe import parameters
from mediator_cli.pipeline.moe_report import widest_moe
from mediator_cli.pipeline.settings import Settings
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.load import load_recipe
from mediator_cli.recipe.sizes import human_bytes

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("qwen2.5-7b", "llama-3.1-8b")
RUN = Settings(memory=2 << 30, workers=8)
"""As `mediator merge` runs on 8 cores by default."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """The numbers of a config.json that fix all shapes of a Llama-like model with an untied head."""

    model_type: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    qkv_bias: bool

    def linear(self) -> Shapes:
        """Shapes of the linear weights of one layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    def shapes(self) -> Shapes:
        """Names and shapes of all tensors."""
        found: Shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for n in range(self.layers):
            layer = f"model.layers.{n}"
            found |= {f"{layer}.{name}.weight": shape for name, shape in self.linear().items()}
            if self.qkv_bias:
                names = [f"self_attn.{letter}_proj" for letter in "qkv"]
                found |= {f"{layer}.{name}.bias": self.linear()[name][:1] for name in names}
            found |= {
                f"{layer}.{name}.weight": (self.hidden,) for name in ("input_layernorm", "post_attention_layernorm")
            }
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    def config(self) -> dict[str, object]:
        """The part of config.json that a plan reads."""
        return {
            "model_type": self.model_type, "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "vocab_size": self.vocab,
            "num_key_value_heads": self.kv_heads, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        }  # fmt: skip


QWEN_7B = Family("qwen2", 3584, 18944, 28, 28, 4, 152064, qkv_bias=True)
LLAMA_8B = Family("llama", 4096, 14336, 32, 32, 8, 128256, qkv_bias=False)


@dataclass(frozen=True)
class Lora:
    """An adapter on all linear weights of the layers."""

    family: Family
    rank: int

    def shapes(self) -> Shapes:
        """Names and shapes of the factors, as PEFT writes them."""
        found: Shapes = {}
        for n in range(self.family.layers):
            for name, (out, into) in self.family.linear().items():
                module = f"base_model.model.model.layers.{n}.{name}"
                found[f"{module}.lora_A.weight"] = (self.rank, into)
                found[f"{module}.lora_B.weight"] = (out, self.rank)
        return found

    def config(self) -> dict[str, object]:
        """The part of adapter_config.json that a plan reads."""
        return {"peft_type": "LORA", "r": self.rank, "lora_alpha": 32, "bias": "none", "base_model_name_or_path": ""}


SOURCES: dict[str, Family | Lora] = {
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
    "open-thoughts/OpenThinker3-7B": QWEN_7B,
    "nvidia/OpenCodeReasoning-Nemotron-7B": QWEN_7B,
    "meta-llama/Llama-3.1-8B": LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "NousResearch/Hermes-3-Llama-3.1-8B": LLAMA_8B,
    "nvidia/OpenMath2-Llama3.1-8B": LLAMA_8B,
    # Ranks as the model cards tell them, or the larger of two told.
    "nvidia/llama-3.1-nemoguard-8b-content-safety": Lora(LLAMA_8B, 16),
    "nvidia/llama-3.1-nemoguard-8b-topic-control": Lora(LLAMA_8B, 8),
}


def write_hollow(folder: Path, source: Family | Lora) -> Path:
    """Write a checkpoint of true headers and no bytes behind them."""
    folder.mkdir(parents=True)
    is_adapter = isinstance(source, Lora)
    dtype, size = ("F32", 4) if is_adapter else ("BF16", 2)
    header, at = {}, 0
    for name, shape in source.shapes().items():
        end = at + math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with (folder / f"{'adapter_model' if is_adapter else 'model'}.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    (folder / f"{'adapter_config' if is_adapter else 'config'}.json").write_text(json.dumps(source.config()))
    return folder


def needs_line(recipe: Path, folder: Path) -> str:
    """Work out the `# Needs:` line of a recipe; hollow checkpoints go to `folder`."""
    asked = load_recipe(recipe).recipe
    changes = [f"base={_hollow(folder, asked.base)}"]
    changes += [f"experts.{n}.model={_hollow(folder, expert.model)}" for n, expert in enumerate(asked.experts)]
    # Hollow checkpoints have no tokenizer to take, and all sources have the same rows.
    plan = make_plan(load_recipe(recipe, [*changes, "tokenizer=base"]))
    costs = describe_plan(widest_moe(plan) if plan.moe else plan, folder / "bundle", RUN)
    sources = (plan.base.tensors, *(expert.tensors for expert in plan.experts))
    down = sum(info.n_bytes for tensors in sources for info in tensors.values())
    least, most = costs.sparse_bytes
    sparse = human_bytes(most) if least == most else f"at most {human_bytes(most)}"
    parts = f"{human_bytes(costs.dense_bytes)} dense" + (f" + {sparse} sparse experts" if most else "")
    if plan.moe is not None:
        total, active = (f"{n / 1e9:.1f}B" for n in parameters(widest_moe(plan)))
        parts = f"{total} parameters, {active} active"
    return (
        f"# Needs:   {human_bytes(down)} to download, {human_bytes(costs.dense_bytes + most)} of disk"
        f" ({parts}), {human_bytes(costs.peak_memory)} of memory."
    )


def _hollow(folder: Path, source: str) -> Path:
    place = folder / source
    return place if place.is_dir() else write_hollow(place, SOURCES[source])


def recipes() -> list[Path]:
    """List the recipes that this script knows the sizes of."""
    return sorted(file for name in FOLDERS for file in (ROOT / "recipes" / name).glob("*.yaml"))


def main() -> None:
    """Print the lines, or with --write put them into the recipes."""
    for recipe in recipes():
        with tempfile.TemporaryDirectory() as folder:
            line = needs_line(recipe, Path(folder))
        sys.stdout.write(f"{recipe.relative_to(ROOT)}\n  {line}\n")
        if "--write" in sys.argv[1:]:
            text = recipe.read_text(encoding="utf-8")
            recipe.write_text(re.sub("^# Needs:.*$", line, text, count=1, flags=re.MULTILINE), encoding="utf-8")


if __name__ == "__main__":
    main()
