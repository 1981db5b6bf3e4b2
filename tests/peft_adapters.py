"""Tiny models and adapters on them, as transformers and PEFT write them, and base + adapter read by us."""

import warnings
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.adapter.read import AdapterReader
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.checkpoint.read import FullReader, open_files, read_floats
from mediator_cli.checkpoint.source import weight_files

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def llama(**config):
    found = transformers.LlamaConfig(
        **{**SMALL, "num_hidden_layers": 2, "intermediate_size": 24, "attention_bias": True, **config}
    )
    return transformers.LlamaForCausalLM(found)


def gpt2():
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, **special)
    return transformers.GPT2LMHeadModel(config)


def gpt2_untied():
    config = gpt2().config
    config.tie_word_embeddings = False
    return transformers.GPT2LMHeadModel(config)


def mixtral():
    config = transformers.MixtralConfig(**SMALL, num_hidden_layers=2, intermediate_size=24, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe(**config):
    sizes = {"num_hidden_layers": 2, "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 3}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **(sizes | config)))


def gpt_oss(**config):
    sizes = {"num_hidden_layers": 1, "intermediate_size": 24, "num_local_experts": 3}
    found = transformers.GptOssConfig(**SMALL, **(sizes | config), layer_types=["full_attention"])
    return transformers.GptOssForCausalLM(found)


def convolutional():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.Wav2Vec2Config(
        **sizes, conv_dim=(8, 8), conv_kernel=(5, 3), conv_stride=(2, 2), num_feat_extract_layers=2, vocab_size=12,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=32))


def disturb(model, seed=0):
    """Give every trained parameter a value that training might have given it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def write(folder, model, **config):
    """Save a base and an adapter on it as PEFT does."""
    torch.manual_seed(0)
    base = model().to(config.pop("dtype", torch.float32))
    base.save_pretrained(folder / "base")
    again = type(base).from_pretrained(folder / "base")
    trained = disturb(get_peft_model(again, LoraConfig(**{"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | config)))
    trained.save_pretrained(folder / "adapter")
    return type(base)


def merge(folder, kind, resize=None):
    """Merge as PEFT does, and give the tensors as transformers stores them."""
    base = kind.from_pretrained(folder / "base")
    if resize:
        base.resize_token_embeddings(resize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return load_file(folder / "merged" / "model.safetensors")


@contextmanager
def open_reader(folder):
    """Open base + adapter; gives the reader and the shapes of all tensors."""
    base = read_tensors(folder / "base")
    adapter = open_adapter(folder / "adapter", base)
    with open_files([*weight_files(base), *weight_files(adapter.tensors)]) as descriptors:
        shapes = {name: info.shape for name, info in base.items()} | adapter.shapes
        yield AdapterReader(FullReader(descriptors, base), descriptors, adapter), shapes


def read_tensor(reader, name, shape, cut):
    """Read one tensor through slabs of a size."""
    size = torch.Size(shape).numel()
    slabs = [read_floats(reader, name, *ends) for ends in pairwise([*range(0, size, cut), size])]
    return torch.from_numpy(np.concatenate(slabs)).view(shape)


def read_all(folder, cut=1 << 20):
    """Read all tensors of base + adapter through slabs of a size."""
    with open_reader(folder) as (reader, shapes):
        return {name: read_tensor(reader, name, shape, cut) for name, shape in shapes.items()}


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.allclose(found[name], tensor.float(), rtol=tolerance, atol=tolerance), name
