"""mediator extract-lora: what PEFT merges of it is base + the nearest low-rank change of each matrix."""

import json
import warnings

import pytest
import torch
from conftest import all_files, edit_tensors, fine_tune, put, write_adapter, write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import disturb, gpt2, llama, qwen3_moe
from safetensors.torch import load_file

from mediator_cli.bundle.adapter import AdapterManifest
from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.header import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")
Q = "model.layers.0.self_attn.q_proj"


def write_models(folder, model):
    """Save a base and a full fine-tune of it; give the model's class."""
    torch.manual_seed(0)
    base = model()
    base.save_pretrained(folder / "base")
    tuned = type(base).from_pretrained(folder / "base")
    disturb(tuned).save_pretrained(folder / "tuned")
    return type(base)


def peft_merged(folder, kind, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), adapter).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return load_file(folder / "merged" / "model.safetensors")


def nearest(delta, rank):
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).float()


def share(delta, rank):
    squares = torch.linalg.svdvals(delta.double()).square()
    return float(squares[:rank].sum() / squares.sum())


def loads(run):
    assert run.code == 0, run.err
    return json.loads(run.out)


MODELS = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("rank", [3, 100])
def test_peft_merges_base_and_the_nearest_change(tmp_path, mediator, model, rank):
    kind = write_models(tmp_path, model)
    report = loads(mediator("extract-lora", "base", "tuned", "-o", "out", "--rank", rank, "--json"))
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    held = {matrix["tensor"]: matrix for matrix in report["matrices"]}
    found = peft_merged(tmp_path, kind, tmp_path / "out")
    assert held
    for name, tensor in base.items():
        delta = tuned[name] - tensor
        expected = tensor + (nearest(delta, rank) if name in held else 0)
        assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-5), name
        if name in held:
            assert held[name]["rank"] == min(rank, *tensor.shape)
            assert held[name]["energy"] == pytest.approx(share(delta, rank), abs=1e-4)
            assert held[name]["size"] == pytest.approx(float(delta.norm() / tensor.norm()), rel=1e-3)
    told = {change["tensor"] for change in report["not_carried"]}
    assert told == set(base) - set(held)
    assert all(len(base[name].shape) == 2 for name in held)
    clamped = [name for name, matrix in held.items() if matrix["rank"] < rank]
    assert any(notice.startswith("rank 100 is more than these have") for notice in report["notices"]) == bool(clamped)


def test_embeddings_and_head_are_factors_where_they_are_two(tmp_path, mediator):
    kind = write_models(tmp_path, llama)
    report = loads(mediator("extract-lora", "base", "tuned", "-o", "out", "--rank", 4, "--embeddings", "--json"))
    held = {matrix["tensor"] for matrix in report["matrices"]}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= held
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    found = peft_merged(tmp_path, kind, tmp_path / "out")
    for name in held:
        expected = base[name] + nearest(tuned[name] - base[name], 4)
        assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-5), name


def test_tied_embeddings_are_stored_whole(tmp_path, mediator):
    kind = write_models(tmp_path, lambda: llama(tie_word_embeddings=True))
    run = mediator("extract-lora", "base", "tuned", "-o", "out", "--rank", 4, "--embeddings", "--json")
    report = loads(run)
    assert [change["tensor"] for change in report["saved"]] == ["model.embed_tokens.weight"]
    assert "embedding and head in one" in run.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True
    assert config["modules_to_save"] == ["model.embed_tokens"]
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    found = peft_merged(tmp_path, kind, tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name], tuned[name])
    assert "lm_head.weight" not in found or torch.equal(found["lm_head.weight"], tuned[name])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_all_that_changed_can_be_stored(tmp_path, mediator, model):
    kind = write_models(tmp_path, model)
    words = ("extract-lora", "base", "tuned", "-o", "out", "--rank", 100, "--embeddings", "--save-modules", "--json")
    report = loads(mediator(*words))
    # PEFT ties no embedding that is called otherwise.
    left = {change["tensor"] for change in report["not_carried"]}
    assert left == ({"transformer.wte.weight"} if model is gpt2 else set())
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    found = peft_merged(tmp_path, kind, tmp_path / "out")
    for name, tensor in tuned.items():
        expected = base[name] if name in left else tensor
        assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-5), name
    # mediator reads it as PEFT does.
    base = read_tensors(tmp_path / "base")
    assert set(open_adapter(tmp_path / "out", base).changes) == set(base) - left


def test_a_share_of_energy_takes_the_least_rank_of_each_matrix(tmp_path, mediator):
    kind = write_models(tmp_path, llama)
    report = loads(mediator("extract-lora", "base", "tuned", "-o", "out", "--energy", 0.8, "--json"))
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    for matrix in report["matrices"]:
        delta = tuned[matrix["tensor"]] - base[matrix["tensor"]]
        assert share(delta, matrix["rank"]) >= 0.8 > share(delta, matrix["rank"] - 1)
    assert len({matrix["rank"] for matrix in report["matrices"]}) > 1
    assert 0.8 <= report["energy"] < 1
    assert peft_merged(tmp_path, kind, tmp_path / "out")
    # Both: the least rank, at most so many.
    report = loads(mediator("extract-lora", "base", "tuned", "-o", "both", "--energy", 0.8, "--rank", 2, "--json"))
    assert {matrix["rank"] for matrix in report["matrices"]} <= {1, 2}


def test_what_did_not_change_has_no_entry(mediator, workshop):
    one = dict(workshop.base)
    one[f"{Q}.weight"] = workshop.experts["a"][f"{Q}.weight"]
    write_checkpoint(workshop.folder / "one", one)
    run = mediator("extract-lora", "base", "one", "-o", "out", "--rank", 2)
    assert run.code == 0, run.err
    assert "1 with factors; 28 tensors are the base's" in run.out
    tensors = load_file(workshop.folder / "out" / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{Q}.lora_{which}.weight" for which in "AB"}
    config = json.loads((workshop.folder / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [Q]


def test_names_choose_what_is_looked_at(mediator):
    words = ("extract-lora", "base", "a", "-o", "out", "--include", "*self_attn*", "--exclude", "*.0.*", "--json")
    report = loads(mediator(*words))
    names = [matrix["tensor"] for matrix in report["matrices"]]
    assert len(names) == 8
    assert all("self_attn" in name and ".0." not in name for name in names)
    assert report["left_out"] == 29 - 8
    assert report["not_carried"] == []


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads(tmp_path, mediator):
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    base = {name: torch.randn(90, 80, generator=generator)}
    write_checkpoint(tmp_path / "wide", base, {"num_hidden_layers": 1})
    write_checkpoint(tmp_path / "tuned", fine_tune(base, 1), {"num_hidden_layers": 1})

    def weights(out, *words):
        loads(mediator("extract-lora", "wide", "tuned", "-o", out, "--rank", 2, "--json", *words))
        return (tmp_path / out / "adapter_model.safetensors").read_bytes()

    first = weights("one", "--workers", 1)
    assert weights("two", "--workers", 3) == first
    assert weights("three", "--seed", 1) != first


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_are_stored_as_told(mediator, workshop, dtype):
    report = loads(mediator("extract-lora", "base", "a", "-o", "out", "--dtype", dtype, "--json"))
    tensors = load_file(workshop.folder / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert report["bytes"] == sum(file.stat().st_size for file in (workshop.folder / "out").iterdir())


def test_an_adapter_of_another_kind_becomes_a_plain_one(tmp_path, mediator):
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True, task_type="CAUSAL_LM")
    disturb(get_peft_model(base, config)).save_pretrained(tmp_path / "dora")
    loads(mediator("extract-lora", "base", "dora", "-o", "plain", "--rank", 100, "--json"))
    dora, plain = (peft_merged(tmp_path, type(base), tmp_path / name) for name in ("dora", "plain"))
    assert all(torch.allclose(plain[name], dora[name], rtol=1e-4, atol=1e-5) for name in dora)


def test_experts_of_a_layer_are_told_and_left(tmp_path, mediator):
    write_models(tmp_path, qwen3_moe)
    report = loads(mediator("extract-lora", "base", "tuned", "-o", "out", "--json"))
    told = {change["tensor"]: change["reason"] for change in report["not_carried"]}
    assert any("experts" in name for name in told)
    assert "one tensor in memory" in told["model.layers.0.mlp.gate.weight"]
    assert not any("mlp" in matrix["tensor"] for matrix in report["matrices"])


def test_the_folder_tells_where_it_comes_from(mediator, workshop):
    assert mediator("extract-lora", "base", "a", "-o", "out", "--rank", 2, "--seed", 3).code == 0
    folder = workshop.folder / "out"
    manifest = AdapterManifest.model_validate_json((folder / "adapter_manifest.json").read_text())
    assert (manifest.made_by, manifest.seed, manifest.settings["rank"]) == ("extract", 3, 2)
    assert manifest.base.files[0].digest
    assert manifest.experts[0].files[0].digest != manifest.base.files[0].digest
    assert manifest.modules[Q].energy < 1
    assert set(manifest.tensors) == set(load_file(folder / "adapter_model.safetensors"))
    assert "| model | a |" in (folder / "README.md").read_text()


def test_tables_tell_kinds_or_every_matrix(mediator):
    told = mediator("extract-lora", "base", "a", "-o", "out", "--rank", 2)
    assert "q_proj" in told.out
    assert f"{Q}.weight" not in told.out
    assert "is an embedding or a head; give --embeddings" in told.out
    assert "is a vector" in told.out
    assert "energy held" in told.out
    assert f"{Q}.weight" in mediator("extract-lora", "base", "a", "-o", "again", "--tensors").out
    assert mediator("extract-lora", "base", "a", "-o", "third", "--quiet").out == ""


def test_the_extracted_adapters_merge(mediator, workshop):
    for name in ("a", "b"):
        assert mediator("extract-lora", "base", name, "-o", f"{name}-lora", "--rank", 2).code == 0
    experts = [{"name": name, "model": f"./{name}-lora"} for name in ("a", "b")]
    workshop.recipe(experts=experts, average={"method": "core_space"})
    assert mediator("merge", "recipe.yaml", "-o", "out").code == 0


@pytest.mark.parametrize(
    ("words", "place", "message"),
    [
        (("nowhere", "a"), "BASE", "no such folder"),
        (("base", "nowhere"), "MODEL", "no such folder"),
        (("base", "base"), "MODEL", "is the base itself"),
        (("mine", "a"), "BASE", "is an adapter, and a model is needed here"),
        (("base", "a", "--include", "*nothing*"), "--include", "chooses no matrix"),
        (("base", "a", "--energy", "0"), "--energy", "must be more than 0"),
        (("base", "a", "-o", "s3://bucket/out"), "--output", "written into a folder"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(mediator, workshop, words, place, message):
    write_adapter(workshop.folder / "mine", 1)
    before = all_files(workshop.folder)
    run = mediator("extract-lora", *words, *(() if "-o" in words else ("-o", "out")))
    assert run.code == 2
    assert place in run.err
    assert message in run.err
    assert "recipe" not in run.err.splitlines()[0]
    assert all_files(workshop.folder) == before


def test_a_broken_tensor_leaves_nothing(mediator, workshop):
    edit_tensors(workshop.folder / "a" / "model.safetensors", put(f"{Q}.weight", torch.full((8, 8), torch.nan)))
    before = all_files(workshop.folder)
    run = mediator("extract-lora", "base", "a", "-o", "out")
    assert run.code == 2
    assert f"{Q}.weight" in run.err
    assert all_files(workshop.folder) == before


def test_an_output_is_replaced_only_if_told(mediator, workshop):
    write_adapter(workshop.folder / "mine", 1)
    assert mediator("extract-lora", "base", "a", "-o", "out", "--rank", 2).code == 0
    assert "exists" in mediator("extract-lora", "base", "b", "-o", "out", "--rank", 2).err
    assert mediator("extract-lora", "base", "b", "-o", "out", "--rank", 2, "--overwrite").code == 0
    assert "not a bundle" in mediator("extract-lora", "base", "b", "-o", "mine", "--overwrite").err
