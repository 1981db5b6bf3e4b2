"""Experts that are not stored sparsely: signs, EMR-Merging, TALL-masks and a basis, from the recipe to the answer."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop, all_files, write_checkpoint
from crashes import run_forked
from safetensors.torch import load_file, save_file
from test_kill import MERGE, clear, go_on, small_batches, undisturbed  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM

from mediator_cli import Settings, load_recipe, make_plan, merge, read_bundle, verify_bundle
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.errors import RecipeError
from mediator_cli.pipeline.assign import sparse_sizes
from mediator_cli.plan.model import Plan
from mediator_cli.runtime.open import open_bundle

sys.path.insert(0, str(Path(__file__).parent / "methods"))
from golden_cases import CASES, INPUTS, NAMES, stored, tensor_of

MODES: dict[str, dict[str, Any]] = {
    "sign": {"mode": "sign", "dense": "base"},
    "emr": {"mode": "emr", "dense": "base"},
    "emr tensors": {"mode": "emr", "dense": "base", "scale": "tensors", "values": "fp16"},
    "tall": {"mode": "tall_mask", "dense": "base"},
    "basis": {"mode": "basis", "values": "fp32"},
}
ROUTE: dict[str, Any] = {"assign": {"rule": "all"}}
FLOAT32: dict[str, Any] = {"output": {"dtype": "float32"}}


# --- the authors' numbers


def merge_golden(folder: Path, name: str, extract: dict[str, Any]) -> Any:
    """Merge a golden case's experts, all routed, and open the bundle."""
    case = CASES[name]
    for model in ("base", *case["models"]):
        tensors = {key: torch.from_numpy(tensor_of(case, model, key)) for key in NAMES}
        write_checkpoint(folder / model, tensors, {"num_hidden_layers": 1, "vocab_size": 50})
    experts = [{"name": model, "model": f"./{model}"} for model in case["models"]]
    recipe = {"version": 1, "base": "./base", "experts": experts, **ROUTE, **FLOAT32, "extract": extract}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    plan = make_plan(load_recipe(folder / "recipe.yaml"))
    return read_bundle(merge_unchecked(plan, folder / "out", Settings(workers=2)))


def merge_unchecked(plan: Plan, folder: Path, settings: Settings) -> Path:
    """Merge tensors that are no whole model, as if all of them could be mixed for each input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mediator_cli.pipeline.merge.check_routing", lambda plan: plan)
        return merge(plan, folder, settings=settings)


def assert_near(case: dict[str, Any], found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, **case["tolerance"])


@pytest.mark.parametrize(("name", "scale"), [("emr_official", "tensors"), ("emr_global_scale_official", "elements")])
def test_emr_gives_the_numbers_of_the_authors_programs(tmp_path: Path, name: str, scale: str) -> None:
    case, expected = CASES[name], stored(CASES[name])
    bundle = merge_golden(tmp_path, name, {"mode": "emr", "dense": "base", "scale": scale, "values": "fp32"})
    for at, model in enumerate(case["models"]):
        expert = bundle.experts[model]
        for key in NAMES:
            gate, unified = expert.gate(key), expert.shared_arrays(key)[0].numpy()
            assert_near(case, gate.coefficients.numpy(), expected["out.scales"][at : at + 1])
            assert_near(case, unified, expected[f"out.unified.{key}"])
            # Both cases share their masks.
            mask = stored(CASES["emr_official"])[f"out.mask.{model}.{key}"]
            assert np.array_equal(gate.flags().numpy(), mask.ravel() == 1)
            whole = INPUTS[f"base.{key}"] + expected["out.scales"][at] * mask * expected[f"out.unified.{key}"]
            assert_near(case, bundle.expert(model, key).numpy(), whole)


def test_tall_masks_gives_the_numbers_of_the_authors_program(tmp_path: Path) -> None:
    case = CASES["tall_masks_official"]
    expected = stored(case)
    factor = case["parameters"]["tall_mask_lambda"]
    bundle = merge_golden(
        tmp_path, case["id"], {"mode": "tall_mask", "dense": "base", "mask_lambda": factor, "values": "fp32"}
    )
    for model in case["models"]:
        for key in NAMES:
            gate, total = bundle.experts[model].gate(key), bundle.experts[model].shared_arrays(key)[0].numpy()
            mask = expected[f"out.mask.{model}.{key}"]
            assert gate.coefficients.tolist() == [1.0]
            assert_near(case, total, expected[f"out.multi_task_vector.{key}"])
            assert np.array_equal(gate.flags().numpy(), mask.ravel() == 1)
            whole = INPUTS[f"base.{key}"] + mask * expected[f"out.multi_task_vector.{key}"]
            assert_near(case, bundle.expert(model, key).numpy(), whole)


def test_signs_give_the_numbers_of_bitdelta(tmp_path: Path) -> None:
    case = CASES["bitdelta_fusionbench"]
    expected = stored(case)
    bundle = merge_golden(tmp_path, case["id"], {"mode": "sign", "dense": "base"})
    (model,) = case["models"]
    for key in case["tensors"]:
        assert_near(case, bundle.experts[model].tensors[key].scale, expected[f"out.coefficient.{key}"])
        assert_near(case, bundle.expert(model, key).numpy(), expected[f"out.{key}"])


# --- what is written


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_is_verified_and_is_what_the_mode_says(workshop: Workshop, mode: str) -> None:
    folder = workshop.merge("out", **ROUTE, extract=MODES[mode], **FLOAT32)
    assert verify_bundle(folder).problems == ()
    manifest, bundle = read_manifest(folder), read_bundle(folder)
    assert manifest.schema_version == 3
    assert manifest.extract is not None
    assert manifest.extract.mode == MODES[mode]["mode"]
    for expert, tensors in workshop.experts.items():
        (record,) = [sparse for sparse in manifest.sparse if sparse.expert == expert]
        for unit, kept in record.units.items():
            names = [name for name in tensors if name.startswith(f"{unit}.")]
            own = torch.cat([(tensors[n].float() - bundle.dense(n)).flatten() for n in names]).double()
            got = torch.cat([(bundle.expert(expert, n) - bundle.dense(n)).flatten() for n in names]).double()
            energy = float(1 - (own - got).square().sum() / own.square().sum())
            assert kept.energy == pytest.approx(energy, abs=1e-5)
    if mode == "basis":
        # All but one of the directions: every expert comes back.
        assert all(unit.energy > 0.999999 for sparse in manifest.sparse for unit in sparse.units.values())


def test_a_bit_an_entry_is_what_experts_cost(workshop: Workshop) -> None:
    for mode in MODES:
        folder = workshop.merge(f"out {mode}", **ROUTE, extract=MODES[mode])
        bundle, manifest = read_bundle(folder), read_manifest(folder)
        for expert in bundle.experts.values():
            for name, spec in expert.tensors.items():
                arrays = expert.file_of(name).places(name)
                padded = -(-spec.size // 64) * 8
                kinds = {"sign": {"values": padded}, "basis": {"coefficients": 16}}
                gated = {"bitmap": padded, "coefficients": 8}
                assert {kind: info.n_bytes for kind, info in arrays.items()} == kinds.get(mode, gated)
        on_disk = [*folder.glob("experts/*"), *folder.glob("shared*")]
        assert manifest.sizes.sparse == sum(file.stat().st_size for file in on_disk)
        assert (folder / "shared.safetensors").exists() == (mode != "sign")


@pytest.mark.parametrize("mode", MODES)
def test_the_size_that_is_foretold_is_a_near_bound(workshop: Workshop, mode: str) -> None:
    recipe = workshop.recipe(**ROUTE, extract=MODES[mode])
    plan = make_plan(load_recipe(recipe))
    sizes = sparse_sizes(plan)
    folder = merge(plan, workshop.folder / "out")
    found = read_manifest(folder).sizes.sparse
    assert found <= sum(sizes.units.values()) + sizes.files <= found + 2048


@pytest.mark.parametrize("mode", ["emr", "basis"])
def test_a_budget_of_bytes_holds(workshop: Workshop, mode: str) -> None:
    rule = {"rule": "byte_budget", "bytes": 60_000, "candidates": "all"}
    folder = workshop.merge("out", assign=rule, extract=MODES[mode])
    manifest = read_manifest(folder)
    assert 0 < manifest.sizes.sparse <= 60_000
    assert verify_bundle(folder).problems == ()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_depends_on_slabs_threads_and_shards(workshop: Workshop, mode: str) -> None:
    generator = torch.Generator().manual_seed(5)
    sides = {"model.layers.0.mlp.up_proj.weight": (301, 333), "model.layers.1.mlp.up_proj.weight": (70, 999)}
    for model in ("base", "a", "b"):
        tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in sides.items()}
        write_checkpoint(workshop.folder / model, tensors, {"num_hidden_layers": 2})
    digests = set()
    for number, (blocks, workers, shard) in enumerate([(1, 1, "5GB"), (2, 3, "150KB"), (9, 2, "5GB")]):
        settings = Settings(slab=blocks * BLOCK, workers=workers)
        fields = {**ROUTE, "extract": MODES[mode], "output": {"shard_size": shard}}
        plan = make_plan(load_recipe(workshop.recipe(**fields)))
        folder = merge_unchecked(plan, workshop.folder / f"out{number}", settings)
        assert verify_bundle(folder).problems == ()
        digests.add(read_manifest(folder).digest)
    assert len(digests) == 1


def test_overrides_choose_a_mode_for_some_tensors(workshop: Workshop) -> None:
    lossless = {"mode": "sparse", "density": 1.0, "values": "bf16", "rescale": 1.0}
    overrides = [{"match": "*norm*", "extract": lossless}, {"match": "*mlp*", "extract": {"mode": "emr"}}]
    folder = workshop.merge("out", **ROUTE, extract=MODES["sign"], overrides=overrides)
    assert verify_bundle(folder).problems == ()
    bundle = read_bundle(folder)
    ways = {(n.split(".")[-2], s.values) for n, s in bundle.experts["a"].tensors.items()}
    assert {("norm", "bf16"), ("up_proj", "shared"), ("q_proj", "sign")} <= ways
    for name, tensor in workshop.experts["a"].items():
        if "norm" in name:
            assert torch.equal(bundle.expert("a", name), tensor)


def test_a_sparse_bundle_is_of_version_2_and_knows_no_mode(workshop: Workshop) -> None:
    folder = workshop.merge("out", **ROUTE, extract={"mode": "sparse", "density": 0.3})
    written = json.loads((folder / "routing_manifest.json").read_text())
    assert written["schema_version"] == 2
    assert "shared" not in written
    assert set(written["extract"]) == {"dense", "density", "over", "select", "rescale", "values"}
    plain = workshop.merge("plain", **ROUTE, extract={"density": 0.3})
    assert read_manifest(plain).digest == read_manifest(folder).digest


# --- what is refused


@pytest.mark.parametrize(
    ("extract", "words"),
    [
        ({"mode": "emr"}, "mode 'emr' adds to the base's own values; write `dense: base`"),
        ({"mode": "tall_mask", "dense": "average"}, "mode 'tall_mask' adds to the base's own values"),
        ({"mode": "sign", "density": 0.5}, "mode 'sign' takes no density"),
        ({"mode": "emr", "dense": "base", "values": "int8"}, "not as int8"),
        ({"mode": "basis", "mask_lambda": 0.4}, "mode 'basis' takes no mask_lambda; it takes directions, values"),
        ({"scale": "tensors"}, "mode 'sparse' takes no scale"),
        ({"mode": "basis", "directions": 2}, "2 experts differ from their mean in at most 1 directions"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(workshop: Workshop, extract: Any, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(load_recipe(workshop.recipe(**ROUTE, extract=extract)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("extract", "override", "words"),
    [
        ({"dense": "average"}, {"mode": "emr"}, "write `dense: base`"),
        (MODES["sign"], {"density": 0.1}, "mode 'sign' takes no density"),
        (MODES["emr"], {"values": "sign"}, "not as sign"),
        (MODES["emr"], {"mode": "basis", "directions": 5}, "at most 1 directions"),
    ],
)
def test_an_override_is_refused_by_the_mode_it_leads_to(
    workshop: Workshop, extract: Any, override: Any, words: str
) -> None:
    recipe = workshop.recipe(**ROUTE, extract=extract, overrides=[{"match": "*mlp*", "extract": override}])
    with pytest.raises(RecipeError) as caught:
        make_plan(load_recipe(recipe))
    assert words in str(caught.value)
    assert "overrides[0].extract" in str(caught.value)


# --- interrupted


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["emr", "tall"])
def test_a_killed_merge_goes_on_to_the_same_bytes(workshop: Workshop, mode: str) -> None:
    sparse, basis = {"mode": "sparse", "density": 0.3, "values": "int8"}, {"mode": "basis"}
    overrides = [{"match": "*self_attn*", "extract": sparse}, {"match": "*down*", "extract": basis}]
    workshop.recipe(**ROUTE, extract=MODES[mode], overrides=overrides, output={"shard_size": "1500B"})
    files, n_calls = undisturbed(workshop)
    assert any(name.startswith("shared-00002") for name in map(str, files))
    for number in [2, *sorted(random.Random(mode).sample(range(3, n_calls), 2)), n_calls]:
        run = run_forked(workshop.folder, MERGE, number)
        assert run.code == -signal.SIGKILL, run.err
        go_on(workshop, MERGE, files)
        assert verify_bundle(workshop.folder / "out").problems == ()
        clear(workshop)


# --- answers


def as_floats(folder: Path) -> None:
    """Turn a bundle's sources into small float32 numbers."""
    for name in ("base", "a", "b"):
        file = folder / name / "model.safetensors"
        scaled = {n: t.float() if n.endswith("norm.weight") else 0.3 * t.float() for n, t in load_file(file).items()}
        save_file(scaled, file, metadata={"format": "pt"})


PROMPTS = torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(3))
MIXTURES = [[1.0, 0.0], [0.25, 0.75], [0.0, 0.0], [0.0, 1.0]]


def logits_of(folder: Path, weights: list[float], prompts: torch.Tensor) -> torch.Tensor:
    """Load base + Σ weight · delta as a plain model, deltas read from the bundle, and run it."""
    bundle = read_bundle(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mixed = bundle.dense(name).float()
            for expert, weight in zip("ab", weights, strict=True):
                mixed = mixed + weight * bundle.delta(expert, name).flat().view(mixed.shape)
            parameter.copy_(mixed)
        found: torch.Tensor = model(prompts).logits
    return found


@pytest.mark.parametrize("switch", [1, 10**9], ids=["matrices", "products"])
@pytest.mark.parametrize("mode", MODES)
def test_every_row_gets_what_its_own_model_answers(workshop: Workshop, mode: str, switch: int) -> None:
    as_floats(workshop.folder)
    folder = workshop.merge("out", **ROUTE, extract=MODES[mode])
    model = open_bundle(folder, dtype=torch.float32, switch_tokens=switch)
    with torch.no_grad(), model.mixing(MIXTURES):
        found = model(PROMPTS).logits
    for row, weights in enumerate(MIXTURES):
        expected = logits_of(folder, weights, PROMPTS[row : row + 1])[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_all_weight_on_one_expert_is_that_expert_to_the_bit(workshop: Workshop, mode: str) -> None:
    as_floats(workshop.folder)
    folder = workshop.merge("out", **ROUTE, extract=MODES[mode])
    model = open_bundle(folder, dtype=torch.float32)
    for expert, weights in (("a", [1.0, 0.0]), ("b", [0.0, 1.0])):
        with torch.no_grad(), model.mixing(expert):
            assert torch.equal(model(PROMPTS).logits, logits_of(folder, weights, PROMPTS))


@pytest.mark.parametrize("mode", MODES)
def test_mixtures_are_linear_in_the_weights(workshop: Workshop, mode: str) -> None:
    folder = workshop.merge("out", **ROUTE, extract=MODES[mode], **FLOAT32)
    bundle = read_bundle(folder)
    for name in workshop.base:
        dense = bundle.dense(name)
        a, b = bundle.expert("a", name) - dense, bundle.expert("b", name) - dense
        mixed = bundle.mixture({"a": 0.3, "b": -1.5}, name) - dense
        torch.testing.assert_close(mixed, 0.3 * a - 1.5 * b, atol=2e-6, rtol=1e-5)


def test_the_inspected_bundle_tells_its_mode(workshop: Workshop, mediator: Any) -> None:
    workshop.merge("out", **ROUTE, extract=MODES["emr"])
    run = mediator("inspect", "out")
    assert run.code == 0
    assert "mode emr (scale=elements)" in run.out
    assert "shared by the experts" in run.out
    run = mediator("inspect", "out", "--json")
    assert json.loads(run.out)["manifest"]["extract"]["mode"] == "emr"
    shutil.rmtree(workshop.folder / "out")


def test_all_files_of_a_bundle_are_named(workshop: Workshop) -> None:
    folder = workshop.merge("out", **ROUTE, extract=MODES["tall"])
    assert verify_bundle(folder).unknown == ()
    assert "shared.safetensors" in map(str, all_files(folder))


def test_a_mode_that_does_not_exist_is_the_only_problem_told(workshop: Workshop, mediator: Any) -> None:
    workshop.recipe(**ROUTE, extract={"mode": "emmr", "mask_lambda": 0.4, "density": 0.3})
    run = mediator("validate", "recipe.yaml")
    assert run.code == 2
    assert "extract.mode" in run.err + run.out
    assert "takes no" not in run.err + run.out


def test_a_budget_for_mixed_matrices_comes_before_what_products_need(workshop: Workshop) -> None:
    folder = workshop.merge("out", **ROUTE, extract=MODES["emr"])
    entry = open_bundle(folder).opened.cache.entry_bytes
    for n_bytes, room in ((2 * entry, 2), (entry, 1), (10 * entry, 8), (0, 0)):
        model = open_bundle(folder, cache_bytes=n_bytes)
        assert min(model.opened.cache.room, 8) == room
        kept = {mixer.matrix.keeps for mixer in model.opened.mixers if mixer.matrix}
        assert kept == {n_bytes == 10 * entry}
        with torch.no_grad(), model.mixing([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.0, 0.0]]):
            assert model(PROMPTS).logits.isfinite().all()
