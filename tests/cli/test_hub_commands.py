"""Whole commands on models of a Hub on loopback: what they read, download, say, and never show."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import edit_json, edit_tensors, put, write_adapter
from loopback_hub import TOKEN, joined
from safetensors.torch import load_file, save_file

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.checkpoint.hub.files import partial_bytes
from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.evaluate.models import download_candidates, find_candidates

NAMES = ("base", "a", "b")
EXPERTS = [{"name": name, "model": f"org/{name}"} for name in ("a", "b")]
WEIGHTS = "model.safetensors"
FIRST = 1 << 16


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hf") / "hub"


@pytest.fixture
def hub(monkeypatch, cache, workshop):
    """A hub with base, a, b and lora of the workshop, whose weights are padded to more than one first read."""
    for name in NAMES:
        edit_tensors(workshop.folder / name / WEIGHTS, put("extra.weight", torch.ones(FIRST)))
    with joined(monkeypatch, cache) as made:
        for name in (*NAMES, "lora"):
            made.add(f"org/{name}", workshop.folder / name)
        yield made


@pytest.fixture
def recipe(hub, workshop):
    return workshop.recipe("hub.yaml", base="org/base", experts=EXPERTS, assign={"rule": "all"})


def weights_in(cache):
    return sorted(path.relative_to(cache).parts[0] for path in cache.glob(f"*/snapshots/*/{WEIGHTS}"))


def digest(mediator, recipe, out, *words):
    run = mediator("merge", recipe, "-o", out, "--json", "--overwrite", *words)
    assert run.code == 0, run.err
    return json.loads(run.out)["digest"]


def test_validate_reads_headers_by_range_and_downloads_no_weights(mediator, hub, cache, recipe):
    run = mediator("validate", recipe)
    assert run.code == 0, run.err
    assert "is valid: 2 experts, 30 tensors" in run.out
    assert hub.served[WEIGHTS] == 3 * FIRST
    assert weights_in(cache) == []


def test_plan_tells_the_downloads_by_source(mediator, hub, workshop, cache, recipe):
    report = json.loads(mediator("plan", recipe, "--json", "--no-calibrate").out)
    sizes = {name: (workshop.folder / name / WEIGHTS).stat().st_size for name in NAMES}
    assert report["download_bytes"] == sizes
    row = next(
        line for line in mediator("plan", recipe, "--no-calibrate").out.splitlines() if line.startswith(" download")
    )
    assert row.split()[1:4] == [f"{sum(sizes.values()) / 1e3:.1f}", "kB:", "base"]
    assert weights_in(cache) == []


def test_plan_of_folders_downloads_nothing(mediator, hub, workshop):
    assert json.loads(mediator("plan", workshop.recipe(), "--json", "--no-calibrate").out)["download_bytes"] == {}
    assert hub.requests == []


def test_a_merge_from_the_hub_is_the_merge_of_the_folders(mediator, hub, workshop, cache, recipe):
    local = workshop.recipe("local.yaml", assign={"rule": "all"})
    expected = digest(mediator, local, "from-folders")
    assert hub.requests == []
    assert digest(mediator, recipe, "from-hub") == expected
    size = sum((workshop.folder / name / WEIGHTS).stat().st_size for name in NAMES)
    assert hub.served[WEIGHTS] == 3 * FIRST + size
    hub.forget()
    assert digest(mediator, recipe, "again") == expected
    assert hub.weight_bytes() == 0
    hub.forget()
    assert digest(mediator, recipe, "offline", "--offline") == expected
    assert hub.requests == []


def test_the_manifest_names_the_commits(mediator, hub, recipe):
    digest(mediator, recipe, "out")
    manifest = read_manifest(recipe.parent / "out")
    assert [source.path for source in (manifest.base, *manifest.experts)] == ["org/base", "org/a", "org/b"]
    commits = [hub.repos[f"org/{name}"].refs["main"] for name in NAMES]
    assert [source.revision for source in (manifest.base, *manifest.experts)] == commits
    local = recipe.parent / "local.yaml"
    local.write_text(recipe.read_text().replace("org/", "./"))
    digest(mediator, local, "local")
    assert [source.revision for source in read_manifest(recipe.parent / "local").experts] == [None, None]


def test_all_side_files_reach_the_bundle(mediator, hub, workshop, recipe):
    folder = workshop.folder / "base"
    (folder / "additional_chat_templates").mkdir()
    extra = ("additional_chat_templates/tool.jinja", "vocab.txt", "special_tokens_map.json", "spiece.model")
    for name in extra:
        (folder / name).write_text("{}")
    hub.add("org/base", folder)
    digest(mediator, recipe, "out")
    for name in (*extra, "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (recipe.parent / "out" / name).is_file(), name


def test_a_revision_can_hold_slashes(mediator, hub, workshop):
    commit = hub.add("org/base", workshop.folder / "a", "refs/pr/7")
    recipe = workshop.recipe("r.yaml", base="org/base@refs/pr/7", experts=EXPERTS)
    digest(mediator, recipe, "out")
    assert read_manifest(workshop.folder / "out").base.revision == commit
    assert digest(mediator, recipe, "out", "--offline")


def test_adapters_come_from_the_hub(mediator, hub, workshop):
    edit_json(workshop.folder / "lora" / "adapter_config.json", base_model_name_or_path="org/base")
    write_adapter(workshop.folder / "other", 9, base_model_name_or_path="else/where")
    for name in ("lora", "other"):
        hub.add(f"org/{name}", workshop.folder / name)
    near = [{"name": "x", "model": "./lora"}, {"name": "y", "model": "./other"}]
    far = [{"name": "x", "model": "org/lora"}, {"name": "y", "model": "org/other@main"}]
    expected = digest(mediator, workshop.recipe("near.yaml", experts=near), "near")
    recipe = workshop.recipe("far.yaml", base="org/base", experts=far)
    run = mediator("validate", recipe)
    assert "adapter y names base 'else/where', the recipe's base is 'org/base'" in run.err
    assert "adapter x" not in run.err
    assert digest(mediator, recipe, "far") == expected
    assert [e.kind for e in read_manifest(workshop.folder / "far").experts] == ["lora", "lora"]


def test_only_the_shards_that_are_needed_are_downloaded(mediator, hub, workshop, cache):
    folder = workshop.folder / "base"
    made = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    # The config ties the head, so the stored copy of it, alone in its shard, is read by nobody.
    shards = {"model-1.safetensors": made, "model-2.safetensors": {"lm_head.weight": torch.ones(20, 8)}}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    hub.add("org/base", folder)
    digest(mediator, workshop.recipe("r.yaml", base="org/base", experts=EXPERTS), "out")
    assert [path.name for path in cache.glob("models--org--base/snapshots/*/*.safetensors")] == ["model-1.safetensors"]


def test_conflicts_are_measured_from_the_hub(mediator, hub, workshop, recipe):
    near = mediator("analyze-conflicts", workshop.recipe("near.yaml"), "-o", "near.json", "--json")
    far = mediator("analyze-conflicts", recipe, "-o", "far.json", "--json")
    assert far.code == 0, far.err
    assert json.loads(far.out)["units"] == json.loads(near.out)["units"]
    assert "download:" in far.err


def one_far_source(workshop):
    return workshop.recipe("one.yaml", experts=[{"name": "a", "model": "org/a"}, {"name": "b", "model": "./b"}])


def test_a_download_that_is_cut_is_gone_on_with(mediator, hub, workshop):
    size = (workshop.folder / "a" / WEIGHTS).stat().st_size
    expected = digest(mediator, workshop.recipe("near.yaml"), "near")
    hub.cuts += [70_000, 20_000]
    assert digest(mediator, one_far_source(workshop), "out") == expected
    asked = [r.range for r in hub.requests if r.server == "cdn"]
    assert asked == [f"bytes=0-{FIRST - 1}", *(f"bytes={start}-{size - 1}" for start in (0, 70_000, 90_000))]
    assert hub.weight_bytes() == FIRST + size


def test_a_merge_that_cannot_download_writes_nothing_and_the_next_goes_on(mediator, hub, workshop, cache):
    size = (workshop.folder / "a" / WEIGHTS).stat().st_size
    recipe = one_far_source(workshop)
    hub.cuts += [70_000, 0, 0]
    run = mediator("merge", recipe, "-o", "out")
    assert run.code == 2
    assert "error: org/a: model.safetensors: the Hub cannot be reached: RemoteProtocolError" in run.err
    assert not (workshop.folder / "out").exists()
    assert weights_in(cache) == []
    hub.forget()
    assert digest(mediator, recipe, "out") == digest(mediator, workshop.recipe("near.yaml"), "near")
    asked = [r.range for r in hub.requests if r.server == "cdn"]
    assert asked == [f"bytes=0-{FIRST - 1}", f"bytes=70000-{size - 1}"]


def test_a_source_that_is_closed_between_plan_and_download_is_said(mediator, hub, workshop):
    hub.faults.append(("HEAD .*/model.safetensors", 403, {"X-Error-Code": "GatedRepo"}))
    run = mediator("merge", one_far_source(workshop), "-o", "out")
    assert run.code == 2
    assert "error: org/a: model.safetensors: is gated: its owner asks you to accept terms" in run.err
    assert not (workshop.folder / "out").exists()


def test_all_problems_are_reported_at_once(mediator, hub, workshop):
    hub.add("org/locked", workshop.folder / "a", gated=True)
    experts = [
        {"name": "x", "model": "org/none"},
        {"name": "y", "model": "org/locked"},
        {"name": "z", "model": "org/a@v9"},
        {"name": "w", "model": "experts/maths"},
    ]
    recipe = workshop.recipe("r.yaml", base="org/base", experts=experts, average={"method": "nope"})
    run = mediator("validate", recipe)
    assert run.code == 2
    for message in (
        "r.yaml:3 experts[0].model: org/none: no such folder, and no such repository on the Hub",
        "r.yaml:3 experts[1].model: org/locked: ",
        "r.yaml:3 experts[2].model: org/a@v9: has no revision 'v9'",
        "r.yaml:3 experts[3].model: experts/maths: no such folder, and no such repository on the Hub",
        "nope",
    ):
        assert message in run.err


def test_without_a_base_the_experts_are_still_looked_at(mediator, hub, workshop):
    experts = [{"name": "a", "model": "org/a@v9"}, {"name": "b", "model": "org/b"}]
    run = mediator("validate", workshop.recipe("r.yaml", base="org/none", experts=experts))
    assert "org/none: no such folder, and no such repository" in run.err
    assert "org/a@v9: has no revision" in run.err


def test_offline_says_what_is_missing(mediator, hub, recipe):
    run = mediator("validate", recipe, "--offline")
    assert run.code == 2
    assert run.err.count("revision 'main' is not in the Hub's cache") == 3
    assert mediator("validate", recipe).code == 0
    hub.forget()
    run = mediator("merge", recipe, "-o", "out", "--offline")
    assert "org/base: model.safetensors is not in the Hub's cache" in run.err
    assert hub.requests == []


def test_an_interrupted_download_keeps_what_came(hub, workshop, cache):
    found = find_candidates(["org/a", "org/b", "org/base"], [])

    def interrupt(stage, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_candidates(found, interrupt)
    assert weights_in(cache) == []
    kept = sum(partial_bytes(file.repo) for candidate in found for file in candidate.far)
    size = sum(candidate.n_bytes for candidate in found)
    assert 0 < kept < size
    hub.forget()
    download_candidates(found)
    assert hub.weight_bytes() == size - kept
    assert len(weights_in(cache)) == 3


def test_a_full_disk_is_noticed_before_the_download(mediator, hub, monkeypatch, recipe):
    monkeypatch.setattr("mediator_cli.pipeline.download.free_bytes", lambda folder: 300_000)
    run = mediator("merge", recipe, "-o", "out")
    assert run.code == 2
    assert "the disk has 300.0 kB free, the downloads and the bundle need" in run.err
    assert "HF_HUB_CACHE" in run.err
    assert hub.served[WEIGHTS] == 3 * FIRST


def test_the_token_shows_up_nowhere(mediator, hub, workshop, cache, monkeypatch, recipe):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in NAMES:
        hub.repos[f"org/{name}"].private = True
    shown = []
    plan = ("plan", recipe, "--json", "--no-calibrate")
    for words in (("validate", recipe), plan, ("merge", recipe, "-o", "out")):
        run = mediator(*words)
        assert run.code == 0, run.err
        shown += [run.out, run.err]
    for fault in (401, 403, 429, 500):
        hub.faults += [("/api/models/org/base", fault, {"X-Error-Message": "no"})]
        run = mediator("validate", recipe)
        assert run.code == 2
        shown += [run.out, run.err]
    files = [path for root in (workshop.folder, cache) for path in root.rglob("*") if path.is_file()]
    assert {r.has_token for r in hub.requests if r.server == "hub"} == {True}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not [text for text in shown if TOKEN in text or "Bearer" in text]


def test_inspect_looks_at_a_model_on_the_hub(mediator, hub, workshop, cache):
    near = json.loads(mediator("inspect", "base", "--json").out)
    far = json.loads(mediator("inspect", "org/base", "--json").out)
    commit = hub.repos["org/base"].refs["main"]
    assert (far["path"], far["commit"]) == ("org/base", commit)
    assert {k: v for k, v in far.items() if k not in ("path", "commit")} == {
        k: v for k, v in near.items() if k not in ("path", "commit")
    }
    assert hub.served[WEIGHTS] == FIRST
    assert weights_in(cache) == []
    assert "org/lora: LoRA adapter, 42 tensors" in mediator("inspect", "org/lora").out
    assert mediator("inspect", "org/base", "--offline").code == 2


def test_a_bundle_on_the_hub_is_not_taken_for_its_dense_part(mediator, hub, workshop):
    hub.add("org/bundle", workshop.merge("out", assign={"rule": "all"}))
    (workshop.folder / "t.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    run = mediator("evaluate", "org/bundle", "--tasks", "t.jsonl")
    assert run.code == 2
    assert "error: org/bundle: is a bundle" in run.err
    assert "`mediator pull org/bundle`" in run.err


def test_the_usual_variables_of_the_environment_are_obeyed(hub, cache, tmp_path):
    """A process of its own reads them at import; looking at a model still needs no torch."""
    hub.repos["org/base"].private = True
    program = (
        "import sys; from mediator_cli.cli.app import main\n"
        "sys.argv[1:] = ['inspect', 'org/base', *sys.argv[1:]]\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    places = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HOME": str(tmp_path), "HF_TOKEN": TOKEN}

    def call(*words, **more):
        env = {**os.environ, **places, **more}
        return subprocess.run([sys.executable, "-c", program, *words], env=env, capture_output=True, text=True)

    found = call()
    assert found.returncode == 0, found.stderr
    assert "org/base: checkpoint, 30 tensors" in found.stdout
    # huggingface_hub asks for things of its own too, without a token.
    assert {r.has_token for r in hub.requests if r.server == "hub" and "org/base" in r.path} == {True}
    assert TOKEN not in found.stdout + found.stderr
    hub.forget()
    for closed in (call("--offline"), call(HF_HUB_OFFLINE="1")):
        assert closed.returncode == 2
        assert "model.safetensors is not in the Hub's cache" in closed.stderr
    assert hub.requests == []


def test_models_on_the_hub_can_be_evaluated(hub, workshop, cache):
    found = find_candidates(["org/a", "org/lora"], [], "org/base", Access())
    sizes = {name: (workshop.folder / name / WEIGHTS).stat().st_size for name in NAMES}
    adapter = (workshop.folder / "lora" / "adapter_model.safetensors").stat().st_size
    assert [candidate.n_bytes for candidate in found] == [sizes["a"], sizes["base"] + adapter]
    assert weights_in(cache) == []
    seen = []
    download_candidates(found, lambda stage, done, total: seen.append((stage, done, total)))
    assert weights_in(cache) == ["models--org--a", "models--org--base"]
    total = sizes["a"] + sizes["base"] + adapter
    assert seen[-1] == ("download", total, total)
    assert [candidate.n_bytes for candidate in found] == [sizes["a"], sizes["base"] + adapter]


def test_weights_that_cannot_be_looked_at_are_said_by_validate_and_fetched_by_merge(mediator, hub, workshop, recipe):
    expected = digest(mediator, workshop.recipe("local.yaml", assign={"rule": "all"}), "from-folders")
    folder = workshop.folder / "a"
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    hub.add("org/a", folder)
    run = mediator("validate", recipe)
    assert run.code == 2
    assert "cannot be checked before it is downloaded" in run.err
    assert hub.served.get("pytorch_model.bin", 0) == 0
    assert digest(mediator, recipe, "from-hub") == expected
    assert hub.served["pytorch_model.bin"] == (folder / "pytorch_model.bin").stat().st_size
    assert mediator("validate", recipe).code == 0


def test_nothing_is_fetched_while_something_else_is_wrong(mediator, hub, workshop):
    folder = workshop.folder / "a"
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    hub.add("org/a", folder)
    wrong = workshop.recipe("hub.yaml", base="org/base", experts=EXPERTS, average={"method": "tiez"})
    run = mediator("merge", wrong, "-o", "out")
    assert run.code == 2
    assert "tiez" in run.err
    assert "cannot be checked before" in run.err
    assert hub.served.get("pytorch_model.bin", 0) == 0


def test_a_pickled_adapter_is_fetched_by_merge_too(mediator, hub, workshop):
    experts = [{"name": "a", "model": "./a"}, {"name": "lora", "model": "./lora"}]
    expected = digest(mediator, workshop.recipe("local.yaml", experts=experts), "from-folders")
    folder = workshop.folder / "lora"
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    hub.add("org/lora", folder)
    far = [{"name": "a", "model": "org/a"}, {"name": "lora", "model": "org/lora"}]
    recipe = workshop.recipe("hub.yaml", base="org/base", experts=far)
    assert "adapter_model.bin cannot be checked" in mediator("validate", recipe).err
    assert digest(mediator, recipe, "from-hub") == expected
