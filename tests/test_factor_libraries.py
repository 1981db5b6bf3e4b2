"""Adapters that a bundle keeps as they are: from the recipe to the answer, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft_adapters
import pytest
import torch
from conftest import Workshop, all_files, edit_json, edit_tensors, put, write_adapter
from crashes import run_forked
from peft import PeftModel
from test_kill import clear, kill_and_go_on, small_batches, undisturbed  # noqa: F401 - a fixture
from tiny_bundles import make_rows, write_rows
from tiny_tokens import FILMS, SUMS, WORDS, task_prompts, word_tokenizer, write_prompts
from transformers import AutoModelForCausalLM

from mediator_cli import Settings, load_recipe, make_plan, merge, read_bundle, verify_bundle
from mediator_cli.bundle.factors import FactorDelta, as_delta
from mediator_cli.bundle.manifest import LIBRARY_SCHEMA_VERSION, read_manifest
from mediator_cli.checkpoint.adapter.factors import read_factors
from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.errors import CheckpointError, RecipeError
from mediator_cli.pipeline import routable
from mediator_cli.pipeline.assign import sparse_sizes
from mediator_cli.pipeline.cost import list_steps, measures_conflict
from mediator_cli.pipeline.estimate import describe_plan
from mediator_cli.pipeline.routable import Mixable, check_routing
from mediator_cli.runtime.open import open_bundle

sys.path.insert(0, str(Path(__file__).parent / "executors"))
from shared_merge import merge_together

# PEFT asks transformers under an old name, and speaks of layers that it was told about.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")

FACTORS: dict[str, Any] = {"assign": {"rule": "all"}, "extract": {"mode": "factors"}}
LLAMA = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["v_proj", "k_proj", "gate_proj"], "r": 3, "lora_alpha": 5, "use_rslora": True},
    "words": {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "rank_pattern": {"up_proj": 4}},
}
GPT2 = {
    "fused": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "out": {"target_modules": ["c_proj"], "fan_in_fan_out": True, "r": 4, "layers_to_transform": [1]},
}
FAMILIES = {"llama": (peft_adapters.llama, LLAMA), "gpt2": (peft_adapters.gpt2_untied, GPT2)}
IDS = torch.tensor([[6, 7, 8, 9, 5, 11], [12, 3, 4, 17, 18, 2], [1, 5, 6, 2, 14, 9]])


class Library(NamedTuple):
    """A base with adapters as PEFT writes them, and the bundle that is merged of them."""

    folder: Path
    names: tuple[str, ...]
    bundle: Path


def write_library(folder: Path, family: str) -> tuple[str, ...]:
    """Write a base with a tokenizer, adapters on it, and a recipe."""
    model, adapters = FAMILIES[family]
    for name, config in adapters.items():
        peft_adapters.write(folder, model, **config)
        # PEFT stores the embeddings themselves beside their factors unless it is told not to.
        edit_tensors(folder / "adapter/adapter_model.safetensors", only_factors)
        shutil.move(folder / "adapter", folder / "adapters" / name)
    word_tokenizer().save_pretrained(folder / "base")
    recipe = {"version": 1, "base": "./base", "experts": {"from": "./adapters"}, **FACTORS}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return tuple(sorted(adapters))


def only_factors(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora_" not in name]:
        del tensors[name]


def merge_recipe(folder: Path, out: str = "out", *changes: str, workers: int = 2) -> Path:
    return merge(
        make_plan(load_recipe(folder / "recipe.yaml", changes)), folder / out, settings=Settings(workers=workers)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Library]:
    """Make the library of a family once."""

    @cache
    def make(family: str) -> Library:
        folder = tmp_path_factory.mktemp(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = write_library(folder, family)
        return Library(folder, names, merge_recipe(folder))

    return make


@pytest.fixture(scope="module", params=FAMILIES)
def library(made: Callable[[str], Library], request: pytest.FixtureRequest) -> Library:
    """A library of each family."""
    return made(request.param)


@pytest.fixture(scope="module")
def llamas(made: Callable[[str], Library]) -> Library:
    """The library of Llama adapters."""
    return made("llama")


@pytest.fixture(scope="module")
def references(library: Library) -> dict[str, torch.Tensor]:
    """What PEFT answers with each adapter, and transformers with the base."""
    with torch.no_grad():
        answers = {"dense": AutoModelForCausalLM.from_pretrained(library.folder / "base")(IDS).logits}
        for name in library.names:
            base = AutoModelForCausalLM.from_pretrained(library.folder / "base")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(base, library.folder / "adapters" / name)
            answers[name] = model(IDS).logits
    return answers


def changes_of(library: Library) -> dict[str, dict[str, FactorDelta]]:
    base = read_tensors(library.folder / "base")
    adapters = {name: open_adapter(library.folder / "adapters" / name, base) for name in library.names}
    return {name: {k: as_delta(v) for k, v in read_factors(each).items()} for name, each in adapters.items()}


# --- what is written


def test_every_adapter_is_kept_exactly_and_the_dense_expert_is_the_base(library: Library) -> None:
    bundle, changes = read_bundle(library.bundle), changes_of(library)
    for name, own in changes.items():
        assert set(bundle.experts[name].tensors) == set(own)
        for tensor, delta in own.items():
            found = bundle.delta(name, tensor)
            assert isinstance(found, FactorDelta)
            assert torch.equal(found.a, delta.a)
            assert torch.equal(found.b, delta.b)
    base = AutoModelForCausalLM.from_pretrained(library.folder / "base").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(library.bundle).state_dict()
    assert all(torch.equal(base[name], dense[name]) for name in base)


def test_the_manifest_tells_of_factors(llamas: Library) -> None:
    manifest = read_manifest(llamas.bundle)
    assert manifest.schema_version == LIBRARY_SCHEMA_VERSION
    assert manifest.extract is not None
    assert (manifest.extract.mode, manifest.extract.dense, manifest.extract.values) == ("factors", "base", "factors")
    assert set(manifest.assignment.values()) == {"route"}
    assert manifest.conflict is None
    shapes = {name: info.shape for name, info in read_tensors(llamas.folder / "base").items()}
    for record, own in zip(manifest.sparse, changes_of(llamas).values(), strict=True):
        assert {unit.energy for unit in record.units.values()} == {1.0}
        assert sum(unit.n_kept for unit in record.units.values()) == sum(np.prod(shapes[name]) for name in own)
    assert verify_bundle(llamas.bundle).problems == ()
    assert "LoRA adapters as they were trained" in (llamas.bundle / "README.md").read_text()


def test_a_plan_foretells_the_bytes_and_no_reading_of_experts(llamas: Library) -> None:
    plan = check_routing(make_plan(load_recipe(llamas.folder / "recipe.yaml")))
    sizes, manifest = sparse_sizes(plan), read_manifest(llamas.bundle)
    most = sum(sizes.units.values()) + sizes.files
    numbers = sum(4 * (d.a.numel() + d.b.numel()) for own in changes_of(llamas).values() for d in own.values())
    assert numbers < manifest.sizes.sparse <= most
    report = describe_plan(plan, None, Settings())
    assert report.sparse_bytes[0] == report.sparse_bytes[1] == sum(sizes.units.values())
    assert report.read_bytes["extract experts"] == report.read_bytes["measure conflict"] == 0
    assert not measures_conflict(plan)
    assert not [step for step in list_steps(plan) if step.kind in ("extract", "conflict")]


def test_threads_and_shards_change_no_number(llamas: Library) -> None:
    again = all_files(merge_recipe(llamas.folder, "again", workers=1))
    expected = all_files(llamas.bundle)
    # The title on the card is the folder's name.
    assert {n: again[n] for n in again if n.startswith(("experts", "model"))} == {
        n: expected[n] for n in expected if n.startswith(("experts", "model"))
    }
    cut = merge_recipe(llamas.folder, "cut", "output.shard_size=3000B")
    assert verify_bundle(cut).problems == ()
    files = {record.expert: record.files for record in read_manifest(cut).sparse}
    assert max(map(len, files.values())) > 2
    assert read_manifest(cut).digest == read_manifest(llamas.bundle).digest


# --- how it answers


def test_every_expert_alone_answers_as_peft_does(library: Library, references: dict[str, torch.Tensor]) -> None:
    model = open_bundle(library.bundle)
    assert model.expert_names == library.names
    with torch.no_grad():
        for name, expected in references.items():
            with model.mixing(name):
                torch.testing.assert_close(model(IDS).logits, expected, atol=2e-5, rtol=1e-4)
        rows = ["dense", *library.names][: len(IDS)]
        weights = torch.tensor([[float(row == name) for name in library.names] for row in rows])
        with model.mixing(weights):
            answers = model(IDS).logits
    for at, row in enumerate(rows):
        torch.testing.assert_close(answers[at], references[row][at], atol=2e-5, rtol=1e-4)


def test_a_mixture_is_the_base_with_the_weighted_sum_of_all_products(library: Library) -> None:
    weights = dict(zip(library.names, (0.5, -0.25, 0.75), strict=False))
    reference = AutoModelForCausalLM.from_pretrained(library.folder / "base")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in reference.state_dict().items()}
    with torch.no_grad():
        for expert, own in changes_of(library).items():
            for name, delta in own.items():
                stored[name.removeprefix("transformer.")] += weights[expert] * (delta.b @ delta.a)
        expected = reference(IDS).logits
        model = open_bundle(library.bundle)
        with model.mixing(weights):
            torch.testing.assert_close(model(IDS).logits, expected, atol=2e-5, rtol=1e-4)


def test_units_that_are_not_routed_are_merged_as_ever(llamas: Library) -> None:
    unit = next(unit for unit in read_manifest(llamas.bundle).assignment if unit.endswith(".1"))
    plan = make_plan(
        load_recipe(llamas.folder / "recipe.yaml", [f"assign={json.dumps({'rule': 'listed', 'units': [unit]})}"])
    )
    assert any("merged for all inputs" in notice for notice in check_routing(plan).notices)
    bundle, changes = read_bundle(merge(plan, llamas.folder / "listed")), changes_of(llamas)
    assert verify_bundle(llamas.folder / "listed").problems == ()
    n, units = len(llamas.names), {tensor.name: tensor.unit for tensor in plan.tensors}
    for name in bundle.tensors:
        base = read_bundle(llamas.bundle).dense(name)
        deltas = [own[name].b @ own[name].a for own in changes.values() if name in own]
        if units[name] != unit and deltas:
            torch.testing.assert_close(bundle.dense(name), base + sum(deltas) / n, atol=1e-5, rtol=1e-5)
            assert all(name not in expert.tensors for expert in bundle.experts.values())
        elif units[name] == unit:
            assert torch.equal(bundle.dense(name), base)
            assert [name in e.tensors for e in bundle.experts.values()].count(True) == len(deltas)


def test_a_score_chooses_the_units_where_the_rule_asks_for_it(llamas: Library) -> None:
    folder = merge_recipe(llamas.folder, "chosen", 'assign={"rule": "top_k", "k": 1}', "extract.mode=factors")
    manifest = read_manifest(folder)
    assert manifest.conflict is not None
    assert list(manifest.assignment.values()).count("route") == 1
    assert verify_bundle(folder).problems == ()


# --- adapters of the workshop's base


@pytest.fixture
def shelf(workshop: Workshop) -> Workshop:
    """A workshop with the adapters lora and other, the second on part of the layers."""
    write_adapter(workshop.folder / "other", 5, rank=3)
    edit_tensors(workshop.folder / "other/adapter_model.safetensors", keep_layer_1)
    recipe(workshop)
    return workshop


def keep_layer_1(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." not in name]:
        del tensors[name]


def recipe(shop: Workshop, *names: str, **fields: Any) -> Path:
    experts = [{"name": name, "model": f"./{name}"} for name in names or ("lora", "other")]
    return shop.recipe(**{"experts": experts, **FACTORS, **fields})


SHARDS = {"output": {"shard_size": "3000B"}}
"""Several shards, of several batches each."""
MERGE = ("merge", "recipe.yaml", "-o", "out")


def test_a_killed_merge_goes_on_to_the_same_bytes(shelf: Workshop) -> None:
    recipe(shelf, **SHARDS)
    files, n_calls = undisturbed(shelf)
    assert len([name for name in files if name.startswith("experts/lora")]) > 1
    for share in (0.3, 0.6):
        kill_and_go_on(shelf, MERGE, files, int(share * n_calls))
        assert verify_bundle(shelf.folder / "out").problems == ()
        clear(shelf)


@pytest.mark.slow
def test_a_merge_that_is_killed_at_many_moments_goes_on_to_the_same_bytes(shelf: Workshop) -> None:
    for fields in (SHARDS, {}):
        recipe(shelf, **fields)
        files, n_calls = undisturbed(shelf)
        for number in range(1, n_calls, 5):
            kill_and_go_on(shelf, MERGE, files, number)
            clear(shelf)


def test_processes_share_the_work_to_the_same_bytes(shelf: Workshop) -> None:
    recipe(shelf, **SHARDS)
    assert run_forked(shelf.folder, ("merge", "recipe.yaml", "-o", "recipe")).code == 0
    expected = all_files(shelf.folder / "recipe")
    shutil.rmtree(shelf.folder / "recipe")
    assert merge_together(shelf.folder / "recipe.yaml", shelf.folder / "recipe", 2) == [None] * 2
    assert all_files(shelf.folder / "recipe") == expected


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)][0, 0] = float("nan")


def full_of(shop: Workshop) -> None:
    recipe(shop, "lora", "a")


def saved_norm(shop: Workshop) -> None:
    name = "model.norm.weight"
    file = shop.folder / "other/adapter_model.safetensors"
    edit_tensors(file, put(f"base_model.model.{name}", torch.zeros_like(shop.base[name])))
    edit_json(shop.folder / "other/adapter_config.json", modules_to_save=["norm"])


def with_recipe(**fields: Any) -> Callable[[Workshop], None]:
    return lambda shop: recipe(shop, **fields)


REFUSED: dict[str, tuple[Callable[[Workshop], Any], str, str]] = {
    "full checkpoint": (
        full_of,
        "a is a full checkpoint, and mode factors keeps LoRA adapters as they are",
        "mediator extract-lora ./base ./a -o a-lora",
    ),
    "saved module": (saved_norm, "holds whole tensors (modules_to_save, or", "make a plain adapter of it"),
    "dense average": (
        with_recipe(extract={"mode": "factors", "dense": "average"}),
        "mode 'factors' adds to the base's own values; write `dense: base`",
        "",
    ),
    "density": (with_recipe(extract={"mode": "factors", "density": 0.5}), "mode 'factors' takes no density", ""),
    "another mode beside": (
        with_recipe(overrides=[{"match": "*.mlp.*", "extract": {"mode": "sign"}}]),
        "mode 'sign' beside mode 'factors': factors are kept of all tensors or of none",
        "set the mode under `extract` alone",
    ),
    "factors beside another mode": (
        with_recipe(extract={"dense": "base"}, overrides=[{"match": "*.mlp.*", "extract": {"mode": "factors"}}]),
        "mode 'factors' beside mode 'sparse'",
        "set the mode under `extract` alone",
    ),
    "align": (with_recipe(align={"method": "git_rebasin"}), "puts hidden units in another order", "leave `align` out"),
    "nothing kept": (
        with_recipe(assign={"rule": "listed", "units": ["model.layers.0"]}),
        "other changes nothing in the units that may be routed",
        "write `assign: {rule: all}`",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_kept_as_factors_is_refused(shelf: Workshop, mediator: Callable[..., Any], what: str) -> None:
    change, message, hint = REFUSED[what]
    change(shelf)
    before = all_files(shelf.folder)
    run = mediator("merge", "recipe.yaml", "-o", "out")
    assert (run.code, "Traceback" in run.err) == (2, False)
    assert message in run.err
    assert hint in run.err
    assert all_files(shelf.folder) == before


def test_dora_is_refused_by_name(tmp_path: Path) -> None:
    peft_adapters.write(tmp_path, peft_adapters.llama, target_modules=["q_proj"], use_dora=True)
    recipe = {"version": 1, "base": "./base", "experts": [{"name": "d", "model": "./adapter"}], **FACTORS}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match="is a DoRA adapter"):
        make_plan(load_recipe(tmp_path / "recipe.yaml"))


def test_an_adapter_with_nan_leaves_no_bundle(shelf: Workshop, mediator: Callable[..., Any]) -> None:
    edit_tensors(shelf.folder / "other/adapter_model.safetensors", nan)
    run = mediator(*MERGE)
    assert run.code == 2
    assert "other" in run.err
    assert not (shelf.folder / "out").exists()
    with pytest.raises(CheckpointError):
        merge(make_plan(load_recipe(shelf.folder / "recipe.yaml")), shelf.folder / "out")


def test_a_change_that_cannot_be_mixed_is_refused(shelf: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    monkeypatch.setattr(routable, "find_mixable", lambda *_: Mixable(kinds={name: "a module"}, missing=()))
    plan = make_plan(load_recipe(shelf.folder / "recipe.yaml"))
    with pytest.raises(RecipeError, match=rf"changes {name}, which the run time cannot mix"):
        check_routing(plan)


def test_tokens_that_move_are_refused_where_an_adapter_changes_them(tmp_path: Path) -> None:
    peft_adapters.write(tmp_path, peft_adapters.llama, target_modules=["embed_tokens"])
    edit_tensors(tmp_path / "adapter/adapter_model.safetensors", only_factors)
    recipe = {"version": 1, "base": "./base", "experts": [{"name": "e", "model": "./adapter"}], **FACTORS}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "pad_tokens_to": 40}))
    word_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(RecipeError, match="whose rows of tokens the recipe changes"):
        make_plan(load_recipe(tmp_path / "recipe.yaml"))


def test_what_keep_base_leaves_out_of_an_adapter_is_told(shelf: Workshop) -> None:
    plan = make_plan(load_recipe(recipe(shelf, keep_base=["*.down_proj.weight"])))
    (told,) = [notice for notice in check_routing(plan).notices if "though adapters change them" in notice]
    assert "model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight" in told
    bundle = read_bundle(merge(plan, shelf.folder / "out"))
    assert not [n for e in bundle.experts.values() for n in e.tensors if n.endswith("down_proj.weight")]


def test_weights_have_no_say_and_this_is_told(shelf: Workshop) -> None:
    first = shelf.folder / "recipe.yaml"
    same = merge(make_plan(load_recipe(first)), shelf.folder / "same")
    plan = check_routing(make_plan(load_recipe(first, ["experts.0.weight=3.0"])))
    assert any("no say where experts are kept as factors" in notice for notice in plan.notices)
    assert read_manifest(merge(plan, shelf.folder / "other weights")).digest == read_manifest(same).digest


def test_an_expert_of_a_library_is_routed_to_and_evaluated(
    llamas: Library, mediator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words in zip(llamas.names, (SUMS, FILMS, tuple(WORDS[15:])), strict=True):
        write_prompts(llamas.folder / f"{name}.jsonl", task_prompts(words))
    rows = write_rows(llamas.folder / "rows.jsonl", make_rows(6))
    text = json.loads((llamas.folder / "recipe.yaml").read_text())
    text["experts"]["prompts"] = "./{name}.jsonl"
    text["router"] = {"features": "embedding_mean", "classifier": "ridge"}
    (llamas.folder / "routed.yaml").write_text(json.dumps(text))
    monkeypatch.chdir(llamas.folder)
    assert mediator("merge", "routed.yaml", "-o", "routed", "--quiet").code == 0
    run = mediator("evaluate", "routed::plain", "routed", "--tasks", rows, "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)
    model = open_bundle(llamas.folder / "routed")
    assert model.route([[6, 7, 8]]).weights.shape == (1, 3)
    assert mediator("verify", "routed").code == 0
    assert "mode factors" in mediator("inspect", "routed").out
