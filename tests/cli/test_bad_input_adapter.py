"""The bad-input table, LoRA adapters: what does not fit or is not supported is refused by name."""

import pytest
import torch
from conftest import edit_json, edit_tensors, put, write_adapter

Q0 = "model.layers.0.self_attn.q_proj.weight"
ADAPTER_EXPERTS = [{"name": "a", "model": "./a"}, {"name": "l", "model": "./lora"}]
FIRST_NAMES = ", ".join(f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("down", "gate", "up"))
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def config(workshop):
    return workshop.folder / "lora" / "adapter_config.json"


def edit_adapter(workshop, change):
    edit_tensors(workshop.folder / "lora" / "adapter_model.safetensors", change)


ADAPTERS = {
    "factors that do not fit": (
        lambda w: edit_adapter(w, put(f"{MODULE}.lora_A.weight", torch.zeros(2, 7))),
        f"{{file}}: {Q0}",
        "B [8, 2] · A [2, 7] does not give [8, 8]",
        "another base?",
    ),
    "ranks that do not fit": (
        lambda w: edit_adapter(w, put(f"{MODULE}.lora_A.weight", torch.zeros(3, 8))),
        f"{{file}}: {Q0}",
        "B [8, 2] · A [3, 8] do not fit together",
        "damaged",
    ),
    "ranks that are not the config's": (
        lambda w: edit_json(config(w), r=4),
        f"{{file}}: {FIRST_NAMES} and 18 more",
        "has rank 2, adapter_config.json says r=4",
        "edited by hand?",
    ),
    "tensor that the base lacks": (
        lambda w: edit_adapter(
            w, lambda t: t.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in t.items() if MODULE in k})
        ),
        "{file}: model.layers.9.self_attn.q_proj.weight",
        "the base has no such tensor, and a merge adds none",
        "another base?",
    ),
    "half a pair": (
        lambda w: edit_adapter(w, lambda t: t.pop(f"{MODULE}.lora_B.weight")),
        "{file}: model.layers.0.self_attn.q_proj",
        "has lora_A alone",
        "damaged",
    ),
    "magnitude that the config does not know": (
        lambda w: edit_adapter(w, put(f"{MODULE}.lora_magnitude_vector", torch.zeros(8))),
        "{file}: model.layers.0.self_attn.q_proj",
        "has a magnitude but use_dora is not set",
        "edited by hand?",
    ),
    "unsupported tensor": (
        lambda w: edit_adapter(w, put(f"{MODULE}.lora_diag", torch.zeros(8))),
        f"{{file}}: {MODULE}.lora_diag",
        "tensor is not supported",
        "only LoRA, DoRA, biases",
    ),
    "unsupported field": (
        lambda w: edit_json(config(w), kasa_config={"beta": 1}),
        "{folder}/adapter_config.json kasa_config",
        "is not supported: it cuts singular values",
        "merge_and_unload",
    ),
    "start that changed the base": (
        lambda w: edit_json(config(w), init_lora_weights="pissa"),
        "{folder}/adapter_config.json init_lora_weights",
        "init_lora_weights='pissa' is not supported",
        "path_initial_model_for_weight_conversion",
    ),
    "trained head of a tied base": (
        lambda w: edit_adapter(w, put("base_model.model.lm_head.weight", torch.zeros(20, 8))),
        "{file}: lm_head.weight",
        "its head is tied to its embeddings",
        "give the base a head of its own",
    ),
    "other kind of adapter": (
        lambda w: edit_json(config(w), peft_type="IA3"),
        "{folder}/adapter_config.json peft_type",
        "IA3 adapters are not supported",
        "use a LoRA adapter",
    ),
    "rank 0": (
        lambda w: edit_json(config(w), r=0),
        "{folder}/adapter_config.json r",
        "must be a positive number, is 0",
        "edited by hand?",
    ),
    "no weights": (
        lambda w: (w.folder / "lora" / "adapter_model.safetensors").unlink(),
        "{folder}",
        "holds no adapter_model.safetensors",
        "save_pretrained",
    ),
}


@pytest.mark.parametrize("row", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_cannot_be_merged_is_refused(workshop, refused, row):
    break_it, place, message, hint = row
    workshop.recipe(experts=ADAPTER_EXPERTS)
    break_it(workshop)
    folder = workshop.folder / "lora"
    place = place.format(folder=folder, file=folder / "adapter_model.safetensors")
    refused(f"recipe.yaml:3 experts[1].model: {place}", message, hint)


def test_an_infinite_adapter_factor_is_named_by_the_tensor_that_it_changes(workshop, refused):
    workshop.recipe(experts=ADAPTER_EXPERTS)
    edit_adapter(workshop, lambda t: t[f"{MODULE}.lora_B.weight"][3].fill_(float("inf")))
    refused(Q0, "expert l is", "the fine-tune diverged")


def test_all_problems_of_an_adapter_are_told_at_once(workshop, mediator):
    workshop.recipe(experts=ADAPTER_EXPERTS)
    write_adapter(workshop.folder / "lora", 3, use_qalora=True, kasa_config={"beta": 1}, init_lora_weights="olora", r=0)
    run = mediator("validate", "recipe.yaml")
    fields = [line.split(": ")[2].rpartition(" ")[2] for line in run.err.splitlines() if line.startswith("error")]
    assert sorted(fields) == ["init_lora_weights", "kasa_config", "r", "use_qalora"]
