"""What a contest takes as experts and rows, what it refuses by name, and which base an adapter was trained on."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import edit_json, edit_tensors
from safetensors.torch import load_file, save_file
from tiny_contest import write_contest, write_recipe

from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.compare.bases import first_difference
from mediator_cli.compare.contest_job import prepare_contest
from mediator_cli.compare.selection_run import asks_of, sizes_of
from mediator_cli.errors import MediatorError, RecipeError
from mediator_cli.recipe.compare import load_compare

OFFLINE = Access(offline=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_contest(tmp_path_factory.mktemp("made"), n_rows=4).parent


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "c")


def prepared(folder, *changes, **fields):
    return prepare_contest(load_compare(write_recipe(folder, **fields), changes), OFFLINE)


def refused(folder, *changes, **fields):
    with pytest.raises(MediatorError) as caught:
        prepared(folder, *changes, **fields)
    return [(p.place.replace(str(folder), ""), p.message, p.hint) for p in caught.value.problems]


def test_a_library_holds_the_factors_as_they_are_stored_and_scaled(folder):
    edit_json(folder / "adapters" / "beta" / "adapter_config.json", lora_alpha=16, use_rslora=True)
    contest, notices = prepared(folder)
    assert notices == ()
    library = contest.sources.library()
    assert library.names == ("alpha", "beta", "gamma")
    stored = load_file(folder / "adapters" / "beta" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    delta = library.experts["beta"][f"{name}.weight"]
    assert torch.equal(delta.a, stored[f"base_model.model.{name}.lora_A.weight"])
    scaling = 16 / 2**0.5
    assert torch.allclose(delta.b, stored[f"base_model.model.{name}.lora_B.weight"] * scaling)
    assert {len(change[next(iter(change))].a) for change in library.experts.values()} == {1, 2, 3}
    assert f"{name}.weight" not in library.experts["alpha"]


def test_tasks_without_an_expert_of_their_name_are_held_out(folder):
    contest, _ = prepared(folder)
    assert [(t.name, t.expert, len(t.train), len(t.valid), len(t.test)) for t in contest.tasks] == [
        ("alpha", "alpha", 8, 4, 4),
        ("beta", "beta", 8, 4, 4),
        ("delta", None, 0, 4, 4),
        ("gamma", "gamma", 8, 4, 4),
    ]
    given, _ = prepared(folder, tasks={"mine": {"test": "data/delta.test.jsonl", "expert": "beta"}})
    assert [(t.name, t.expert) for t in given.tasks] == [("mine", "beta")]


def test_adapters_that_are_more_than_factors_are_refused_with_the_line_of_the_folder(folder):
    def add_saved(tensors):
        tensors["base_model.model.model.norm.weight"] = torch.ones(16)

    edit_tensors(folder / "adapters" / "alpha" / "adapter_model.safetensors", add_saved)
    edit_json(folder / "adapters" / "alpha" / "adapter_config.json", modules_to_save=["norm"])
    (found,) = refused(folder)
    assert found[0].startswith("/recipe.yaml:5 experts.from: /adapters/alpha")
    assert found[1].startswith("holds whole tensors (modules_to_save")
    assert "(model.norm.weight)" in found[1]
    assert "mediator extract-lora" in found[2]


def test_nan_and_infinity_are_named_with_expert_and_tensor(folder):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    edit_tensors(folder / "adapters" / "gamma" / "adapter_model.safetensors", lambda t: t[name].fill_(float("nan")))
    (found,) = refused(folder)
    assert found[0].endswith("gamma/adapter_model.safetensors: model.layers.1.mlp.up_proj.weight")
    assert found[1] == "holds NaN or infinite values"


def test_the_same_adapter_twice_is_told_and_stops_nothing(folder):
    shutil.copytree(folder / "adapters" / "beta", folder / "adapters" / "other")
    _, notices = prepared(folder)
    assert notices == ("beta, other are the same adapter: it counts 2 times",)


def test_an_adapter_of_another_shape_is_refused(folder):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(
        folder / "adapters" / "alpha" / "adapter_model.safetensors", lambda t: t.update({name: torch.ones(1, 9)})
    )
    (found,) = refused(folder)
    assert found[0].startswith("/recipe.yaml:5 experts.from")
    assert "q_proj" in found[0] + found[1]


def full_model(folder, name, change):
    """Write base + change as a full checkpoint."""
    shutil.copytree(folder / "base", folder / "full" / name)

    def add(tensors):
        for tensor, delta in change.items():
            tensors[tensor] += delta

    edit_tensors(folder / "full" / name / "model.safetensors", add)


def test_a_full_checkpoint_needs_a_rank_and_is_its_nearest_adapter(folder):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(16, 24, generator=generator) * 0.1
    full_model(
        folder, "alpha", {"model.layers.0.mlp.down_proj.weight": matrix, "model.norm.weight": torch.full((16,), 0.1)}
    )
    experts = [{"name": "alpha", "model": "./full/alpha"}, {"name": "beta", "model": "./adapters/beta"}]
    tasks = {name: {"test": f"data/{name}.test.jsonl"} for name in ("alpha", "beta")}
    ((place, message, hint),) = refused(folder, experts=experts, tasks=tasks)
    assert place.startswith("/recipe.yaml:6 experts[0].model")
    assert message == "alpha is a full checkpoint, and strategies work on adapters"
    assert "`rank: 16`" in hint
    experts[0]["rank"] = 5
    contest, (notice,) = prepared(folder, experts=experts, tasks=tasks)
    delta = contest.sources.factors["alpha"]["model.layers.0.mlp.down_proj.weight"]
    u, s, vt = np.linalg.svd(matrix.double().numpy())
    best = (u[:, :5] * s[:5]) @ vt[:5]
    assert delta.b @ delta.a == pytest.approx(best, abs=1e-5)
    # The norm is no matrix: what it changed is lost, and counted.
    share = (s[:5] ** 2).sum() / ((s**2).sum() + 16 * 0.01)
    assert (
        notice
        == f"alpha is a full checkpoint, taken as its nearest adapter of rank 5, which holds {share:.1%} of its change"
    )
    assert list(contest.sources.factors["alpha"]) == ["model.layers.0.mlp.down_proj.weight"]


def other_base(folder):
    """Write a base that differs in one entry of one tensor."""
    shutil.copytree(folder / "base", folder / "older")
    edit_tensors(
        folder / "older" / "model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.weight"][2, 3].add_(0.5)
    )
    return folder / "older"


def test_an_adapter_of_another_revision_is_told_by_the_tensors_of_the_base_that_it_names(folder):
    older = other_base(folder)
    edit_json(folder / "adapters" / "beta" / "adapter_config.json", base_model_name_or_path=str(older))
    (found,) = refused(folder)
    assert found[0].startswith("/recipe.yaml:5 experts.from")
    assert found[1].startswith("beta was trained on another base: model.layers.1.mlp.up_proj.weight of ")
    # The same tensors in other files are the same base, as is one that is not known here.
    same = folder / "same"
    shutil.copytree(folder / "base", same)
    save_file(load_file(same / "model.safetensors"), same / "model.safetensors", metadata={"format": "pt", "x": "y"})
    for named in (str(same), "org/somewhere"):
        edit_json(folder / "adapters" / "beta" / "adapter_config.json", base_model_name_or_path=named)
        prepared(folder)


def test_an_adapter_made_here_tells_by_the_digests_of_its_bases_files(folder, monkeypatch):
    contest, _ = prepared(folder)
    (file,) = contest.sources.files["base"]

    def note(**change):
        source = {
            "name": "base", "kind": "full", "path": "b", "weight": None, "license": None,
            "files": [file.model_dump() | change],
        }  # fmt: skip
        manifest = {
            "generator": "x", "made_by": "extract", "recipe": None, "base": source, "experts": [], "seed": 0,
            "dtype": "F32", "modules": {}, "tensors": {}, "files": [], "digest": "",
        }  # fmt: skip
        (folder / "adapters" / "alpha" / "adapter_manifest.json").write_text(json.dumps(manifest))

    note()
    prepared(folder)
    note(name="pytorch_model.safetensors", xxh3="0" * 32)
    prepared(folder)
    note(xxh3="0" * 32)
    (found,) = refused(folder)
    assert found[1].startswith(
        "alpha was trained on another base: model.safetensors of its base has the digest 000000000000"
    )
    assert found[1].endswith(f"here it is {file.xxh3[:12]}")


def test_the_first_tensor_that_differs_is_named(folder):
    from mediator_cli.checkpoint.header import read_tensors

    one, other = read_tensors(folder / "base"), read_tensors(other_base(folder))
    assert first_difference(one, one) is None
    assert first_difference(one, other) == "model.layers.1.mlp.up_proj.weight"
    assert first_difference(one, {k: v for k, v in other.items() if k != "model.norm.weight"}) == "model.norm.weight"
    assert first_difference({k: v for k, v in one.items() if k != "model.norm.weight"}, one) == "model.norm.weight"


def test_rows_that_are_fitted_on_and_tested_on_are_told(folder):
    lines = (folder / "data" / "alpha.test.jsonl").read_text().splitlines(keepends=True)
    with (folder / "data" / "alpha.valid.jsonl").open("a") as file:
        file.writelines(lines[:3])
    _, notices = prepared(folder)
    assert notices == ("3 of 4 test rows of alpha are among its valid rows too",)


def test_all_is_told_before_anything_is_loaded(folder):
    (folder / "data" / "beta.test.jsonl").write_text("{}\n")
    (folder / "adapters" / "gamma" / "adapter_model.safetensors").unlink()
    strategies = ["bass", {"name": "merge_uniform", "scale": -1}, {"name": "merge_uniform", "label": "x", "sscale": 1}]
    found = refused(folder, strategies=strategies)
    assert [place.split(": ")[0] for place, _, _ in found] == [
        "/recipe.yaml:5 experts.from",
        "/recipe.yaml:7 tasks.from",
        "/recipe.yaml:7 tasks.from",
        "/recipe.yaml:9 strategies[0]",
        "/recipe.yaml:11 strategies[1].scale",
        "/recipe.yaml:14 strategies[2].sscale",
    ]
    assert found[3][1:] == ("no strategy 'bass'", "did you mean 'base'?")
    assert found[4][1] == "input should be greater than 0 (got -1)"
    assert found[5][1:] == ("merge_uniform has no parameter 'sscale'", "did you mean 'scale'?")


def test_strategies_that_lack_rows_are_refused_where_named_and_left_out_where_not(folder):
    tasks = {name: {"test": f"data/{name}.test.jsonl"} for name in ("alpha", "beta")}
    (found,) = refused(folder, tasks=tasks, strategies=["base", "ensemble_learned"])
    assert found[1] == "ensemble_learned: it is fitted on validation rows, and there are none for alpha, beta"
    contest, notices = prepared(folder, tasks=tasks, strategies=None)
    assert "base" in [entry.label for entry in contest.entries]
    assert "ensemble_learned" not in [entry.label for entry in contest.entries]
    assert any(notice.startswith("ensemble_learned is left out: it is fitted on") for notice in notices)


def test_tasks_must_know_experts(folder):
    (found,) = refused(folder, tasks={"x": {"test": "data/alpha.test.jsonl", "expert": "alfa"}})
    assert found[1:] == ("no expert 'alfa'", "did you mean 'alpha'?")
    (found,) = refused(folder, tasks={"x": {"test": "data/alpha.test.jsonl"}})
    assert found[1] == "no task is named like an expert: x"


def test_selections_keep_no_more_experts_than_there_are(folder):
    loaded = load_compare(
        write_recipe(folder, selection={"selectors": ["mbc", "greedy"], "representatives": ["medoid", "average"]})
    )
    assert sizes_of(loaded) == (1, 2, 3)
    asks = asks_of(loaded.recipe.selection, (1, 3))
    assert [ask.shown for ask in asks] == [
        "mbc (medoid), 1 kept", "mbc (medoid), 3 kept", "mbc (average), 1 kept", "mbc (average), 3 kept",
        "greedy, 1 kept", "greedy, 3 kept",
    ]  # fmt: skip
    loaded = load_compare(write_recipe(folder, selection={"k": [2, 4]}))
    with pytest.raises(RecipeError, match=r"selection.k\[1\]: there are 3 experts, 4 cannot be kept"):
        sizes_of(loaded)
