"""Experts of a bundle as LoRA and SHiRA adapters: what PEFT makes of them, and what their reports say."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import all_files, edit_tensors, put, with_prompts
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_exports import linear_shop, logits
from transformers import AutoModelForCausalLM

from mediator_cli.errors import BundleError, CheckpointError, OutputError
from mediator_cli.evaluate.tasks import Row, Task
from mediator_cli.export import lora
from mediator_cli.export.dense import export_dense
from mediator_cli.export.folder import open_for_export
from mediator_cli.export.lora import LoraJob, export_lora
from mediator_cli.export.settings import Run
from mediator_cli.export.shira import ShiraJob, Split, export_shira, split_for

ROUTE = {"assign": {"rule": "all"}, "extract": {"density": 0.5}}
ADAPTERS = [{"name": name, "model": f"./{name}"} for name in ("one", "two")]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return linear_shop(tmp_path_factory.mktemp("linear"))


@pytest.fixture(scope="module")
def bundle(shop):
    return open_for_export(shop.merge("sparse", experts=with_prompts(), **ROUTE))


@pytest.fixture(scope="module")
def low_rank(shop):
    return open_for_export(shop.merge("low", assign={"rule": "all"}, extract={"mode": "factors"}, experts=ADAPTERS))


@pytest.fixture(scope="module")
def exact(bundle, shop):
    """An export at rank 8, which these matrices have at most."""
    export_lora(bundle, shop.folder / "exact", LoraJob(rank=3, dtype="F32"), Run())
    return shop.folder / "exact"


def dense_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_adapters(bundle, *folders):
    """Load adapters on the dense model with stock PEFT, all active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(dense_model(bundle.path), folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, adapter_name=str(number))
        model.base_model.set_adapter([str(number) for number in range(len(folders))])
    return model


def expert_model(shop, name):
    return dense_model(shop.folder / name)


@pytest.mark.parametrize("name", ["a", "b"])
def test_at_full_rank_an_adapter_is_the_unpruned_expert(exact, bundle, shop, name):
    found, expected = logits(with_adapters(bundle, exact / name)), logits(expert_model(shop, name))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits(dense_model(bundle.path)), rtol=1e-3, atol=1e-3)


def test_the_config_is_one_that_servers_of_many_adapters_take(exact):
    for name in ("a", "b"):
        config = json.loads((exact / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
        assert (config["bias"], config["use_rslora"], config["use_dora"]) == ("none", False, False)
        assert config.get("modules_to_save") is None
        assert config["target_modules"] == [
            "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
        ]  # fmt: skip
        tensors = load_file(exact / name / "adapter_model.safetensors")
        assert len(tensors) == 2 * 3 * 7
        assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {8}
        assert {t.shape[1] for n, t in tensors.items() if "lora_B" in n} == {8}


def test_matrices_of_less_rank_are_padded_with_zeros(exact):
    tensors = load_file(exact / "a" / "adapter_model.safetensors")
    a = tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"]
    b = tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    assert (a.shape, b.shape) == ((8, 8), (4, 8))
    assert a[:4].abs().min() > 0
    assert not a[4:].any()
    assert not b[:, 4:].any()


def test_the_report_of_an_exact_export(exact):
    report = json.loads((exact / "export.json").read_text())
    assert (report["format"], report["rank"], report["dtype"]) == ("lora", 8, "F32")
    for expert in report["experts"]:
        assert (expert["origin"], expert["energy"], expert["not_carried"]) == ("source", 1.0, [])
        assert set(expert["layers"]) == {f"model.layers.{n}" for n in range(3)}
        assert expert["bytes"] == sum(f.stat().st_size for f in (exact / expert["name"]).iterdir())
    assert any("rank 3 is none" in notice for notice in report["notices"])


def test_energy_is_that_of_the_truncated_svd(bundle, shop, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "SAFE_RANKS", (1, 2, 4, 8))
    report = export_lora(bundle, tmp_path / "out", LoraJob(rank=2, dtype="F32"), Run())
    held = {"all": 0.0, "total": 0.0, "first": 0.0, "total first": 0.0}
    for name, own in shop.experts["a"].items():
        if name.endswith("_proj.weight"):
            delta = (own - bundle.dense(name)).double().numpy()
            squares = np.linalg.svd(delta, compute_uv=False) ** 2
            held["all"] += squares[:2].sum()
            held["total"] += squares.sum()
            if name.startswith("model.layers.0."):
                held["first"] += squares[:2].sum()
                held["total first"] += squares.sum()
    assert report.experts[0].energy == pytest.approx(held["all"] / held["total"], abs=1e-5)
    first = report.experts[0].layers["model.layers.0"]
    assert first == pytest.approx(held["first"] / held["total first"], abs=1e-5)


def test_the_least_safe_rank_that_holds_a_share_is_found(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "SAFE_RANKS", (1, 2, 3, 4, 8))
    report = export_lora(bundle, tmp_path / "out", LoraJob(energy=0.8), Run())
    below = export_lora(bundle, tmp_path / "below", LoraJob(rank=report.rank - 1), Run())
    assert 1 < report.rank < 8
    assert min(each.energy for each in report.experts) >= 0.8
    assert min(each.energy for each in below.experts) < 0.8


def test_low_layers_are_warned_of(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "SAFE_RANKS", (1, 8))
    told = []
    job = LoraJob(rank=1, experts=("b",), warn_below=0.99)
    report = export_lora(bundle, tmp_path / "out", job, Run(notify=told.append))
    assert [each.name for each in report.experts] == ["b"]
    worst = min(report.experts[0].layers.items(), key=lambda item: item[1])
    assert any(f"3 of 3 layers, least of {worst[0]}: {worst[1]:.1%}" in notice for notice in told)


def test_without_its_source_an_expert_is_its_stored_delta(shop, bundle, tmp_path):
    alone = open_for_export(shutil.copytree(bundle.path, tmp_path / "far" / "bundle"))
    job = LoraJob(rank=8, dtype="F32", sources={"b": shop.folder / "b"})
    report = export_lora(alone, tmp_path / "out", job, Run())
    assert [(each.name, each.origin, each.note) for each in report.experts] == [
        ("a", "stored", "./a is not here"), ("b", "source", ""),
    ]  # fmt: skip
    assert any("a: ./a is not here, so its adapter is made of the pruned" in notice for notice in report.notices)
    export_dense(bundle, tmp_path / "dense", {"a": 1.0}, Run())
    found = logits(with_adapters(bundle, tmp_path / "out" / "a"))
    assert torch.allclose(found, logits(dense_model(tmp_path / "dense")), rtol=1e-5, atol=1e-5)


def test_another_model_than_that_of_then_is_not_taken(shop, bundle, tmp_path):
    other = shutil.copytree(shop.folder / "a", tmp_path / "a")
    edit_tensors(other / "model.safetensors", put("model.norm.weight", torch.ones(8)))
    with pytest.raises(CheckpointError, match="is not the model that the bundle was merged from"):
        export_lora(bundle, tmp_path / "out", LoraJob(sources={"a": other}), Run())
    far = shutil.copytree(bundle.path, tmp_path / "bundle")
    report = export_lora(open_for_export(far), tmp_path / "out", LoraJob(experts=("a",)), Run())
    assert (report.experts[0].origin, "its files differ" in report.experts[0].note) == ("stored", True)


def test_low_rank_experts_are_their_own_factors(low_rank, tmp_path):
    report = export_lora(low_rank, tmp_path / "out", LoraJob(), Run())
    assert report.rank == 8
    assert {(each.origin, each.energy) for each in report.experts} == {("factors", 1.0)}
    for name in ("one", "two"):
        tensors = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        for target in ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj"):
            delta = low_rank.delta(name, f"{target}.weight")
            a, b = (tensors[f"base_model.model.{target}.lora_{side}.weight"] for side in "AB")
            assert torch.equal(a[: len(delta.a)], delta.a)
            assert torch.equal(b[:, : len(delta.a)], delta.b)
            assert not a[len(delta.a) :].any()
        export_dense(low_rank, tmp_path / name, {name: 1.0}, Run())
        found = logits(with_adapters(low_rank, tmp_path / "out" / name))
        assert torch.allclose(found, logits(dense_model(tmp_path / name)), rtol=1e-5, atol=1e-5)


def test_a_linear_merge_of_adapters_has_at_most_the_sum_of_their_ranks(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "SAFE_RANKS", (1, 2, 3, 4, 5, 8))
    merged = open_for_export(shop.merge("linear", experts=ADAPTERS, average={"method": "linear"}, **ROUTE))
    report = export_lora(merged, tmp_path / "out", LoraJob(rank=5), Run())
    assert all(each.is_exact and each.origin == "source" for each in report.experts)
    less = export_lora(merged, tmp_path / "less", LoraJob(rank=2), Run())
    assert not any(each.is_exact for each in less.experts)


def test_rows_are_answered_by_both(bundle, tmp_path):
    rows = tuple(Row(prompt=f"two plus {word}", answer="three apples") for word in ("three", "two", "apples"))
    job = LoraJob(rank=8, dtype="F32", tasks=(Task("a", rows),), limit=2)
    measured = export_lora(bundle, tmp_path / "out", job, Run()).experts[0].measured
    assert (measured.task, measured.rows) == ("a", 2)
    assert 0 <= measured.export_accuracy <= 1
    assert measured.export_loss > 0
    # Unpruned against pruned: near, not the same.
    assert measured.export_loss != measured.bundle_loss
    with pytest.raises(BundleError, match="no exported expert has this name"):
        export_lora(bundle, tmp_path / "new", LoraJob(tasks=(Task("films", rows),)), Run())


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (LoraJob(rank=513), "513 is more than servers have room for"),
        (LoraJob(energy=0.0), "is a share of a change"),
        (LoraJob(experts=("z",)), "no expert 'z'"),
        (LoraJob(sources={"z": Path()}), "no expert 'z'"),
        (LoraJob(sources={"a": Path("/none")}), "no such folder"),
    ],
)
def test_impossible_adapters(bundle, tmp_path, job, message):
    with pytest.raises((BundleError, OutputError), match=message):
        export_lora(bundle, tmp_path / "out", job, Run())
    assert all_files(tmp_path) == {}


@pytest.mark.parametrize("name", ["a", "b"])
def test_shira_adapters_are_the_sparse_experts(bundle, tmp_path, name):
    report = export_shira(bundle, tmp_path / "out", ShiraJob(experts=(name,)), Run())
    # Half of the 96 entries of an up_proj are 48; one r for all holds at most 2 · (8 + 12) beside a k_proj of 4 x 8.
    assert (report.experts[0].rank, report.experts[0].n_adapters) == (2, 2)
    folders = [tmp_path / "out" / f"{name}-{number}" for number in (1, 2)]
    export_dense(bundle, tmp_path / "dense", {name: 1.0}, Run())
    with torch.sparse.check_sparse_tensor_invariants():
        found, expected = logits(with_adapters(bundle, *folders)), logits(dense_model(tmp_path / "dense"))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits(dense_model(bundle.path)), rtol=1e-3, atol=1e-3)
    one = load_file(folders[1] / "adapter_model.safetensors")
    indices = one["base_model.model.model.layers.0.mlp.up_proj.shira_indices"]
    assert (indices.dtype, indices.shape) == (torch.int32, (2, 40))
    assert len({tuple(pair) for pair in indices.T.tolist()}) == 40
    assert int(one["base_model.model.model.layers.0.mlp.up_proj.shira_weight"].count_nonzero()) == 8


def test_shira_refuses_more_adapters_than_allowed(bundle, tmp_path):
    with pytest.raises(OutputError, match="more entries than 1 SHiRA adapters hold; 2 would"):
        export_shira(bundle, tmp_path / "out", ShiraJob(max_adapters=1), Run())
    assert all_files(tmp_path) == {}


def test_how_an_expert_is_split():
    assert split_for({}) == Split(1, 1)
    assert split_for({(4, 4): 16}) == Split(2, 1)
    assert split_for({(3, 6): 18}) == Split(2, 1)
    assert split_for({(3, 6): 19, (30, 60): 1800}) == Split(2, 10)
    assert split_for({(1, 9): 1}) == Split(0, 0)


def test_the_commands(shop, bundle, mediator, refused, monkeypatch):
    monkeypatch.chdir(shop.folder)
    shown = mediator("export", bundle.path, "--to", "lora", "-o", shop.folder / "cli", "--rank", 8)
    assert shown.code == 0
    line = next(line for line in shown.out.splitlines() if line.split()[:1] == ["a"])
    assert "exact" in line or "99.9%" in line
    again = mediator("export", bundle.path, "--to", "shira", "-o", shop.folder / "cli", "--overwrite", "--json")
    assert [each["n_adapters"] for each in json.loads(again.out)["experts"]] == [2, 2]
    lora_to = ("export", bundle.path, "-o", "new", "--to", "lora")
    refused("--rank", "600 is more than servers have room for", "512", *lora_to, "--rank", 600)
    refused("--energy", "is a share of a change", "0.9", *lora_to, "--energy", 2)
    refused("--rank", "goes with no --energy", "", *lora_to, "--energy", 0.5, "--rank", 8)
    refused("--source", "'a' is not NAME=PATH", "", *lora_to, "--source", "a")
    refused("--tasks x", "no exported expert has this name", "", *lora_to, "--tasks", _rows(shop.folder / "x.jsonl"))


def _rows(file):
    file.write_text('{"prompt": "two", "answer": "three"}\n')
    return file


def test_numbers_that_are_not_finite_are_refused(shop, tmp_path):
    folder = shutil.copytree(shop.folder / "sparse", tmp_path / "bundle")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BundleError, match=r"up_proj.weight: has numbers that are not finite"):
        export_lora(open_for_export(folder), tmp_path / "out", LoraJob(sources={"a": shop.folder / "a"}), Run())
    assert not (tmp_path / "out").exists()
