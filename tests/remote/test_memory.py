"""Sources and outputs at memory:// URLs: same bits as from disk, few bytes, and clear words for what goes wrong."""

import json
import subprocess
import sys
from importlib import import_module

import fsspec
import pytest
import torch
from conftest import ROUTE_ALL, edit_json
from far_shop import WEIGHTS, FarShop, Traffic, same_numbers
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.checkpoint.header import identity, read_header, read_start
from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.checkpoint.remote import store
from mediator_cli.checkpoint.remote.folder import UNFINISHED, read_remote
from mediator_cli.checkpoint.source import find_location, look_at, open_checkpoint
from mediator_cli.errors import CheckpointError, MediatorError, OutputError

URL = "memory://models"


@pytest.fixture
def far(workshop, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDIATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "WAITS", (0.0, 0.0))
    traffic, cat_file = Traffic(), MemoryFileSystem.cat_file

    def counted(self, path, start=None, end=None, **options):
        data = cat_file(self, path, start, end, **options)
        traffic.note(self._strip_protocol(path), data)
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    made = FarShop(workshop, URL, fsspec.filesystem("memory"), traffic)
    made.put("base", "a", "b", "lora")
    return made


def opened(name):
    location = find_location(f"{URL}/{name}", None)
    return open_checkpoint(location.folder, location.repo)


def refused(make, *parts):
    with pytest.raises(MediatorError) as caught:
        make()
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    return text


RECIPES = {
    "averaged": {"average": {"method": "ties", "density": 0.5}},
    "routed": ROUTE_ALL,
}


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_a_merge_from_afar_equals_that_from_disk(far, fields):
    here = far.workshop.merge("here", **fields)
    there = far.workshop.merge("there", **far.fields(), **fields)
    same_numbers(here, there)
    assert read_manifest(there).digest == read_manifest(here).digest
    assert [s.files for s in read_manifest(there).experts] == [s.files for s in read_manifest(here).experts]


def test_sources_may_be_mixed_and_adapters_are_read_from_afar(far):
    experts = [{"name": "a", "model": "./a"}, {"name": "lora", "model": "./lora"}]
    here = far.workshop.merge("here", experts=experts)
    experts[1]["model"] = f"{URL}/lora"
    same_numbers(here, far.workshop.merge("there", experts=experts))


def test_shards_are_found_by_their_index(far):
    folder = far.workshop.folder / "a"
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    far.files.rm(far.path("a"), recursive=True)
    far.put("a")
    same_numbers(far.workshop.merge("here"), far.workshop.merge("there", **far.fields()))


def test_a_plan_reads_headers_alone_and_the_next_one_nothing(far):
    recipe = load_recipe(far.workshop.recipe(**far.fields()))
    make_plan(recipe)
    assert set(far.traffic.of_weights()) == {f"models/{name}/{WEIGHTS}" for name in ("base", "a", "b")}
    assert all(n < 100_000 for n in far.traffic.of_weights().values())
    far.traffic.clear()
    make_plan(recipe)
    assert not far.traffic.n_bytes


def test_of_a_long_file_only_the_start_is_read_for_its_header(far):
    file = far.workshop.folder / "a" / WEIGHTS
    save_file(load_file(file) | {"long": torch.zeros(200_000)}, file)
    far.put("a")
    checkpoint = opened("a")
    assert checkpoint.tensors["long"].shape == (200_000,)
    assert far.traffic.of_weights() == {f"models/a/{WEIGHTS}": 1 << 16}


def test_a_long_header_is_read_to_its_end(far):
    file = far.workshop.folder / "a" / WEIGHTS
    save_file(load_file(file), file, metadata={"note": "x" * 100_000})
    far.put("a")
    checkpoint = opened("a")
    assert set(checkpoint.tensors) == set(far.workshop.base)
    n_header = read_header(file).data_start
    assert far.traffic.of_weights() == {f"models/a/{WEIGHTS}": n_header}


def test_a_merge_reads_each_byte_once_per_pass_and_no_file_that_it_does_not_need(far):
    far.files.pipe_file(far.path("a/optimizer.bin"), b"x" * 1000)
    far.files.pipe_file(far.path("a/modeling_own.py"), b"raise SystemExit")
    plan = make_plan(load_recipe(far.workshop.recipe(**far.fields(), average={"method": "linear"})))
    far.traffic.clear()
    merge(plan, far.workshop.folder / "out", settings=Settings(workers=2))
    sizes = {f"models/{name}/{WEIGHTS}": len(far.weights(name)) for name in ("base", "a", "b")}
    assert set(far.traffic.n_bytes) == set(sizes)
    # Small files are read in one go, whatever looks at them: lineage, survey, average.
    assert all(far.traffic.n_bytes[path] <= size for path, size in sizes.items())


def test_no_weights_are_written_into_the_cache(far, tmp_path):
    far.workshop.merge("out", **far.fields())
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.suffix == ".safetensors"]


def test_what_shows_a_change_is_size_and_time(far):
    info = next(iter(opened("a").tensors.values()))
    size, mark = identity(info.file)
    assert size == len(far.weights("a"))
    assert mark.startswith("created=")
    assert read_start(info.file, 100) == far.weights("a")[:100]
    local = far.workshop.folder / "a" / WEIGHTS
    assert identity(local) == [size, local.stat().st_mtime_ns]


@pytest.mark.parametrize("data", [lambda old: old[:-10], lambda old: bytes(len(old))], ids=["shorter", "same size"])
def test_an_object_that_was_changed_after_the_plan_is_refused(far, data):
    plan = make_plan(load_recipe(far.workshop.recipe(**far.fields())))
    far.files.pipe_file(far.path(f"a/{WEIGHTS}"), data(far.weights("a")))
    refused(lambda: merge(plan, far.workshop.folder / "out"), f"{URL}/a/{WEIGHTS}", "was changed", "run the command")
    assert not (far.workshop.folder / "out").exists()


def test_an_object_that_is_changed_during_the_merge_is_refused(far, monkeypatch):
    plan = make_plan(load_recipe(far.workshop.recipe(**far.fields())))
    cat_file = MemoryFileSystem.cat_file

    def changing(self, path, *rest, **options):
        data = cat_file(self, path, *rest, **options)
        self.pipe_file(path, self.store[self._strip_protocol(path)].getvalue())
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", changing)
    refused(lambda: merge(plan, far.workshop.folder / "out"), WEIGHTS, "was changed since its header was read")
    assert not (far.workshop.folder / "out").exists()


def test_a_truncated_object_is_named_by_its_url(far):
    far.files.pipe_file(far.path(f"a/{WEIGHTS}"), far.weights("a")[:-10])
    text = refused(lambda: opened("a"), f"{URL}/a/{WEIGHTS}", "truncated")
    assert "cache" not in text


def test_reads_that_stumble_are_tried_again(far, monkeypatch):
    cat_file, failures = MemoryFileSystem.cat_file, [ConnectionError("secret"), TimeoutError("secret")]

    def stumbling(self, path, start=None, end=None, **options):
        if path.endswith(WEIGHTS) and failures:
            raise failures.pop()
        return cat_file(self, path, start, end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", stumbling)
    assert set(opened("a").tensors) == set(far.workshop.base)
    assert not failures


def test_a_service_that_stays_away_is_told_without_its_words(far, monkeypatch):
    def failing(self, path, start=None, end=None, **options):
        raise ConnectionError("token=secret")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    text = refused(lambda: opened("a"), f"{URL}/a/", "cannot be reached: ConnectionError", "check the network")
    assert "secret" not in text


def test_short_answers_are_no_data(far, monkeypatch):
    cat_file = MemoryFileSystem.cat_file
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, *rest, **kw: cat_file(self, *rest, **kw)[:-1])
    refused(lambda: opened("a"), f"{URL}/a/", "fewer bytes come than were asked for")


WRONG = {
    "memory://models/none": ("memory://models/none", "no such bucket or folder"),
    "memory://models/a/config.json": ("memory://models/a/config.json", "NotADirectoryError"),
    "memory://": ("memory://", "is no URL of a folder"),
    "memory://models/../a": ("is no URL of a folder",),
    "simplecache::memory://models/a": ("is no URL of a folder",),
    "nothing://models/a": ("nothing://models/a", "protocol nothing:// is not known", "s3://, gs://, hf://"),
    "memory://me:secret@models/a": ("memory://***@models/a", "holds more than a place"),
    "memory://models/a?token=secret": ("memory://models/a?***", "holds more than a place"),
}


@pytest.mark.parametrize("url", WRONG)
def test_a_wrong_url_is_refused_in_words(far, url):
    text = refused(lambda: find_location(url, None), *WRONG[url])
    assert "secret" not in text


def test_a_missing_package_is_named(far, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    refused(lambda: find_location("s3://bucket/a", None), "s3://bucket/a", "pip install 'mediator-merge[remote]'")


def test_offline_nothing_is_asked(far):
    refused(lambda: find_location(f"{URL}/a", None, Access(offline=True)), f"{URL}/a", "offline", "without --offline")
    assert not far.traffic.n_bytes


def test_a_folder_without_safetensors_is_refused(far):
    far.files.mv(far.path(f"a/{WEIGHTS}"), far.path("a/pytorch_model.bin"))
    refused(lambda: opened("a"), f"{URL}/a", "holds no safetensors")


def test_a_folder_without_config_is_refused(far):
    far.files.rm(far.path("a/config.json"))
    refused(lambda: opened("a"), f"{URL}/a", "holds no config.json")


def test_quantised_and_damaged_checkpoints_are_told_by_url(far):
    edit_json(far.workshop.folder / "a" / "config.json", quantization_config={"quant_method": "gptq"})
    far.put("a")
    refused(lambda: opened("a"), f"{URL}/a/config.json")
    assert look_at(find_location(f"{URL}/a", None).folder).tensors


def test_an_unfinished_upload_is_no_source(far):
    far.files.pipe_file(far.path(f"a/{UNFINISHED}"), b"[]")
    refused(lambda: opened("a"), f"{URL}/a", "was not finished", "--overwrite")


def test_a_note_outside_the_cache_is_not_believed(far, tmp_path):
    folder = find_location(f"{URL}/a", None).folder
    assert read_remote(folder).url == f"{URL}/a"
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / ".far").mkdir()
    (copy / ".far" / "note.json").write_bytes((folder / ".far" / "note.json").read_bytes())
    assert read_remote(copy) is None


def test_a_bundle_at_a_url_is_the_one_of_a_folder_and_its_manifest_comes_last(far, monkeypatch):
    plan = make_plan(load_recipe(far.workshop.recipe(**ROUTE_ALL)))
    here = merge(plan, far.workshop.folder / "out")
    order = []
    for name in ("put_file", "pipe_file"):
        method = getattr(MemoryFileSystem, name)

        def noted(self, *words, method=method, name=name, **options):
            order.append(str(words[1] if name == "put_file" else words[0]))
            return method(self, *words, **options)

        monkeypatch.setattr(MemoryFileSystem, name, noted)
    there = merge(plan, "memory://bundles/out")
    assert order[0].endswith(UNFINISHED)
    assert order[-1].endswith("routing_manifest.json")
    assert read_manifest(there) == read_manifest(here)
    for file in (file for file in here.rglob("*") if file.is_file()):
        assert far.files.cat_file(f"bundles/out/{file.relative_to(here).as_posix()}") == file.read_bytes()
    assert not far.files.exists(f"bundles/out/{UNFINISHED}")
    assert set(open_checkpoint(there).tensors) == set(far.workshop.base)


def test_an_upload_leaves_nothing_on_the_disk(far, tmp_path):
    merge(make_plan(load_recipe(far.workshop.recipe())), "memory://bundles/out")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.suffix == ".safetensors"]


def test_output_path_of_a_recipe_may_be_a_url(far):
    merge(make_plan(load_recipe(far.workshop.recipe(output={"path": "memory://bundles/own"}))))
    assert far.files.exists("bundles/own/routing_manifest.json")


def test_what_stands_at_a_url_is_replaced_only_if_asked_and_if_it_is_a_bundle(far):
    plan = make_plan(load_recipe(far.workshop.recipe(**ROUTE_ALL)))
    merge(plan, "memory://bundles/out")
    far.files.pipe_file("bundles/out/mine.txt", b"kept")
    refused(lambda: merge(plan, "memory://bundles/out"), "memory://bundles/out", "exists", "--overwrite")
    dense = make_plan(load_recipe(far.workshop.recipe(assign={"rule": "none"})))
    merge(dense, "memory://bundles/out", settings=Settings(overwrite=True))
    left = [path for path in far.files.find("bundles/out") if "experts/" in path]
    assert not left
    assert far.files.cat_file("bundles/out/mine.txt") == b"kept"
    far.files.pipe_file("other/notes.txt", b"mine")
    overwrite = Settings(overwrite=True)
    refused(lambda: merge(plan, "memory://other", settings=overwrite), "memory://other", "is not a bundle")


def test_an_upload_that_fails_leaves_no_bundle_and_the_next_one_mends_it(far, monkeypatch):
    plan = make_plan(load_recipe(far.workshop.recipe(**ROUTE_ALL)))
    merge(plan, "memory://bundles/out")
    put_file = MemoryFileSystem.put_file

    def failing(self, here, there, *rest, **options):
        if there.endswith("a.safetensors"):
            raise ConnectionError("secret")
        return put_file(self, here, there, *rest, **options)

    again = Settings(overwrite=True)
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "put_file", failing)
        with pytest.raises(OutputError) as caught:
            merge(plan, "memory://bundles/out", settings=again)
    assert "cannot be reached: ConnectionError" in str(caught.value)
    assert "the finished bundle is kept in" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not far.files.exists("bundles/out/routing_manifest.json")
    with pytest.raises(CheckpointError, match="was not finished"):
        find_location("memory://bundles/out", None)
    refused(lambda: merge(plan, "memory://bundles/out"), "not finished", "--overwrite")
    merge(plan, "memory://bundles/out", settings=again)
    assert far.files.exists("bundles/out/routing_manifest.json")
    assert not far.files.exists(f"bundles/out/{UNFINISHED}")


def test_local_sources_do_not_import_fsspec():
    code = "import sys, mediator_cli.pipeline.merge; assert 'fsspec' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
