"""A mixture of a bundle as a checkpoint: the bytes of `Bundle.mixture`, for every way to store experts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROUTE_ALL, all_files, make_workshop, with_prompts
from safetensors.torch import load_file

from mediator_cli.bundle.read import read_bundle
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.cli.export_request import Request, checked
from mediator_cli.errors import BundleError, OutputError
from mediator_cli.export.dense import export_dense
from mediator_cli.export.folder import open_for_export
from mediator_cli.export.settings import Run

MODES = {
    "sparse": {"density": 0.5},
    "sign": {"mode": "sign", "dense": "base"},
    "emr": {"mode": "emr", "dense": "base"},
    "tall": {"mode": "tall_mask", "dense": "base"},
    "basis": {"mode": "basis", "values": "fp32"},
    "factors": {"mode": "factors"},
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Merge one bundle a mode; experts of mode factors are adapters."""
    shop = make_workshop(tmp_path_factory.mktemp("modes"))
    shutil.copytree(shop.folder / "lora", shop.folder / "lora2")
    loras = [{"name": name, "model": f"./{folder}"} for name, folder in (("a", "lora"), ("b", "lora2"))]
    return {
        mode: shop.merge(
            mode, assign={"rule": "all"}, extract=extract, **({"experts": loras} if mode == "factors" else {})
        )
        for mode, extract in MODES.items()
    }


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mixture", [{}, {"a": 1.0}, {"a": 0.7, "b": 0.3}], ids=["dense", "expert", "mixture"])
def test_bytes_are_those_of_the_mixture(bundles, tmp_path, mode, mixture):
    bundle = open_for_export(bundles[mode])
    export_dense(bundle, tmp_path / "out", mixture, Run())
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == bundle.tensors.keys()
    for name, tensor in found.items():
        expected = bundle.mixture(mixture, name) if mixture else bundle.dense(name)
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(bits(tensor), bits(expected)), name
    moved = [name for name, tensor in found.items() if not torch.equal(bits(tensor), bits(bundle.dense(name)))]
    assert bool(moved) == bool(mixture)


def test_small_shards_hold_the_same_tensors(bundles, tmp_path):
    bundle = open_for_export(bundles["sparse"])
    export_dense(bundle, tmp_path / "out", {"b": 1.0}, Run(), shard_size=700)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(info.n_bytes for info in bundle.tensors.values())
    assert read_tensors(tmp_path / "out").keys() == bundle.tensors.keys()
    for shard in shards:
        for name, tensor in load_file(shard).items():
            assert torch.equal(bits(tensor), bits(bundle.mixture({"b": 1.0}, name))), name


def test_what_stands_beside_the_weights(bundles, tmp_path):
    export_dense(open_for_export(bundles["sparse"]), tmp_path / "out", {"a": 0.7, "b": 0.3}, Run())
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "export.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (bundles["sparse"] / name).read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "a=0.7,b=0.3" in card
    assert "| source | from | revision | digest | licence |" in card
    report = json.loads((tmp_path / "out/export.json").read_text())
    assert (report["mixture"], report["n_tensors"]) == ({"a": 0.7, "b": 0.3}, 29)


@pytest.mark.parametrize("place", ["model.safetensors", "experts/a.safetensors", "config.json"])
def test_a_damaged_bundle_leaves_nothing(bundles, tmp_path, place):
    folder = shutil.copytree(bundles["sparse"], tmp_path / "bundle")
    file = folder / place
    file.unlink() if place == "config.json" else file.write_bytes(file.read_bytes()[:-40])
    before = all_files(tmp_path)
    with pytest.raises(Exception, match=r"damaged|truncated|bytes|short|end") as caught:
        export_dense(open_for_export(folder), tmp_path / "out", {"a": 1.0}, Run())
    assert hasattr(caught.value, "problems")
    assert all_files(tmp_path) == before


def test_a_full_disk_leaves_nothing(bundles, tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match="no space left on device"):
        export_dense(open_for_export(bundles["sparse"]), tmp_path / "out", {"a": 1.0}, Run())
    assert all_files(tmp_path) == {}


def test_what_is_overwritten(bundles, tmp_path):
    bundle = open_for_export(bundles["sparse"])
    export_dense(bundle, tmp_path / "out", {"a": 1.0}, Run())
    with pytest.raises(OutputError, match="exists"):
        export_dense(bundle, tmp_path / "out", {}, Run())
    export_dense(bundle, tmp_path / "out", {}, Run(overwrite=True))
    assert json.loads((tmp_path / "out/export.json").read_text())["mixture"] == {}
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not"):
        export_dense(bundle, tmp_path / "own", {}, Run(overwrite=True))
    assert (tmp_path / "own/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("mixture", "message"), [({"c": 1.0}, "no expert 'c'"), ({"a": float("inf")}, "is no finite number")]
)
def test_impossible_mixtures(bundles, tmp_path, mixture, message):
    with pytest.raises(BundleError, match=message):
        export_dense(open_for_export(bundles["sparse"]), tmp_path / "out", mixture, Run())
    assert all_files(tmp_path) == {}


def test_static_merges_have_no_experts(tmp_path):
    folder = make_workshop(tmp_path / "shop").merge("plain", assign={"rule": "none"})
    bundle = open_for_export(folder)
    with pytest.raises(BundleError, match="no experts to export"):
        export_dense(bundle, tmp_path / "out", {"a": 1.0}, Run())
    export_dense(bundle, tmp_path / "out", {}, Run())
    assert (tmp_path / "out/model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size


def test_experts_that_run_apart_are_told(tmp_path, routed_once):
    bundle = read_bundle(routed_once)
    router = bundle.manifest.router
    policy = router.policy.model_copy(update={"combine": "logits"})
    manifest = bundle.manifest.model_copy(update={"router": router.model_copy(update={"policy": policy})})
    apart = type(bundle)(bundle.path, manifest, bundle.tensors, bundle.experts)
    report = export_dense(apart, tmp_path / "out", {"a": 1.0}, Run())
    assert report.notices == (
        "the bundle's policy runs several experts apart and averages their logits: that does not travel",
    )


def test_the_command(mediator, workshop, refused):
    workshop.merge("out", **ROUTE_ALL)
    run = mediator("export", "out", "--to", "dense", "--mixture", "a=0.5, b=0.5", "-o", "mixed", "--json")
    facts = json.loads(run.out)
    assert (run.code, facts["mixture"], Path(facts["folder"]).name) == (0, {"a": 0.5, "b": 0.5}, "mixed")
    shown = mediator("export", "out", "--to", "dense", "--static", "-o", "static")
    assert "dense expert alone" in shown.out
    export = ("export", "out", "-o", "new", "--to")
    refused("out", "no expert 'aa'", "did you mean 'a'?", *export, "dense", "--expert", "aa")
    refused("--to dense", "does not say which model", "--expert NAME", *export, "dense")
    refused("--shard-size", "not a size", "5GB", *export, "dense", "--static", "--shard-size", "x")
    refused("no", "no such folder", "", "export", "no", "-o", "new", "--to", "dense", "--static")
    refused("--rank", "does not go with --to dense", "", *export, "dense", "--static", "--rank", "8", "--limit", "1")
    refused("--mixture", "'b' is not NAME=WEIGHT", "", *export, "dense", "--mixture", "a=1,b")


def test_all_problems_of_a_request_are_told_at_once():
    request = Request("dense", expert=("a",), static=True, rank=8, energy=0.5, converter=Path("x"))
    with pytest.raises(OutputError) as caught:
        checked(request)
    places = [problem.place for problem in caught.value.problems]
    assert places == ["--rank", "--energy", "--converter", "--expert", "--rank"]


def test_a_mixture_of_experts_is_a_checkpoint_already(tmp_path):
    shop = make_workshop(tmp_path)
    for name in ("a", "b"):
        (shop.folder / f"{name}.jsonl").write_text('{"prompt": "x"}\n')
    folder = shop.merge(
        "moe", kind="moe", experts=with_prompts(), average={"method": "linear"}, moe={"gates": {"method": "random"}}
    )
    with pytest.raises(BundleError, match="stock software loads as it is"):
        open_for_export(folder)
