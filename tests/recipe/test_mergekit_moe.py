"""A configuration of mergekit-moe is read as a recipe of kind moe, or refused with its line."""

import pytest
import torch
from conftest import edit_json, edit_tensors, put
from safetensors.torch import load_file
from tiny_tokens import word_tokenizer

from mediator_cli import make_plan
from mediator_cli.errors import MediatorError
from mediator_cli.moe.gates.asked import ask
from mediator_cli.moe.layerwise import open_layerwise
from mediator_cli.recipe.load import load_recipe

MOE = """\
base_model: ./base
gate_mode: cheap_embed
architecture: Mixtral
dtype: float32
experts_per_token: 1
experts:
  - source_model: ./a
    positive_prompts: [two plus, apples left]
    negative_prompts:
      - the film
    residual_scale: 0.5
  - source_model: {model: {path: ./base}, lora: ./lora}
    positive_prompts: [the actor]
    noise_scale: 0.25
"""
RANDOM = "base_model: ./base\ngate_mode: random\nexperts: [{source_model: ./a}, {source_model: ./b}]\n"


def problems(load, text):
    with pytest.raises(MediatorError) as raised:
        make_plan(load(text))
    return [(p.place.partition("recipe.yaml:")[2], p.message, p.hint) for p in raised.value.problems]


def notices(load, text):
    return [notice.partition("recipe.yaml:")[2] for notice in make_plan(load(text)).notices if "recipe.yaml:" in notice]


def test_a_configuration_becomes_a_recipe_of_kind_moe(workshop, load):
    loaded = load(MOE)
    recipe = loaded.recipe
    assert (recipe.kind, recipe.base, recipe.assign.rule, recipe.output.dtype) == ("moe", "./base", "all", "float32")
    assert [(expert.name, expert.model) for expert in recipe.experts] == [("a", "./a"), ("lora", "./lora")]
    spec = recipe.moe
    assert (spec.format, spec.experts_per_token, spec.shared_from, spec.base_expert) == ("mixtral", 1, "base", False)
    assert spec.gates.model_dump(exclude_none=True) == {"method": "cheap_embed", "temperature": 1.0, "chat": False}
    assert spec.experts["a"].positive_prompts == ("two plus", "apples left")
    assert spec.experts["a"].negative_prompts == ("the film",)
    assert (spec.experts["a"].residual_scale, spec.experts["a"].noise_scale) == (0.5, 0.0)
    assert (spec.experts["lora"].residual_scale, spec.experts["lora"].noise_scale) == (1.0, 0.25)
    assert load_recipe(loaded.path, ["moe.experts_per_token=2"]).recipe.moe.experts_per_token == 2


def test_mergekits_defaults_are_those_of_the_recipe(workshop, load):
    text = "base_model: ./base\nexperts:\n- {source_model: ./a, positive_prompts: [a]}\n"
    recipe = load(text + "- {source_model: ./a/, positive_prompts: [the]}\n").recipe
    assert (recipe.moe.gates.method, recipe.moe.experts_per_token, recipe.moe.format) == ("hidden", 2, "auto")
    assert [expert.name for expert in recipe.experts] == ["a", "a-2"]
    assert recipe.output.dtype == "base"


def test_faults_found_later_stand_where_they_were_written(workshop, load):
    gone = [
        place for place, message, _ in problems(load, MOE.replace("./a\n", "./gone\n")) if "no such folder" in message
    ]
    assert len(gone) == 1
    assert gone[0].startswith("7 experts[0].model")
    assert problems(load, MOE.replace("token: 1", "token: 3"))[0][0] == "5 moe.experts_per_token"
    assert problems(load, MOE.replace("0.25", "-1"))[0][0] == "14 moe.experts.lora.noise_scale"
    assert problems(load, MOE.replace("float32", "float8"))[0][0] == "4 output.dtype"
    assert problems(load, MOE.replace("Mixtral", "qwen3"))[0][0] == "3 moe.format"


REFUSED = {
    "no base": (MOE.replace("base_model: ./base\n", ""), "1 base_model", "names no model"),
    "base with an adapter": (MOE.replace("l: ./base\n", "l: ./base+./lora\n"), "1 base_model", "with an adapter"),
    "gates": (MOE.replace("cheap_embed", "hiden"), "2 gate_mode", "no gate_mode 'hiden'"),
    "architecture": (MOE.replace("Mixtral", "mixtrel"), "3 architecture", "no architecture 'mixtrel'"),
    "deepseek": (MOE.replace("Mixtral", "deepseek"), "3 architecture", "needs code from the Hub"),
    "shared experts": (MOE + "shared_experts: [{source_model: ./b}]\n", "15 shared_experts", "that answer every token"),
    "unknown key": (MOE + "experts_per_tokn: 2\n", "15 experts_per_tokn", "unknown key"),
    "unknown key of an expert": (
        MOE.replace("noise_scale", "nois_scale"), "14 experts[1].nois_scale", "unknown key 'nois_scale'",
    ),
    "no experts": ("base_model: ./base\nexperts: []\n", "2 experts", "lists no experts"),
    "experts in no list": ("base_model: ./base\nexperts: {source_model: ./a}\n", "2 experts", "lists no experts"),
    "no source": (MOE.replace("  - source_model: ./a", "  - model: ./a"), "7 experts[0]", "names no source_model"),
    "no prompts": (RANDOM.replace("random", "hidden"), "3 experts[0]", "of which gate_mode 'hidden' makes"),
    "one prompt, no list": (
        MOE.replace("[the actor]", "the actor"), "13 experts[1].positive_prompts", "is no list of texts",
    ),
    "empty prompt": (MOE.replace("the film", "''"), "9 experts[0].negative_prompts", "is no list of texts"),
    "no number": (MOE.replace("0.5", "half"), "11 experts[0].residual_scale", "is no number (got 'half')"),
    "adapter elsewhere": (
        MOE.replace("path: ./base", "path: ./b"), "12 experts[1].source_model", "on another model than base_model",
    ),
    "int64": (MOE.replace("float32", "int64"), "4 dtype", "not written as int64"),
    "same prompts": (
        RANDOM.replace("random", "hidden").replace("}", ", positive_prompts: [the film]}"), "3 experts",
        "experts a and b have the same prompts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_what_has_no_counterpart_is_refused_by_name_and_line(workshop, load, row):
    text, place, message = row
    found = [problem for problem in problems(load, text) if problem[0] == place and message in problem[1]]
    assert len(found) == 1
    assert found[0][2]


def test_a_recipe_without_its_version_is_no_configuration_of_mergekit(workshop, load):
    text = "kind: moe\nbase: ./base\nexperts: [{name: a, model: ./a}]\n"
    assert problems(load, text)[0][:2] == ("1 version", "is required")


@pytest.mark.parametrize(
    ("given", "format_"),
    [("mixtral", "mixtral"), ("mix", "mixtral"), ("Qwen MoE", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("qwen", "auto")],
)
def test_the_start_of_an_architectures_name_is_enough(workshop, load, given, format_):
    assert load(f"{RANDOM}architecture: {given}\n").recipe.moe.format == format_


def test_what_has_no_effect_and_what_is_otherwise_is_told(workshop, load):
    assert notices(load, f"{RANDOM}tokenizer_source: union\nout_dtype: float16\n") == [
        "4 tokenizer_source: 'tokenizer_source' has no effect, as in mergekit-moe",
        "5 out_dtype: 'out_dtype' has no effect, as in mergekit-moe",
    ]
    assert load(f"{RANDOM}out_dtype: float16\n").recipe.output.dtype == "base"
    assert "the base decides" in notices(load, f"{RANDOM}architecture: qwen\n")[0]
    assert "until it is trained" in notices(load, RANDOM.replace("./b}", "./a}"))[0]
    averaged = notices(load, MOE.replace("cheap_embed", "hidden_avg"))
    assert averaged == ["2 gate_mode: padding is left out of the mean of a prompt's states; mergekit-moe counts it"]
    assert notices(load, MOE) == []


def test_all_prompts_are_read_as_in_mergekit(workshop, load):
    many = ", ".join(f"the {number}" for number in range(200))
    assert load(MOE.replace("the actor", many)).recipe.moe.gates.prompts == 200


def test_only_feed_forward_blocks_are_asked_of_experts(workshop, load):
    """Experts may have other attention, and a head of their own."""
    file = workshop.folder / "a" / "model.safetensors"
    edit_tensors(file, put("lm_head.weight", torch.ones(20, 8)))
    edit_tensors(file, put("model.layers.0.self_attn.q_proj.bias", torch.ones(8)))
    edit_tensors(file, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    edit_json(workshop.folder / "a" / "config.json", tie_word_embeddings=False)
    assert {tensor.name for tensor in make_plan(load(RANDOM)).tensors} == set(workshop.base)
    edit_tensors(file, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks tensor model.layers.1.mlp.up_proj.weight" in problems(load, RANDOM)[0][1]


def test_bare_prompts_stand_behind_the_token_that_begins_a_text(workshop):
    model, tokenizer = open_layerwise(workshop.folder / "base"), word_tokenizer()
    texts = {"a": ["two plus " * 400]}
    two, plus, start = (tokenizer.convert_tokens_to_ids(word) for word in ("two", "plus", tokenizer.bos_token))
    assert ask(model, tokenizer, texts, chat=False, whole=True).ids == ((start, *(two, plus) * 400),)
    assert ask(model, tokenizer, texts, chat=False).ids == ((two, plus) * 256,)


def test_the_command_line_merges_a_configuration(workshop, mediator):
    word_tokenizer().save_pretrained(workshop.folder / "base")
    (workshop.folder / "moe.yml").write_text(MOE)
    assert mediator("validate", "moe.yml").code == 0
    run = mediator("merge", "moe.yml", "-o", "out", "--workers", 1)
    assert run.code == 0, run.err
    made = load_file(workshop.folder / "out" / "model-00001-of-00002.safetensors")
    down, experts = "model.layers.0.mlp.down_proj.weight", "model.layers.0.block_sparse_moe.experts"
    assert torch.equal(made[f"{experts}.0.w2.weight"], 0.5 * workshop.experts["a"][down].float())
    noise = made[f"{experts}.1.w2.weight"] - (workshop.base[down].float() + lora_delta(workshop.folder / "lora", down))
    assert 0.15 < noise.std() < 0.35
    gates = load_file(workshop.folder / "out" / "model-00002-of-00002.safetensors")
    rows = gates["model.layers.1.block_sparse_moe.gate.weight"]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    assert torch.equal(rows, gates["model.layers.2.block_sparse_moe.gate.weight"])


def lora_delta(folder, name):
    """The change of a weight by the adapter of the workshop, whose scale is 2."""
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    tensors = load_file(folder / "adapter_model.safetensors")
    return 2 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
