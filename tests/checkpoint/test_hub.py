"""Sources on the Hub, against a hub of our own on loopback that counts every byte."""

import hashlib
import json
import socket

import pytest
import torch
from conftest import random_tensors, write_checkpoint
from loopback_hub import TOKEN, joined
from safetensors.torch import save_file

from mediator_cli.checkpoint.header import read_header
from mediator_cli.checkpoint.hub.files import fetch_weights, partial_bytes
from mediator_cli.checkpoint.hub.find import Access, find_repo, is_hub_id, read_far_header
from mediator_cli.checkpoint.hub.repo import HubRepo
from mediator_cli.checkpoint.source import find_location, open_checkpoint, weight_files
from mediator_cli.errors import CheckpointError

FIRST = 1 << 16


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch, cache):
    with joined(monkeypatch, cache) as made:
        yield made


@pytest.fixture
def model(tmp_path):
    """A model folder with every kind of file that a repository may hold; its weights are larger than one first read."""
    folder = write_checkpoint(tmp_path / "model", random_tensors(0) | {"big": torch.arange(100_000.0)})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "tokenizer_own.py").write_text("raise SystemExit")
    (folder / "training_args.bin").write_bytes(b"x" * 9)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


def located(source, tmp_path, **access):
    return find_location(source, tmp_path / source, Access(**access))


def opened(source, tmp_path, **access):
    location = located(source, tmp_path, **access)
    return open_checkpoint(location.folder, location.repo)


def snapshot(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


SMALL = [
    "README.md",
    "additional_chat_templates/tool.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        ("org/name", True),
        ("org/name-1.5B_x@main", True),
        ("org/name@refs/pr/3", True),
        ("org/name@feature/a+b", True),
        ("org/name@../../etc", False),
        ("org/name@/etc", False),
        ("org/name@a b", False),
        ("./org/name", False),
        ("../org/name", False),
        ("/org/name", False),
        ("org/name/", False),
        ("a/b/c", False),
        ("name", False),
        ("~/name", False),
        ("org/..", False),
    ],
)
def test_only_plain_names_are_hub_ids(source, is_id):
    assert is_hub_id(source) is is_id


def test_a_folder_wins_over_the_hub(hub, tmp_path, model):
    (tmp_path / "org").mkdir()
    model.rename(tmp_path / "org" / "name")
    location = located("org/name", tmp_path)
    assert (location.folder, location.repo) == (tmp_path / "org" / "name", None)
    assert hub.requests == []


@pytest.mark.parametrize("ref", ["main", "v1.0", "refs/pr/3", "feature/x"])
def test_a_revision_is_pinned_to_its_commit(hub, tmp_path, cache, model, ref):
    commit = hub.add("org/name", model, ref)
    source = "org/name" if ref == "main" else f"org/name@{ref}"
    location = located(source, tmp_path)
    storage = cache / "models--org--name"
    assert location.folder == storage / "snapshots" / commit
    assert (storage / "refs" / ref).read_text() == commit
    assert (location.repo.repo_id, location.repo.revision, location.repo.commit) == ("org/name", ref, commit)


def test_a_commit_can_be_named_itself(hub, tmp_path, model):
    commit = hub.add("org/name", model)
    (model / "config.json").write_text("{}")
    hub.add("org/name", model)
    assert located(f"org/name@{commit}", tmp_path).repo.commit == commit
    assert located("org/name", tmp_path).repo.commit != commit


def test_only_small_files_are_fetched_and_never_code(hub, tmp_path, model):
    hub.add("org/name", model)
    location = located("org/name", tmp_path)
    assert snapshot(location.folder) == SMALL
    assert {name: (location.folder / name).read_bytes() for name in SMALL} == {
        name: (model / name).read_bytes() for name in SMALL
    }
    assert hub.weight_bytes() == 0
    assert not [path for path in hub.served if path.endswith(".py")]


def test_small_files_are_fetched_once(hub, tmp_path, model):
    hub.add("org/name", model)
    located("org/name", tmp_path)
    hub.forget()
    located("org/name", tmp_path)
    assert [request.path.split("?")[0] for request in hub.requests] == ["/api/models/org/name/revision/main"]


def test_headers_are_read_by_range_and_nothing_else_of_the_weights(hub, tmp_path, model):
    hub.add("org/name", model)
    found = opened("org/name", tmp_path)
    local = open_checkpoint(model)
    assert hub.served["model.safetensors"] == FIRST < (model / "model.safetensors").stat().st_size
    assert list(found.tensors) == list(local.tensors)
    for name, info in found.tensors.items():
        mine = local.tensors[name]
        assert (info.dtype, info.shape, info.start, info.end) == (mine.dtype, mine.shape, mine.start, mine.end)
        assert info.file == found.path / "model.safetensors"
    assert snapshot(found.path) == SMALL


def test_a_long_header_takes_a_second_read_up_to_its_end(hub, tmp_path, model):
    file = model / "model.safetensors"
    save_file({f"layer.{n:05d}.weight": torch.zeros(40) for n in range(2000)}, file)
    hub.add("org/name", model)
    assert len(opened("org/name", tmp_path).tensors) == 2000
    end = read_header(file).data_start
    assert FIRST < end < file.stat().st_size
    assert hub.served["model.safetensors"] == end
    ranges = [r.range for r in hub.requests if r.server == "cdn"]
    assert ranges == [f"bytes=0-{FIRST - 1}", f"bytes={FIRST}-{end - 1}"]


def sharded(folder, n=3):
    """Write a model as shards of 200 kB and more; give the shard of each tensor."""
    made = {f"model.layers.{k}.w": torch.full((60_000,), float(k)) for k in range(n)}
    places = {name: f"model-{k + 1:05d}-of-{n:05d}.safetensors" for k, name in enumerate(made)}
    folder.mkdir()
    for name, file in places.items():
        save_file({name: made[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text("{}")
    return places


def test_each_shard_gives_its_header(hub, tmp_path):
    places = sharded(tmp_path / "model")
    hub.add("org/name", tmp_path / "model")
    found = opened("org/name", tmp_path)
    assert {name: info.file.name for name, info in found.tensors.items()} == places
    assert {name: hub.served[name] for name in places.values()} == dict.fromkeys(places.values(), FIRST)


def test_weights_in_the_cache_are_read_there(hub, tmp_path, model):
    hub.add("org/name", model)
    fetch_weights(located("org/name", tmp_path).repo, "model.safetensors")
    hub.forget()
    assert opened("org/name", tmp_path).tensors.keys() == open_checkpoint(model).tensors.keys()
    assert hub.weight_bytes() == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a safetensors file"),
        (b"\x10\0\0\0\0\0\0\0{}", "header of 16 bytes is longer than the file of 10 bytes"),
        (b"PK\3\4 no header at all", "is not a safetensors file"),
    ],
)
def test_a_far_header_is_checked_like_a_near_one(hub, tmp_path, model, data, message):
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)
    hub.add("org/name", model)
    with pytest.raises(CheckpointError, match=message):
        opened("org/name", tmp_path)


def test_a_far_file_that_is_cut_is_noticed(hub, tmp_path, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    hub.add("org/name", model)
    with pytest.raises(CheckpointError, match="truncated"):
        opened("org/name", tmp_path)


def test_names_that_leave_the_folder_are_passed_over(hub, tmp_path, model):
    commit = hub.add("org/name", model)
    bad = ["../evil.jinja", "/evil.jinja", "a/../../evil.jinja", "c:evil.jinja", "..\\evil.jinja"]
    hub.repos["org/name"].commits[commit] |= dict.fromkeys(bad, b"x")
    location = located("org/name", tmp_path)
    assert not set(bad) & set(location.repo.sizes)
    assert not list(tmp_path.rglob("*evil*"))


def problem(tmp_path, source="org/name", **access):
    with pytest.raises(CheckpointError) as caught:
        opened(source, tmp_path, **access)
    (found,) = caught.value.problems
    return found


@pytest.mark.parametrize(
    ("token", "setting", "source", "message", "hint"),
    [
        (None, {}, "org/none", "no such folder, and no such repository on the Hub", "without a token a private"),
        (TOKEN, {}, "org/none", "no such folder, and no such repository on the Hub", "your token may not read"),
        (None, {"private": True}, "org/name", "no such repository on the Hub", "`hf auth login`"),
        ("hf_other", {"private": True}, "org/name", "no such repository on the Hub", "your token may not read"),
        (None, {"gated": True}, "org/name", "is gated", "/org/name, then `hf auth login`, or set HF_TOKEN"),
        ("hf_other", {"gated": True}, "org/name", "is gated", "accept them at http://127.0.0.1"),
        (None, {}, "org/name@v9", "has no revision 'v9'", "branches and tags are at http://127.0.0.1"),
        ("bad", {}, "org/name", "the Hub does not accept your token", "/settings/tokens, then `hf auth login`"),
        (None, {}, "a--b/name", "no valid name of a Hub repository", "write org/name"),
    ],
)
def test_refusals_say_what_to_do(hub, tmp_path, monkeypatch, model, token, setting, source, message, hint):
    hub.add("org/name", model, **setting)
    hub.bad_tokens = token == "bad"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    found = problem(tmp_path, source)
    assert found.place.startswith(source)
    assert message in found.message
    assert hint in found.hint
    assert not token or token not in str(found)


@pytest.mark.parametrize(
    ("status", "headers", "message", "hint"),
    [
        (429, {"Retry-After": "30"}, "too many requests", "wait 30 s and try again"),
        (429, {"RateLimit": '"api";r=0;t=55'}, "too many requests", "wait 55 s and try again"),
        (429, {}, "too many requests", "wait some minutes"),
        (500, {}, "the Hub answers with error 500", "--offline"),
        (503, {}, "the Hub answers with error 503", "try again"),
        (403, {}, "the Hub forbids it", "your token may not read this repository"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "was disabled", "see http"),
    ],
)
def test_a_hub_that_cannot_serve_says_what_to_do(hub, tmp_path, model, status, headers, message, hint):
    hub.add("org/name", model)
    hub.faults.append(("/api/models", status, headers))
    found = problem(tmp_path)
    assert message in found.message
    assert hint in found.hint


def test_a_hub_out_of_reach_is_said(hub, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    found = problem(tmp_path)
    assert found.message.startswith("no such folder, and the Hub cannot be reached: ConnectError")
    assert "HF_ENDPOINT" in found.hint
    assert "--offline" in found.hint


def test_an_answer_that_is_no_hubs_is_said(hub, tmp_path, model):
    hub.add("org/name", model)
    hub.repos["org/name"].commits = {"main": {}}
    hub.repos["org/name"].refs = {}
    assert problem(tmp_path).message == "the Hub names no commit"


@pytest.mark.parametrize("answer", ["[]", '{"a": 1}', '"x"', "<html>", '{"id": "org/name", "siblings": [1]}'])
def test_an_answer_of_another_server_is_said(hub, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(hub, "nonsense", answer)
    assert problem(tmp_path).place == "org/name"
    assert "HF_ENDPOINT" in problem(tmp_path).hint


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_range_is_asked_for_again_when_the_error_may_pass(hub, tmp_path, model, status):
    hub.add("org/name", model)
    hub.faults += [("/resolve/.*model.safetensors", status, {})] * 2
    assert len(opened("org/name", tmp_path).tensors) == len(open_checkpoint(model).tensors)
    assert hub.faults == []


def test_a_range_is_given_up_when_the_error_stays_or_will_not_pass(hub, tmp_path, model):
    hub.add("org/name", model)
    hub.faults += [("/resolve/.*model.safetensors", 500, {})] * 3
    assert "error 500" in problem(tmp_path).message
    hub.faults += [("/resolve/.*model.safetensors", 429, {"Retry-After": "3600"})] * 2
    assert "wait 3600 s" in problem(tmp_path).hint
    hub.faults[:] = [("/cdn/.*model.safetensors", 403, {})] * 2
    assert problem(tmp_path).place == "org/name: model.safetensors"
    assert len(hub.faults) == 1


def test_a_repository_that_is_no_model_is_said(hub, tmp_path, model):
    (model / "config.json").unlink()
    hub.add("org/name", model)
    assert problem(tmp_path).message == "the repository holds no config.json"


def test_a_shard_that_is_missing_is_said(hub, tmp_path):
    places = sharded(tmp_path / "model")
    (tmp_path / "model" / places["model.layers.1.w"]).unlink()
    hub.add("org/name", tmp_path / "model")
    assert problem(tmp_path).message == "the repository holds no model-00002-of-00003.safetensors"


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(hub, tmp_path, monkeypatch, model):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("org/name", model, gated=True, private=True)
    fetch_weights(opened("org/name", tmp_path).repo, "model.safetensors")
    assert {r.server: r.has_token for r in hub.requests} == {"hub": True, "cdn": False}
    assert len({r.has_token for r in hub.requests if r.server == "hub"}) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]


def test_an_unusable_token_is_not_shown(hub, tmp_path, monkeypatch, model):
    hub.add("org/name", model)
    monkeypatch.setenv("HF_TOKEN", "hf_sécret\x07")
    found = problem(tmp_path)
    assert "cret" not in str(found)


def weights(tmp_path, source="org/name"):
    location = located(source, tmp_path)
    return location.repo, location.folder / "model.safetensors"


def test_a_download_lands_in_the_ordinary_cache(hub, tmp_path, cache, model):
    hub.add("org/name", model)
    repo, file = weights(tmp_path)
    seen = []
    fetch_weights(repo, "model.safetensors", seen.append)
    data = (model / "model.safetensors").read_bytes()
    assert file.read_bytes() == data
    assert sum(seen) == len(data)
    blob = cache / "models--org--name" / "blobs" / hashlib.sha256(data).hexdigest()
    assert file.resolve() == blob.resolve()
    assert not list(cache.rglob("*.incomplete"))


def test_a_cut_download_asks_for_the_rest(hub, tmp_path, model):
    hub.add("org/name", model)
    repo, file = weights(tmp_path)
    hub.cuts += [100_000, 50_000]
    fetch_weights(repo, "model.safetensors")
    size = repo.sizes["model.safetensors"]
    asked = [r.range for r in hub.requests if r.server == "cdn"]
    assert asked == [f"bytes={start}-{size - 1}" for start in (0, 100_000, 150_000)]
    assert hub.weight_bytes() == size
    assert file.read_bytes() == (model / "model.safetensors").read_bytes()


def test_the_next_run_goes_on_where_a_broken_one_stopped(hub, tmp_path, model):
    hub.add("org/name", model)
    repo, file = weights(tmp_path)

    def stop_at_once(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_weights(repo, "model.safetensors", stop_at_once)
    kept = partial_bytes(repo)
    assert 0 < kept < repo.sizes["model.safetensors"]
    assert not file.exists()
    hub.forget()
    seen = []
    fetch_weights(repo, "model.safetensors", seen.append)
    asked = [r.range for r in hub.requests if r.server == "cdn"]
    assert asked == [f"bytes={kept}-{repo.sizes['model.safetensors'] - 1}"]
    assert sum(seen) == repo.sizes["model.safetensors"]
    assert file.read_bytes() == (model / "model.safetensors").read_bytes()
    assert partial_bytes(repo) == 0


def test_a_server_that_knows_no_ranges_still_serves(hub, tmp_path, model):
    hub.add("org/name", model)
    hub.knows_ranges = False
    assert len(opened("org/name", tmp_path).tensors) == len(open_checkpoint(model).tensors)
    repo, file = weights(tmp_path)
    hub.cuts.append(100_000)
    fetch_weights(repo, "model.safetensors")
    assert file.read_bytes() == (model / "model.safetensors").read_bytes()


def test_weights_of_an_earlier_commit_are_not_fetched_again(hub, tmp_path, model):
    hub.add("org/name", model)
    first, _ = weights(tmp_path)
    fetch_weights(first, "model.safetensors")
    (model / "README.md").write_text("new words, old weights")
    hub.add("org/name", model)
    hub.forget()
    repo, file = weights(tmp_path)
    assert repo.commit != first.commit
    assert file.read_bytes() == (model / "model.safetensors").read_bytes()
    assert len(opened("org/name", tmp_path).tensors) == len(open_checkpoint(model).tensors)
    assert hub.weight_bytes() == 0


def test_weights_that_another_process_fetched_meanwhile_are_taken(hub, tmp_path, cache, model):
    hub.add("org/name", model)
    repo, file = weights(tmp_path)
    data = (model / "model.safetensors").read_bytes()
    (cache / "models--org--name" / "blobs" / hashlib.sha256(data).hexdigest()).write_bytes(data)
    seen = []
    fetch_weights(repo, "model.safetensors", seen.append)
    assert file.read_bytes() == data
    assert seen == [len(data)]
    assert hub.weight_bytes() == 0
    assert partial_bytes(repo) == 0


def test_large_files_are_asked_for_in_pieces(hub, tmp_path, monkeypatch, model):
    monkeypatch.setattr("mediator_cli.checkpoint.hub.files._PIECE", 150_000)
    hub.add("org/name", model)
    repo, file = weights(tmp_path)
    fetch_weights(repo, "model.safetensors")
    size = repo.sizes["model.safetensors"]
    asked = [r.range for r in hub.requests if r.server == "cdn"]
    assert asked == ["bytes=0-149999", "bytes=150000-299999", f"bytes=300000-{size - 1}"]
    assert file.read_bytes() == (model / "model.safetensors").read_bytes()


def test_bytes_of_another_digest_are_dropped(hub, tmp_path, cache, model):
    hub.add("org/name", model)
    repo, file = weights(tmp_path)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    partial = cache / "models--org--name" / "blobs" / f"{digest}.mediator.incomplete"
    partial.write_bytes(b"not these bytes")
    with pytest.raises(CheckpointError, match="do not have the digest that the Hub says"):
        fetch_weights(repo, "model.safetensors")
    assert not file.exists()
    fetch_weights(repo, "model.safetensors")
    assert file.read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_file_of_another_size_than_the_plan_knows_is_noticed(hub, tmp_path, model):
    hub.add("org/name", model)
    repo, _ = weights(tmp_path)
    repo = HubRepo(repo.source, repo.repo_id, "main", repo.commit, repo.folder, {"model.safetensors": 5000})
    with pytest.raises(CheckpointError, match="the Hub said 5000"):
        fetch_weights(repo, "model.safetensors")
    with pytest.raises(CheckpointError, match="the Hub said 5000"):
        read_far_header(repo.folder / "model.safetensors", repo)


def test_offline_uses_the_cache_alone(hub, tmp_path, model):
    hub.add("org/name", model)
    repo, _ = weights(tmp_path)
    fetch_weights(repo, "model.safetensors")
    hub.forget()
    for source in ("org/name", f"org/name@{repo.commit}"):
        found = opened(source, tmp_path, offline=True)
        assert weight_files(found.tensors) == (repo.folder / "model.safetensors",)
        assert found.repo.commit == repo.commit
    assert hub.requests == []


def test_offline_says_what_is_missing(hub, tmp_path, monkeypatch, model):
    hub.add("org/name", model)
    found = problem(tmp_path, offline=True)
    assert "revision 'main' is not in the Hub's cache" in found.message
    assert "run once without --offline" in found.hint
    commit = located("org/name", tmp_path).repo.commit
    assert "revision 'v1' is not in" in problem(tmp_path, "org/name@v1", offline=True).message
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = problem(tmp_path)
    assert found.message == "model.safetensors is not in the Hub's cache"
    assert f"`hf download org/name model.safetensors --revision {commit}`" in found.hint


def test_a_cache_that_cannot_be_written_is_said(hub, tmp_path, cache, model):
    hub.add("org/name", model)
    cache.write_text("a file where the folder should be")
    found = problem(tmp_path)
    assert found.message.startswith("cannot fill the cache")
    assert "HF_HUB_CACHE" in found.hint


def test_pickled_weights_cannot_be_looked_at_before_the_download(hub, tmp_path, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    hub.add("org/name", model)
    found = problem(tmp_path)
    assert "pytorch_model.bin" in found.message
    assert "before" in found.message
    assert "hf download org/name" in found.hint
    assert hub.weight_bytes() == 0


def test_a_name_that_is_no_id_is_refused(hub):
    with pytest.raises(CheckpointError, match="is no Hub id"):
        find_repo("name", Access(), lambda name: True)
