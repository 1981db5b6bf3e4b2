"""What must work: odd paths, odd tensors, links, mixed dtypes, tied heads, and what is settled without asking."""

import json
import os
import shutil

import pytest
import torch
from conftest import CONFIG, edit_json, fine_tune, random_tensors, write_adapter, write_checkpoint
from safetensors.torch import load_file, save_file

from mediator_cli import read_bundle, verify_bundle

ALL = {"assign": {"rule": "all"}, "extract": {"density": 1.0, "values": "fp32"}}
NONE = {"assign": {"rule": "none"}}
NORM = "model.norm.weight"


def intact(folder):
    """Verify a bundle and open it."""
    assert verify_bundle(folder).problems == ()
    return read_bundle(folder)


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def write_shards(folder, tensors):
    """Spread tensors over two shards with an index, as transformers names them."""
    names = sorted(tensors)
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for n, file in enumerate(files):
        save_file({name: tensors[name] for name in names[n::2]}, folder / file, metadata={"format": "pt"})
    places = {name: files[k % 2] for k, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()


def test_paths_with_spaces_and_unicode_work(workshop, mediator):
    folder = workshop.folder / "größe [1] 模型 :a:"
    shutil.copytree(workshop.folder, folder)
    workshop.recipe().rename(folder / "my recipe.yaml")
    run = mediator("merge", folder / "my recipe.yaml", "-o", folder / "naïve büндle")
    assert run.code == 0, run.err
    assert f"bundle        '{folder.relative_to(workshop.folder)}/naïve büндle'" in run.out
    assert mediator("verify", folder / "naïve büндle").code == 0
    assert mediator("inspect", folder / "naïve büндle").code == 0


def test_an_error_shows_an_odd_path_as_it_is(workshop, mediator):
    path = workshop.folder / "[red]größe :smile: [" / "recipe.yaml"
    assert f"error: {path}: cannot read the recipe" in mediator("validate", path).err


def with_odd_tensors(tensors, seed):
    empty, scalar = torch.zeros(0, 8, dtype=torch.bfloat16), torch.tensor(float(seed), dtype=torch.bfloat16)
    return tensors | {"model.layers.0.empty": empty, "model.layers.0.scale": scalar}


@pytest.mark.parametrize("fields", [ALL, NONE, {"average": {"method": "ties"}, **ALL}])
def test_empty_and_zero_dimensional_tensors_work(workshop, fields):
    for seed, name in enumerate(("base", "a", "b")):
        tensors = workshop.experts.get(name, workshop.base)
        write_checkpoint(workshop.folder / name, with_odd_tensors(tensors, seed))
    bundle = intact(workshop.merge("out", **fields))
    assert bundle.dense("model.layers.0.empty").shape == (0, 8)
    assert bundle.dense("model.layers.0.scale") == torch.tensor(1.5)
    if fields is not NONE:
        # What is no parameter of the model cannot be mixed, and is averaged.
        assert bundle.expert("b", "model.layers.0.scale") == torch.tensor(1.5)
        assert bundle.manifest.averaged_in_routed_units == ("model.layers.0.empty", "model.layers.0.scale")


def test_sources_that_are_links_as_in_the_hub_cache_work(workshop, mediator):
    expected = read_bundle(workshop.merge("plain")).manifest.digest
    for name in ("base", "a", "b"):
        folder, blobs = workshop.folder / name, workshop.folder / f"models--{name}" / "blobs"
        blobs.mkdir(parents=True)
        snapshot = blobs.parent / "snapshots" / "0a1b"
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted(folder.iterdir())):
            file.rename(blobs / f"blob{number}")
            (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"blob{number}", snapshot))
        folder.rmdir()
        folder.symlink_to(snapshot)
    workshop.recipe()
    run = mediator("merge", "recipe.yaml", "-o", "out", "--json")
    assert json.loads(run.out)["digest"] == expected


def test_an_adapter_that_names_another_base_gives_a_warning(workshop, mediator):
    write_adapter(workshop.folder / "lora", 3, base_model_name_or_path="org/other-7b")
    workshop.recipe(experts=[{"name": "a", "model": "./a"}, {"name": "l", "model": "./lora"}])
    run = mediator("merge", "recipe.yaml", "-o", "out")
    warning = "adapter l names base 'org/other-7b', the recipe's base is './base'"
    assert run.code == 0
    assert f"warning: {warning}" in run.err
    assert read_bundle(workshop.folder / "out").manifest.notices == (warning,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_buffers_that_are_no_floats_are_copied_from_the_base(workshop, dtype):
    name = "model.layers.1.self_attn.positions"
    for start, source in enumerate(("base", "a", "b")):
        buffer = (torch.arange(start, start + 6) % 4).to(dtype)
        write_checkpoint(workshop.folder / source, workshop.experts.get(source, workshop.base) | {name: buffer})
    bundle = intact(workshop.merge("out", output={"dtype": "float32"}, **ALL))
    assert same(bundle.dense(name), torch.tensor([0, 1, 2, 3, 0, 1]).to(dtype))
    assert same(bundle.expert("a", name), torch.tensor([0, 1, 2, 3, 0, 1]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_experts_of_another_float_dtype_work(workshop, dtype):
    wide = {name: tensor.to(dtype) for name, tensor in workshop.experts["b"].items()}
    write_checkpoint(workshop.folder / "b", wide)
    bundle = intact(workshop.merge("out", **ALL))
    assert all(same(bundle.expert("b", name), workshop.experts["b"][name].float().bfloat16()) for name in wide)
    assert bundle.dense(NORM).dtype == torch.bfloat16


def test_a_sharded_base_and_unsharded_experts_work(workshop):
    plain = intact(workshop.merge("plain", **ALL))
    write_shards(workshop.folder / "base", workshop.base)
    bundle = intact(workshop.merge("out", **ALL))
    assert all(same(bundle.dense(name), plain.dense(name)) for name in workshop.base)
    assert all(same(bundle.expert("b", name), tensor) for name, tensor in workshop.experts["b"].items())
    assert set(bundle.manifest.assignment) == set(plain.manifest.assignment)


def test_a_sharded_bundle_can_be_merged_again(workshop):
    first = workshop.merge("first", output={"shard_size": 1000}, **NONE)
    assert len(list(first.glob("model-*.safetensors"))) == 4
    again = workshop.merge("again", experts=[{"name": "one", "model": "./first"}], **NONE)
    assert all(same(intact(again).dense(name), intact(first).dense(name)) for name in workshop.base)


def test_a_stored_copy_of_a_tied_head_is_left_out(workshop):
    expected = read_bundle(workshop.merge("plain")).manifest.digest
    head = {"lm_head.weight": workshop.base["model.embed_tokens.weight"].clone()}
    write_checkpoint(workshop.folder / "base", workshop.base | head)
    bundle = intact(workshop.merge("out"))
    assert bundle.manifest.digest == expected
    assert "lm_head.weight" not in load_file(bundle.path / "model.safetensors")


def test_an_untied_head_is_a_unit_of_its_own(workshop):
    for seed, name in enumerate(("base", "a", "b")):
        head = {"lm_head.weight": torch.full((20, 8), float(seed), dtype=torch.bfloat16)}
        tensors = workshop.experts.get(name, workshop.base) | head
        write_checkpoint(workshop.folder / name, tensors, {"tie_word_embeddings": False})
    bundle = intact(workshop.merge("out", **NONE))
    assert torch.equal(bundle.dense("lm_head.weight"), torch.full((20, 8), 1.5, dtype=torch.bfloat16))
    assert "lm_head" in bundle.manifest.assignment


def test_a_qwen2_with_biases_works(workshop):
    base = {f"model.layers.{n}.self_attn.{k}_proj.bias": torch.zeros(4) for n in range(3) for k in "qkv"}
    base = random_tensors(0) | {name: bias.bfloat16() for name, bias in base.items()}
    experts = {name: fine_tune(base, seed) for seed, name in enumerate(("a", "b"))}
    for name, tensors in {"base": base, **experts}.items():
        write_checkpoint(workshop.folder / name, tensors, {"model_type": "qwen2"})
    bundle = intact(workshop.merge("out", **ALL))
    assert all(same(bundle.expert("b", name), tensor) for name, tensor in experts["b"].items())


def test_changes_on_the_command_line_are_recorded(workshop, mediator):
    workshop.recipe()
    words = ("--set", "assign.rule=all", "--set", "experts[0].weight=2")
    assert mediator("merge", "recipe.yaml", "-o", "out", *words).code == 0
    manifest = read_bundle(workshop.folder / "out").manifest
    assert manifest.recipe.changes == ("assign.rule=all", "experts[0].weight=2")
    assert [source.weight for source in manifest.experts] == [2.0, 1.0]
    assert set(manifest.assignment.values()) == {"route"}
    assert "experts[0].weight=2" in (workshop.folder / "out" / "README.md").read_text()


def test_the_output_is_named_after_the_recipe_where_none_is_named(workshop, mediator):
    workshop.recipe("my-mix.yaml")
    assert mediator("merge", "my-mix.yaml").code == 0
    assert intact(workshop.folder / "my-mix").manifest.recipe.name == "my-mix.yaml"


def test_the_recipes_output_path_starts_at_the_recipe(workshop, mediator, monkeypatch):
    recipe = workshop.recipe(output={"path": "bundles/mix"})
    monkeypatch.chdir("/")
    assert mediator("merge", recipe).code == 0
    assert intact(workshop.folder / "bundles" / "mix")


def test_an_empty_folder_may_become_the_bundle(workshop, mediator):
    workshop.recipe()
    (workshop.folder / "out").mkdir()
    assert mediator("merge", "recipe.yaml", "-o", "out").code == 0
    assert intact(workshop.folder / "out")


def test_overwrite_replaces_a_bundle_and_leaves_nothing_of_it(workshop, mediator):
    workshop.merge("out", **ALL)
    (workshop.folder / "out" / "notes.txt").write_text("mine")
    workshop.recipe(**NONE)
    assert mediator("merge", "recipe.yaml", "-o", "out", "--overwrite").code == 0
    assert intact(workshop.folder / "out").manifest.sparse == ()
    assert not (workshop.folder / "out" / "notes.txt").exists()
    assert not list(workshop.folder.glob(".out*"))


def test_a_bundle_may_be_overwritten_by_a_merge_of_itself(workshop, mediator):
    old = load_file(workshop.merge("out", **NONE) / "model.safetensors")
    workshop.recipe(experts=[{"name": "one", "model": "./out"}], **NONE)
    assert mediator("merge", "recipe.yaml", "-o", "out", "--overwrite").code == 0
    assert all(same(intact(workshop.folder / "out").dense(name), tensor) for name, tensor in old.items())


@pytest.mark.parametrize("unit", ["layer", "block", "tensor"])
def test_a_reused_report_gives_the_same_bundle_as_measuring(workshop, mediator, unit):
    measured = read_bundle(workshop.merge("plain", conflict={"unit": unit})).manifest
    workshop.recipe(conflict={"unit": unit})
    assert mediator("analyze-conflicts", "recipe.yaml", "-o", "c.json", "--set", "conflict.unit=layer").code == 0
    assert mediator("merge", "recipe.yaml", "-o", "out", "--conflicts", "c.json").code == 0
    reused = intact(workshop.folder / "out").manifest
    assert (reused.digest, reused.assignment, reused.conflict) == (
        measured.digest,
        measured.assignment,
        measured.conflict,
    )


def winner_files(workshop):
    """Give expert b a tokenizer, template, generation config and ids of its own."""
    folder = workshop.folder / "b"
    (folder / "tokenizer.json").write_text('{"version": "b"}')
    (folder / "chat_template.jinja").write_text("{{ b }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    edit_json(folder / "config.json", eos_token_id=7, pad_token_id=9, rope_theta=5.0)


@pytest.mark.parametrize(("tokenizer", "owner"), [("base", "base"), ("expert:b", "b"), ("expert:a", "a")])
def test_tokenizer_template_and_generation_config_are_the_chosen_ones(workshop, tokenizer, owner):
    winner_files(workshop)
    out = workshop.merge("out", tokenizer=tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (workshop.folder / owner / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    expected = CONFIG | ({"eos_token_id": 7, "pad_token_id": 9} if owner == "b" else {})
    assert config == expected
    assert intact(out).manifest.tokenizer == tokenizer


def test_an_adapter_with_a_tokenizer_may_be_chosen(workshop):
    (workshop.folder / "lora" / "tokenizer.json").write_text('{"version": "lora"}')
    experts = [{"name": "a", "model": "./a"}, {"name": "l", "model": "./lora"}]
    out = workshop.merge("out", experts=experts, tokenizer="expert:l")
    assert (out / "tokenizer.json").read_text() == '{"version": "lora"}'
    assert not (out / "chat_template.jinja").exists()
    assert json.loads((out / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_output_dtype_stands_in_the_config_and_the_tensors(workshop, dtype):
    out = workshop.merge("out", output={"dtype": dtype}, **NONE)
    assert json.loads((out / "config.json").read_text()) == CONFIG | {"torch_dtype": dtype}
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {getattr(torch, dtype)}
