"""Make tests/golden/mergekit: tiny checkpoints, mergekit configurations, and what mergekit 0.1.5 makes of them.

Run it with the Python of mergekit's own environment (`make bench ARGS=--peers` builds one), never with ours:
`PEER/bin/python scripts/mergekit_golden.py tests/golden/mergekit`. The configurations stand there already, one file
each; random methods keep all entries, so that there is one right answer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

HIDDEN, INNER, LAYERS = 8, 12, 3
WORDS = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(13))]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
MODELS = {
    # name: (seed of its change, size of the change, layers, tokens)
    "base": (0, 0.0, LAYERS, WORDS),
    "a": (1, 0.05, LAYERS, WORDS),
    "b": (2, 0.05, LAYERS, WORDS),
    "c": (3, 0.05, LAYERS, WORDS),
    "deep": (4, 0.05, LAYERS + 2, WORDS),
    "chat": (5, 0.05, LAYERS, [*WORDS, "<|im_start|>", "<|im_end|>"]),
    "tool": (6, 0.05, LAYERS, [*WORDS, "<|tool|>", "<|im_end|>"]),
}


TEMPLATES = {"base": "{{ messages[0]['content'] }}", "chat": "{{ bos_token }}chat", "tool": "{{ bos_token }}chat"}


def shapes(layers: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Name the tensors of a tiny Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, HIDDEN)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        found |= {f"{layer}.self_attn.{kind}_proj.weight": (HIDDEN, HIDDEN) for kind in "qo"}
        found |= {f"{layer}.self_attn.{kind}_proj.weight": (HIDDEN // 2, HIDDEN) for kind in "kv"}
        found |= {f"{layer}.mlp.{kind}_proj.weight": (INNER, HIDDEN) for kind in ("gate", "up")}
        found |= {f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER)}
        found |= {f"{layer}.{kind}_layernorm.weight": (HIDDEN,) for kind in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (tokens, HIDDEN)}


def drawn(seed: int, layers: int, tokens: int) -> dict[str, torch.Tensor]:
    """Draw tensors from a seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(layers, tokens).items()}


def write_tokenizer(folder: Path, words: list[str]) -> None:
    """Write a tokenizer that knows whole words, and what begins with `<|` as added tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    known = {word: number for number, word in enumerate(word for word in words if not word.startswith("<|"))}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in words if word.startswith("<|")])
    made.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_models(folder: Path) -> None:
    """Write all checkpoints, and a LoRA adapter on the base."""
    for name, (seed, size, layers, words) in MODELS.items():
        tensors = drawn(0, layers, len(words))
        change = drawn(seed, layers, len(words))
        changed = {key: tensor + size * change[key] for key, tensor in tensors.items()}
        target = folder / name
        target.mkdir()
        save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
        facts = {**CONFIG, "num_hidden_layers": layers, "vocab_size": len(words)}
        (target / "config.json").write_text(json.dumps(facts))
        write_tokenizer(target, words)
        if name in TEMPLATES:
            (target / "chat_template.jinja").write_text(TEMPLATES[name])
    _write_adapter(folder / "lora")


def _write_adapter(folder: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    tensors: dict[str, torch.Tensor] = {}
    for n in range(LAYERS):
        module = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, HIDDEN, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(HIDDEN, 2, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
             "base_model_name_or_path": "./base", "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(facts))


def merged(recipe: Path, folder: Path) -> Path:
    """Let mergekit carry a configuration out; the one without a name, or the last, if there are several."""
    from mergekit.config import MergeConfiguration  # type: ignore[import-not-found, unused-ignore]
    from mergekit.merge import run_merge  # type: ignore[import-not-found, unused-ignore]
    from mergekit.options import MergeOptions  # type: ignore[import-not-found, unused-ignore]
    from mergekit.scripts.multimerge import load_config, make_tasks  # type: ignore[import-not-found, unused-ignore]

    text, target = recipe.read_text(), folder / f"out-{recipe.stem}"
    options = MergeOptions(lora_merge_cache=str(folder / "cache"), write_model_card=False, quiet=True)
    documents = list(yaml.safe_load_all(text))
    if len(documents) == 1 and "name" not in documents[0]:
        run_merge(MergeConfiguration.model_validate(documents[0]), str(target), options=options)
        return target
    steps = folder / f"steps-{recipe.stem}"
    configs, needed = load_config(text, str(steps))
    for task in make_tasks(configs, needed, options, str(steps), str(target), lazy=True):
        _carry_out(task)
    return target


def _carry_out(task: object) -> None:
    for earlier in task.arguments().values():  # type: ignore[attr-defined]
        _carry_out(earlier)
    task.execute()  # type: ignore[attr-defined]


def make(target: Path) -> None:
    """Write inputs and expected results beside the configurations in a folder."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_models(folder)
        os.chdir(folder)
        for name in [*MODELS, "lora"]:
            shutil.copytree(folder / name, target / "inputs" / name, dirs_exist_ok=True)
        results: dict[str, object] = {}
        for recipe in sorted(target.glob("*.yaml")):
            sys.stderr.write(f"{recipe.stem}\n")
            made = merged(recipe, folder)
            tensors = {name: tensor for file in made.glob("*.safetensors") for name, tensor in load_file(file).items()}
            save_file(dict(sorted(tensors.items())), target / f"{recipe.stem}.safetensors")
            config = json.loads((made / "config.json").read_text())
            results[recipe.stem] = {
                "num_hidden_layers": config["num_hidden_layers"], "vocab_size": config["vocab_size"],
                "dtype": config.get("dtype", config.get("torch_dtype")), **_tokens(made),
            }  # fmt: skip
        (target / "index.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


TALKS = {
    "plain": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"},
              {"role": "user", "content": "w3"}],
    "system": [{"role": "system", "content": "w0"}, {"role": "user", "content": "w1"}],
}  # fmt: skip


def _tokens(folder: Path) -> dict[str, object]:
    """Read the tokens of a result, and what its chat template makes of some talks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = tokenizer.get_vocab()
    tokens = sorted(known, key=known.__getitem__)
    found: dict[str, object] = {} if tokens == WORDS else {"tokens": tokens}
    if tokenizer.chat_template:
        found["talks"] = {
            name: tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            for name, talk in TALKS.items()
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="folder of the configurations")
    make(parser.parse_args().target.absolute())
