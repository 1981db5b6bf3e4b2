"""A bundle as a Mixture of Experts, and through a stand-in for llama.cpp's converters."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import all_files, with_prompts
from safetensors.torch import load_file
from tiny_exports import linear_shop

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.errors import BundleError, MediatorError, OutputError
from mediator_cli.export.folder import open_for_export
from mediator_cli.export.gguf import Converter, GgufJob, export_gguf, find_converter
from mediator_cli.export.lora import LoraJob
from mediator_cli.export.moe import MoeJob, export_moe
from mediator_cli.export.settings import Run

CHECKOUT = Path(__file__).parents[2]
STAND_IN = """\
import argparse, json, os, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("source", type=Path)
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype")
parser.add_argument("--base", type=Path)
given = parser.parse_args()
files = sorted(file.name for file in given.source.iterdir())
if MODE == "fails":
    sys.exit("Traceback\\nNotImplementedError: Architecture 'Nobody' not supported!")
if MODE == "sleeps":
    import time
    time.sleep(60)
if MODE != "silent":
    base = (given.base / "config.json").is_file() if given.base else None
    facts = {"files": files, "type": given.outtype, "base": base}
    given.outfile.write_text(json.dumps(facts | {"offline": os.environ["HF_HUB_OFFLINE"]}))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return linear_shop(tmp_path_factory.mktemp("others"))


@pytest.fixture(scope="module")
def bundle(shop):
    recipe = {"assign": {"rule": "all"}, "extract": {"density": 0.5}}
    return open_for_export(shop.merge("bundle", experts=with_prompts(), **recipe))


def stand_in(folder, mode="works", *, adapters=True):
    folder.mkdir()
    for name in ("convert_hf_to_gguf.py", *(["convert_lora_to_gguf.py"] if adapters else [])):
        (folder / name).write_text(f"MODE = {mode!r}\n{STAND_IN}")
    return find_converter(folder)


def test_the_model_and_its_adapters_go_through_the_converters(bundle, tmp_path):
    job = GgufJob(lora=LoraJob(rank=8), out_type="bf16")
    report = export_gguf(bundle, tmp_path / "out", job, stand_in(tmp_path / "llama"), Run())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md", "a.gguf", "b.gguf", "export.json", "model.gguf",
    ]  # fmt: skip
    model = json.loads((tmp_path / "out/model.gguf").read_text())
    assert (model["type"], model["base"], model["offline"]) == ("bf16", None, "1")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(model["files"])
    adapter = json.loads((tmp_path / "out/b.gguf").read_text())
    assert (adapter["type"], adapter["base"]) == ("bf16", True)
    assert adapter["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert [(each.name, each.folder, each.rank) for each in report.experts] == [("a", "a.gguf", 8), ("b", "b.gguf", 8)]
    card = (tmp_path / "out/README.md").read_text()
    assert "llama-server -m model.gguf --lora a.gguf --lora b.gguf --lora-init-without-apply" in card
    assert "0 a, 1 b" in card


def test_one_expert_has_no_adapters(bundle, tmp_path):
    converter = stand_in(tmp_path / "llama", adapters=False)
    report = export_gguf(bundle, tmp_path / "out", GgufJob({"a": 1.0}), converter, Run())
    assert (report.experts, report.mixture) == ((), {"a": 1.0})
    with pytest.raises(OutputError, match=r"has no convert_lora_to_gguf\.py beside it"):
        export_gguf(bundle, tmp_path / "new", GgufJob(lora=LoraJob()), converter, Run())


@pytest.mark.parametrize(
    ("mode", "message", "hint"),
    [
        ("fails", "failed on model.gguf: NotImplementedError: Architecture 'Nobody' not supported!", "does not know"),
        ("silent", "failed on model.gguf: it ended with 0 and wrote no file", "by hand"),
        ("sleeps", "took longer than 0.5 s for model.gguf, and was stopped", "--timeout"),
    ],
)
def test_converters_that_fail_leave_nothing(bundle, tmp_path, mode, message, hint):
    converter = stand_in(tmp_path / "llama", mode)
    before = all_files(tmp_path)
    with pytest.raises(OutputError) as caught:
        export_gguf(bundle, tmp_path / "out", GgufJob(timeout=0.5 if mode == "sleeps" else 60), converter, Run())
    assert message in caught.value.problems[0].message
    assert hint in caught.value.problems[0].hint
    assert all_files(tmp_path) == before


def test_where_converters_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OutputError, match=r"LLAMA_CPP is not set, and convert_hf_to_gguf\.py is not on PATH"):
        find_converter(None)
    stand_in(tmp_path / "llama")
    script = tmp_path / "llama/convert_hf_to_gguf.py"
    script.chmod(0o755)
    found = Converter(script, tmp_path / "llama/convert_lora_to_gguf.py", sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path / "llama"))
    assert find_converter(None) == find_converter(script) == find_converter(tmp_path / "llama") == found
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "gone"))
    with pytest.raises(OutputError, match="is not there"):
        find_converter(None)
    assert find_converter(script, "python9").python == "python9"


def test_a_python_that_is_not_there(bundle, tmp_path):
    stand_in(tmp_path / "llama")
    with pytest.raises(OutputError, match="no such file"):
        export_gguf(bundle, tmp_path / "out", GgufJob(), find_converter(tmp_path / "llama", "/no/python"), Run())


def test_a_bundle_as_a_mixture_of_experts(bundle, shop, tmp_path):
    report = export_moe(bundle, tmp_path / "moe", MoeJob(experts_per_token=1), Run())
    assert (report.architecture, report.experts, report.layers) == ("mixtral", ("a", "b"), (0, 1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
    assert read_manifest(tmp_path / "moe").moe is not None
    tensors = {}
    for file in (tmp_path / "moe").glob("*.safetensors"):
        tensors |= load_file(file)
    for number, expert in enumerate(("a", "b")):
        own = bundle.expert(expert, "model.layers.1.mlp.down_proj.weight")
        assert torch.equal(tensors[f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight"], own)
    attention = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(tensors[attention], bundle.dense(attention))
    assert any("12 of 21 tensors" in notice for notice in report.notices)


def test_an_moe_without_prompts_is_refused(bundle, tmp_path):
    far = open_for_export(shutil.copytree(bundle.path, tmp_path / "far/bundle"))
    before = all_files(tmp_path)
    with pytest.raises(BundleError) as caught:
        export_moe(far, tmp_path / "out", MoeJob(), Run())
    assert [problem.place for problem in caught.value.problems] == ["expert a", "expert b"]
    assert "--prompts a=FILE" in caught.value.problems[0].hint
    assert all_files(tmp_path) == before
    report = export_moe(far, tmp_path / "out", MoeJob(gates="random"), Run())
    assert (tmp_path / "out/routing_manifest.json").is_file()
    assert report.experts_per_token == 2


@pytest.mark.parametrize("job", [MoeJob(architecture="qwen3_moe"), MoeJob(gates="nobody", experts=("a",))])
def test_what_fails_leaves_no_experts_behind(bundle, tmp_path, job):
    with pytest.raises(MediatorError):
        export_moe(bundle, tmp_path / "out", job, Run())
    assert all_files(tmp_path) == {}


def test_the_commands(shop, bundle, mediator, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(shop.folder)
    made = ("export", bundle.path, "--overwrite", "-o", tmp_path / "out", "--to")
    shown = mediator(*made, "moe")
    assert "mixtral, 2 experts for each token" in shown.out
    stand_in(tmp_path / "llama")
    shown = mediator(*made[:2], "-o", tmp_path / "gguf", "--to", "gguf", "--converter", tmp_path / "llama", "--rank", 8)
    assert "model.gguf: dense expert alone, f16" in shown.out
    export = ("export", bundle.path, "-o", "new", "--to")
    refused("--converter", "convert_hf_to_gguf.py is not there", "LLAMA_CPP", *export, "gguf", "--converter", tmp_path)
    refused("--prompts", "'x' is not NAME=PATH", "", *export, "moe", "--prompts", "x")
    refused("--max-adapters", "does not go with --to gguf", "", *export, "gguf", "--max-adapters", 2)


@pytest.mark.slow
def test_llama_cpps_own_converters(bundle, tmp_path):
    python = CHECKOUT / ".venv-vllm/bin/python"
    if not (CHECKOUT / ".venv-vllm/llama.cpp/convert_lora_to_gguf.py").is_file():
        pytest.skip("make test-vllm makes the environment of the servers")
    demo = CHECKOUT / "demo/bundle"
    if not demo.is_dir():
        pytest.skip("make demo makes the bundle")
    converter = find_converter(CHECKOUT / ".venv-vllm/llama.cpp", str(python))
    job = GgufJob(lora=LoraJob(rank=8, experts=("sarcasm",)))
    report = export_gguf(open_for_export(demo), tmp_path / "out", job, converter, Run())
    assert [each.name for each in report.experts] == ["sarcasm"]
    for name in ("model.gguf", "sarcasm.gguf"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"GGUF"
