"""Sources and outputs at s3:// URLs, against a server of moto in this process."""

from urllib.request import Request, urlopen

import pytest
from conftest import ROUTE_ALL
from far_shop import WEIGHTS, FarShop, Traffic, same_numbers

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.checkpoint.header import identity
from mediator_cli.checkpoint.remote import store
from mediator_cli.checkpoint.remote.store import open_store
from mediator_cli.checkpoint.source import find_location, open_checkpoint
from mediator_cli.errors import MediatorError

pytest.importorskip("moto", reason="moto is in the extra `dev`")
pytest.importorskip("s3fs", reason="s3fs is in the extra `remote`")

# Objects of botocore and aiohttp end with the process: that is theirs to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]
KEY, SECRET = "AKIATESTKEY", "verysecret"


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    made = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    yield f"http://{host}:{port}"
    made.stop()


@pytest.fixture
def environment(server, monkeypatch, tmp_path):
    """Credentials for the server and for nothing else."""
    import s3fs

    facts = {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "MEDIATOR_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(store, "WAITS", (0.0, 0.0))
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def far(workshop, server, environment, monkeypatch):
    urlopen(Request(f"{server}/moto-api/reset", method="POST")).close()
    traffic, cat_file = Traffic(), environment._cat_file

    async def counted(self, path, *rest, **options):
        data = await cat_file(self, path, *rest, **options)
        traffic.note(path, data)
        return data

    monkeypatch.setattr(environment, "_cat_file", counted)
    files = environment()
    files.mkdir("models")
    made = FarShop(workshop, "s3://models", files, traffic)
    made.put("base", "a", "b")
    return made


def refused(make, *parts):
    with pytest.raises(MediatorError) as caught:
        make()
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    assert KEY not in text
    assert SECRET not in text


def test_a_merge_from_s3_equals_that_from_disk_and_reads_each_byte_once(far):
    here = far.workshop.merge("here", **ROUTE_ALL)
    plan = make_plan(load_recipe(far.workshop.recipe(**far.fields(), **ROUTE_ALL)))
    assert all(n < 100_000 for n in far.traffic.of_weights().values())
    far.traffic.clear()
    there = merge(plan, far.workshop.folder / "there", settings=Settings(workers=2))
    same_numbers(here, there)
    assert read_manifest(there).digest == read_manifest(here).digest
    sizes = {f"models/{name}/{WEIGHTS}": len(far.weights(name)) for name in ("base", "a", "b")}
    assert set(far.traffic.n_bytes) == set(sizes)
    # Extraction opens the files once more than the average.
    assert all(far.traffic.n_bytes[path] <= 2 * size for path, size in sizes.items())


def test_what_shows_a_change_is_size_and_tag(far):
    location = find_location("s3://models/a", None)
    info = next(iter(open_checkpoint(location.folder).tensors.values()))
    assert identity(info.file)[0] == len(far.weights("a"))
    assert [mark for mark in identity(info.file)[1:] if mark.startswith("ETag=")]
    store = open_store("s3://models/a")
    assert store.facts(WEIGHTS).is_same(store.listing()[0][WEIGHTS])


@pytest.mark.parametrize("data", [lambda old: old[:-10], lambda old: bytes(len(old))], ids=["shorter", "same size"])
def test_an_object_that_was_changed_after_the_plan_is_refused(far, data):
    plan = make_plan(load_recipe(far.workshop.recipe(**far.fields())))
    far.files.pipe_file(f"models/a/{WEIGHTS}", data(far.weights("a")))
    refused(lambda: merge(plan, far.workshop.folder / "out"), f"s3://models/a/{WEIGHTS}", "was changed")


def test_an_object_that_gets_shorter_while_it_is_read_is_refused(far):
    found = open_store("s3://models/a")
    known = found.facts(WEIGHTS)
    far.files.pipe_file(f"models/a/{WEIGHTS}", b"short")
    refused(lambda: found.read(WEIGHTS, 100, 200, known), f"s3://models/a/{WEIGHTS}", "was changed", "5 bytes")


@pytest.mark.parametrize("url", ["s3://models/none", "s3://no-such-bucket/a"])
def test_what_is_not_there_is_told(far, url):
    refused(lambda: find_location(url, None), url, "no such bucket or folder")


def test_missing_credentials_are_told(far, environment, monkeypatch):
    environment.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    refused(lambda: find_location("s3://models/a", None), "s3://models/a", "no credentials were found", "AWS_PROFILE")


def test_a_service_that_forbids_is_told(far, monkeypatch):
    async def forbidden(self, *words, **options):
        raise PermissionError(f"key {KEY} may not")

    monkeypatch.setattr(type(far.files), "_call_s3", forbidden)
    refused(lambda: find_location("s3://models/b", None), "s3://models/b", "does not allow it", "AWS_ACCESS_KEY_ID")


def test_a_server_that_is_away_is_told(far, environment, monkeypatch):
    environment.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(environment, "retries", 1)
    refused(lambda: find_location("s3://models/a", None), "s3://models/a", "cannot be reached", "check the network")


def test_a_bundle_is_written_to_s3_and_is_a_source_itself(far):
    plan = make_plan(load_recipe(far.workshop.recipe(**ROUTE_ALL)))
    here = merge(plan, far.workshop.folder / "out")
    there = merge(plan, "s3://models/bundles/out")
    assert read_manifest(there) == read_manifest(here)
    far.files.invalidate_cache()
    found = {path.removeprefix("models/bundles/out/") for path in far.files.find("models/bundles/out")}
    assert found == {file.relative_to(here).as_posix() for file in here.rglob("*") if file.is_file()}
    for name in found:
        assert far.files.cat_file(f"models/bundles/out/{name}") == (here / name).read_bytes()
    refused(lambda: merge(plan, "s3://models/bundles/out"), "s3://models/bundles/out", "exists", "--overwrite")
    merge(plan, "s3://models/bundles/out", settings=Settings(overwrite=True))
    again = {"base": "s3://models/bundles/out"}
    same_numbers(far.workshop.merge("x", base=str(here)), far.workshop.merge("y", **again))
