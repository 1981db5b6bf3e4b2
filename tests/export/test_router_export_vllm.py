"""The folder for vLLM: its script calls vLLM with numbers of the adapters that lie there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROUTE_ALL, add_prompts, all_files, make_workshop

from mediator_cli.bundle.read import read_bundle
from mediator_cli.checkpoint.header import read_tensors
from mediator_cli.errors import BundleError
from mediator_cli.export.lora import LoraJob
from mediator_cli.export.settings import Run
from mediator_cli.export.vllm import export_vllm, grid_rank, serve_script
from mediator_cli.serve.router import open_router
from mediator_cli.serve.router.grid import make_grid
from mediator_cli.serve.router.low_rank import gram, open_adapter
from mediator_cli.serve.router.targets import TopOne

_SHOW = """#!/usr/bin/env python3
import json, os, sys
names = ("MEDIATOR_ROUTER", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
print(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}, os.getcwd()]))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, routed_once: Path) -> Path:
    target = tmp_path_factory.mktemp("vllm") / "out with spaces"
    export_vllm(routed_once, target, LoraJob(rank=8), Run())
    return target


def started(folder: Path, work: Path, *words: str, **settings: str) -> tuple[list[str], dict[str, Any], str]:
    """Run the script with a vllm that tells what it is asked."""
    command = work / "bin" / "vllm"
    command.parent.mkdir(exist_ok=True)
    command.write_text(_SHOW)
    command.chmod(0o755)
    known = {key: value for key, value in os.environ.items() if not key.startswith(("MEDIATOR", "VLLM"))}
    known["PATH"] = f"{command.parent}{os.pathsep}{known['PATH']}"
    run = subprocess.run(
        ["/bin/sh", str(folder / "serve.sh"), *words], env=known | settings, capture_output=True, text=True, timeout=30
    )
    assert run.returncode == 0, run.stderr
    args, environment, here = json.loads(run.stdout)
    return args, environment, here


def option(args: list[str], name: str) -> str:
    return args[args.index(name) + 1]


def test_the_script_starts_vllm_in_its_folder_with_true_numbers(served: Path, tmp_path: Path) -> None:
    args, environment, here = started(served, tmp_path, "--port", "8001")
    assert args[:2] == ["serve", "dense"]
    assert Path(here) == served.resolve()
    assert (option(args, "--max-lora-rank"), option(args, "--max-loras"), option(args, "--max-cpu-loras")) == (
        "8",
        "2",
        "2",
    )
    start = args.index("--lora-modules") + 1
    modules = [json.loads(text) for text in args[start : start + 2]]
    assert modules == [{"name": n, "path": f"adapters/{n}", "base_model_name": "dense"} for n in ("a", "b")]
    assert args[start + 2 :] == ["--middleware", "mediator_cli.serve.router.RouterMiddleware", "--port", "8001"]
    assert environment == {"MEDIATOR_ROUTER": "router", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": None}
    for module in modules:
        assert open_adapter(served / module["path"]).config["r"] == 8


def test_mixtures_get_room_and_the_router_can_stay_outside(served: Path, tmp_path: Path) -> None:
    args, environment, _ = started(served, tmp_path, MEDIATOR_MIXTURES="grid", MEDIATOR_ROUTER="")
    assert (option(args, "--max-lora-rank"), option(args, "--max-cpu-loras")) == ("16", "18")
    assert environment == {"MEDIATOR_ROUTER": "", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    assert "--middleware" not in args
    assert [grid_rank(rank) for rank in (8, 128, 160, 256, 320)] == [16, 256, 320, 512, None]
    assert "exit 2" in serve_script(["a"], 320)


def test_what_lies_there_is_the_bundle(served: Path, routed_once: Path) -> None:
    assert open_router(served / "router").decide_text("two plus three") == open_router(routed_once).decide_text(
        "two plus three"
    )
    bundle = read_bundle(routed_once)
    dense = read_bundle(routed_once).tensors
    assert {name: info.shape for name, info in read_tensors(served / "dense").items()} == {
        name: info.shape for name, info in dense.items()
    }
    adapter = open_adapter(served / "adapters" / "a")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = adapter.read(module)
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = (bundle.expert("a", name).float() - bundle.dense(name).float()).numpy()
    # Rank 8 of an 8 x 8 matrix is all of the expert's whole change, of which the bundle keeps the larger half.
    cosine = (adapter.scale * b @ a * delta).sum() / np.linalg.norm(adapter.scale * b @ a) / np.linalg.norm(delta)
    assert cosine > 0.8
    report = json.loads((served / "export.json").read_text())
    assert (report["rank"], report["grid_rank"], report["adapters"]["rank"]) == (8, 16, 8)


def test_the_router_builds_mixtures_of_these_adapters(served: Path) -> None:
    grid = make_grid(TopOne("dense", {"a": "a", "b": "b"}), served / "adapters", None)  # type: ignore[arg-type]
    np.testing.assert_allclose(grid.inner, gram(list(grid.adapters.values())))
    assert (np.linalg.eigvalsh(grid.inner) > 0).all()


def test_clusters_are_told_the_same(served: Path) -> None:
    ray = yaml.safe_load((served / "serve_config.yaml").read_text())["applications"][0]["args"]["llm_configs"][0]
    assert ray["engine_kwargs"] == {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    assert ray["deployment_config"]["autoscaling_config"]["min_replicas"] == 2
    kserve = yaml.safe_load((served / "llmisvc.yaml").read_text())["spec"]
    assert [adapter["name"] for adapter in kserve["model"]["lora"]["adapters"]] == ["a", "b"]
    assert kserve["replicas"] == 2


def test_a_bundle_without_router_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shop = add_prompts(make_workshop(tmp_path))
    bundle = shop.merge("unrouted", **ROUTE_ALL)
    before = all_files(tmp_path)
    with pytest.raises(BundleError, match="no router"):
        export_vllm(bundle, tmp_path / "never", LoraJob(), Run())
    assert all_files(tmp_path) == before
