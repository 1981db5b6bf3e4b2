"""Bundles to the Hub and back, against a hub on loopback: what is sent, what is not, what a cut leaves."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import all_files, edit_json, write_adapter
from huggingface_hub.utils import _http
from loopback_hub import TOKEN, LoopbackHub, Repo, joined

from mediator_cli.bundle.card import with_block
from mediator_cli.bundle.licences import licence_facts, licence_warnings
from mediator_cli.bundle.lineage import Parent, card_facts, read_facts, with_facts, with_lineage
from mediator_cli.bundle.manifest import MANIFEST, Manifest, read_manifest, to_json
from mediator_cli.bundle.replace import record_of
from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.errors import BundleError, CheckpointError, OutputError
from mediator_cli.export.hub.folder import look_into
from mediator_cli.export.hub.paths import hidden
from mediator_cli.export.hub.pull import pull
from mediator_cli.export.hub.push import PushJob, push
from mediator_cli.export.hub.shipment import make_shipment

REPO = "org/demo"
COMMIT = "c" * 40
# huggingface_hub gives an open file to its HTTP client in a way that the client will drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Clock:
    """Stands in for the clock of huggingface_hub: waiting takes no time."""

    def __getattr__(self, name):
        import time

        return (lambda seconds: None) if name == "sleep" else getattr(time, name)


@dataclass
class Place:
    """A hub, a bundle, and a folder to pull into."""

    hub: LoopbackHub
    bundle: Path
    folder: Path

    def push(self, **options):
        return push(make_shipment(self.bundle, REPO), PushJob(**options))

    def manifest(self, **fields):
        """Write the bundle's manifest with other fields."""
        new = read_manifest(self.bundle).model_copy(update=fields)
        (self.bundle / MANIFEST).write_text(to_json(new))


@pytest.fixture
def place(routed_once, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(routed_once, tmp_path / "out"))
    with joined(monkeypatch, tmp_path / "cache") as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http, "time", Clock())
        yield Place(hub, bundle, tmp_path)


def refusal(call, error=OutputError):
    with pytest.raises(error) as raised:
        call()
    assert TOKEN not in str(raised.value)
    return raised.value.problems[0]


def test_what_is_pulled_is_what_was_pushed(place):
    pushed = place.push(message="first")
    assert place.hub.messages == ["first"]
    assert place.hub.repos[REPO].private
    assert pushed.is_private
    pulled = pull(REPO, place.folder / "back")
    assert pulled.commit == pushed.commit == place.hub.repos[REPO].refs["main"]
    assert not verify_bundle(place.folder / "back").problems
    here, there = all_files(place.bundle), all_files(place.folder / "back")
    assert set(here) == set(there)
    assert {name for name in here if here[name] != there[name]} == {"README.md", MANIFEST}
    assert read_manifest(place.folder / "back").digest == read_manifest(place.bundle).digest
    assert pulled.left_out == ()


def test_the_bundle_itself_is_not_changed_by_a_push(place):
    before = all_files(place.bundle)
    place.push()
    assert all_files(place.bundle) == before


def test_a_second_push_sends_nothing_and_makes_no_commit(place):
    first = place.push()
    place.hub.forget()
    again = place.push()
    assert (again.sent, again.sent_bytes, again.commit) == ((), 0, first.commit)
    assert set(again.kept) == set(first.sent)
    assert not [r for r in place.hub.requests if "/commit/" in r.path or r.method == "PUT"]


def test_a_push_that_was_cut_leaves_no_bundle_and_sends_only_the_rest_again(place):
    weights = list(place.bundle.rglob("*.safetensors"))
    place.hub.upload_limit = sum(file.stat().st_size for file in weights) - 1
    problem = refusal(place.push)
    assert "same command again" in problem.hint
    came, whole = set(place.hub.uploads), {hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}
    assert came
    assert came < whole
    assert set(place.hub.files(REPO)) == {".gitattributes"}
    problem = refusal(lambda: pull(REPO, place.folder / "back"), BundleError)
    assert problem.message == "holds nothing that mediator writes"
    place.hub.upload_limit = None
    place.hub.forget()
    place.push()
    assert set(place.hub.uploads) == whole - came
    pull(REPO, place.folder / "back")


def test_a_commit_that_fails_leaves_the_old_bundle_whole(place):
    first = place.push()
    place.manifest(notices=("new",))
    place.hub.faults.append((r"POST /api/models/org/demo/commit", 503, {}))
    assert "error 503" in refusal(place.push).message
    assert place.hub.repos[REPO].refs["main"] == first.commit
    place.push()
    assert read_manifest(pull(REPO, place.folder / "back").folder).notices == ("new",)


def test_files_of_others_stay_here_and_there(place):
    for name in (".git/config", "notes.txt", "run.py", ".env", "model.safetensors.tmp"):
        (place.bundle / name).parent.mkdir(exist_ok=True)
        (place.bundle / name).write_text("mine")
    shipment = make_shipment(place.bundle, REPO)
    assert set(shipment.found.left_out) == {".git/config", "notes.txt", "run.py", ".env", "model.safetensors.tmp"}
    push(shipment)
    assert not set(place.hub.files(REPO)) & set(shipment.found.left_out)
    place.hub.commit(REPO, "main", {**place.hub.files(REPO), "eval.txt": b"theirs"})
    place.manifest(files=tuple(f for f in read_manifest(place.bundle).files if f.name != "conflicts.json"))
    pushed = place.push()
    assert pushed.removed == ("conflicts.json",)
    assert place.hub.files(REPO)["eval.txt"] == b"theirs"
    pulled = pull(REPO, place.folder / "back")
    assert pulled.left_out == ("eval.txt",)
    assert not (place.folder / "back" / "eval.txt").exists()


def test_paths_of_this_machine_are_not_pushed(place):
    old = read_manifest(place.bundle)
    base = old.base.model_copy(update={"path": "/home/alice/my models/base"})
    text = old.recipe.text.replace("./base", "/home/alice/my models/base") + "# see /home/alice/notes/a.md and ~/x/y\n"
    recipe = old.recipe.model_copy(update={"text": text, "changes": ("output.path=/home/alice/out",)})
    place.manifest(base=base, recipe=recipe)
    edit_json(place.bundle / "config.json", _name_or_path="/home/alice/my models/base")
    card = (place.bundle / "README.md").read_text() + "\nMade in /home/alice/my models/base, /v1/chat/completions.\n"
    (place.bundle / "README.md").write_text(card)
    files = {f.name: f for f in read_manifest(place.bundle).files}
    for name in ("config.json", "README.md"):
        files[name] = record_of(name, (place.bundle / name).read_bytes())
    place.manifest(files=tuple(files.values()))
    shipment = make_shipment(place.bundle, REPO)
    assert shipment.hidden == ("README.md", "config.json", MANIFEST)
    push(shipment)
    sent = place.hub.files(REPO)
    assert not [name for name, data in sent.items() if b"alice" in data]
    manifest = Manifest.model_validate_json(sent[MANIFEST])
    assert (manifest.base.path, manifest.recipe.changes) == ("base", ("output.path=out",))
    assert b"/v1/chat/completions" in sent["README.md"]
    assert manifest.recipe.sha256 == old.recipe.sha256
    pull(REPO, place.folder / "back")
    push(make_shipment(place.bundle, REPO, keep_paths=True))
    assert b"alice" in place.hub.files(REPO)[MANIFEST]


def test_the_card_tells_of_parents_licences_numbers_and_use(place):
    old = read_manifest(place.bundle)
    sources = [
        s.model_copy(update={"path": f"org/{s.name}", "revision": COMMIT, "license": licence})
        for s, licence in zip((old.base, *old.experts), ("mit", "mit", "cc-by-nc-4.0"), strict=True)
    ]
    place.manifest(base=sources[0], experts=tuple(sources[1:]))
    shipment = make_shipment(place.bundle, REPO)
    facts = read_facts(shipment.card)
    assert facts["base_model"] == ["org/base", "org/a", "org/b"]
    assert facts["base_model_relation"] == "merge"
    assert (facts["license"], facts["license_name"]) == ("other", "licences-of-the-parents")
    assert (facts["library_name"], facts["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"merge", "mediator"} <= set(facts["tags"])
    assert f"| a | [org/a](https://huggingface.co/org/a) | {COMMIT[:12]} |" in shipment.card
    assert "| source | from | licence |" not in shipment.card
    assert "<!-- begin router -->" in shipment.card
    assert 'from_pretrained("org/demo")' in shipment.card
    assert "mediator pull org/demo" in shipment.card
    assert shipment.card.count("assign:") == 1
    assert "b is under cc-by-nc-4.0, not for commercial use; neither is the merge" in shipment.warnings


def test_what_the_author_wrote_into_the_card_stays():
    card = "---\nlicense: mit\nlanguage: de\ntags: [mine]\n---\n# My title\n\nMy words.\n"
    card = with_block(card, "results", "| a |")
    parents = (Parent("base", "org/base", COMMIT, "apache-2.0"), Parent("x", "./x"))
    new = with_facts(with_lineage(card, parents), {**card_facts(parents), "tags": ["merge"]})
    facts = read_facts(new)
    assert (facts["license"], facts["language"], facts["tags"]) == ("mit", "de", ["mine", "merge"])
    assert "license_name" not in facts
    assert facts["base_model"] == ["org/base"]
    assert new.index("# My title") < new.index("My words.") < new.index("begin results") < new.index("begin lineage")
    assert with_facts(with_lineage(new, parents), card_facts(parents)) == new
    with pytest.raises(BundleError):
        read_facts("---\na: [\n---\n")


@pytest.mark.parametrize(
    ("licences", "facts", "warned"),
    [
        ({"a": "MIT", "b": "mit"}, {"license": "mit"}, []),
        ({"a": None, "b": None}, {}, ["no licence is declared by a, b"]),
        ({"a": "mit", "b": None}, {"license": "other"}, ["no licence is declared by b"]),
        ({"a": "apache-2.0", "b": "cc-by-nd-4.0"}, {"license": "other"}, ["b is under cc-by-nd-4.0, which forbids"]),
        ({"a": "llama3.1", "b": "gemma"}, {"license": "other"}, ["licences with terms"]),
        ({"a": "mit", "b": "apache-2.0"}, {"license": "other"}, []),
        ({"a": "gpl-3.0", "b": "mit"}, {"license": "other"}, ["licences with terms"]),
    ],
)
def test_licences_are_never_invented(licences, facts, warned):
    assert {k: v for k, v in licence_facts(licences).items() if k == "license"} == facts
    told = list(licence_warnings(licences))
    assert len(told) == len(warned)
    assert all(text.startswith(start) for text, start in zip(told, warned, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/tmp/b", "https://host/tmp/b"),
        ("s3://bucket/tmp/x", "s3://bucket/tmp/x"),
        ("at /tmp/x/y.", "at y."),
        ("'/tmp/x/y/'", "'y'"),
        ("file:///tmp/x/y", "y"),
        ("C:\\Users\\me\\x", "x"),
        ("../tmp/x and a/tmp/b", "../tmp/x and a/tmp/b"),
        ("/nosuchroot/chat/completions", "/nosuchroot/chat/completions"),
    ],
)
def test_only_paths_of_machines_are_shortened(text, expected):
    assert hidden(text) == expected


def test_public_is_asked_for_and_never_done_by_the_way(place):
    place.push(public=True)
    assert not place.hub.repos[REPO].private
    assert "give --public" in refusal(place.push).hint
    place.hub.repos[REPO].private = True
    pushed = place.push(public=True)
    assert pushed.is_private
    assert "stays so" in pushed.notices[0]


def test_a_branch_is_made_and_pulled(place):
    place.hub.repos[REPO] = Repo(private=True)
    place.hub.commit(REPO, "main", {})
    pushed = place.push(revision="v2")
    assert place.hub.files(REPO) == {}
    assert MANIFEST in place.hub.files(REPO, "v2")
    assert pushed.url.endswith("/org/demo/tree/v2")
    assert pull(f"{REPO}@v2", place.folder / "back").commit == pushed.commit


def test_a_repository_of_somebody_else_s_files_is_refused(place):
    place.hub.repos[REPO] = Repo(private=True)
    place.hub.commit(REPO, "main", {"data.csv": b"1", "README.md": b"mine"})
    problem = refusal(place.push)
    assert "holds 1 files that mediator did not push, such as data.csv" in problem.message
    assert set(place.hub.files(REPO)) == {"data.csv", "README.md"}
    place.push(overwrite=True)
    assert place.hub.files(REPO)["data.csv"] == b"1"


def test_two_pushes_at_once_do_not_mix(place):
    place.push()
    place.manifest(notices=("new",))
    place.hub.faults.append((r"POST /api/models/org/demo/commit", 412, {"X-Error-Message": "A commit has happened"}))
    problem = refusal(place.push)
    assert problem.message == "the repository changed while this was pushed: A commit has happened"


@pytest.mark.parametrize(
    ("prepare", "message", "hint"),
    [
        (lambda hub, patch: patch.delenv("HF_TOKEN"), "you have no token", "hf auth login"),
        (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_wrong"), "does not accept your token", "write access"),
        (lambda hub, patch: hub.writers.clear(), "forbids you to write there: You don't have the rights", "for org"),
        (
            lambda hub, patch: hub.faults.append(
                (r"POST .*/commit/", 403, {"X-Error-Message": "Private repository storage limit reached"})
            ),
            "no room left for you: Private repository storage limit reached",
            "free some there",
        ),
        (lambda hub, patch: hub.ignored.add("config.json"), ".gitignore leaves out config.json", "remove"),
        (
            lambda hub, patch: patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True),
            "HF_HUB_OFFLINE is set",
            "unset it",
        ),
        (
            lambda hub, patch: patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"),
            "the Hub cannot be reached",
            "run the same command again",
        ),
    ],
)
def test_refusals_say_what_to_do(place, monkeypatch, prepare, message, hint):
    prepare(place.hub, monkeypatch)
    problem = refusal(place.push)
    assert (problem.place, message in problem.message, hint in problem.hint) == (REPO, True, True), problem
    assert MANIFEST not in (place.hub.files(REPO) if REPO in place.hub.repos else {})


def test_a_damaged_bundle_is_not_pushed(place):
    (place.bundle / "config.json").write_text("{}")
    problem = refusal(place.push, BundleError)
    assert problem.message == "its bytes are not those that were written"
    assert place.hub.requests == []


def test_a_folder_of_nothing_known_is_refused(place):
    (place.folder / "empty").mkdir()
    (place.folder / "empty" / "notes.txt").write_text("x")
    problem = refusal(lambda: make_shipment(place.folder / "empty", REPO), BundleError)
    assert problem.message == "holds nothing that mediator writes"


def test_links_that_lead_out_are_not_followed(place):
    (place.folder / "secret.safetensors").write_bytes(b"secret")
    adapter = write_adapter(place.folder / "adapter", 1)
    (adapter / "more.safetensors").symlink_to(place.folder / "secret.safetensors")
    assert look_into(adapter).left_out == ("more.safetensors",)
    (place.bundle / "config.json").unlink()
    (place.bundle / "config.json").symlink_to(place.folder / "secret.safetensors")
    assert "leads out" in refusal(lambda: look_into(place.bundle), BundleError).message


def test_adapters_travel_too(place):
    adapter = write_adapter(place.folder / "adapter", 1, base_model_name_or_path=str(place.folder / "base"))
    shipment = make_shipment(adapter, "org/lora")
    assert (shipment.found.kind, shipment.hidden) == ("adapter", ("adapter_config.json",))
    push(shipment)
    pulled = pull("org/lora", place.folder / "back")
    assert pulled.kind == "adapter"
    assert json.loads((place.folder / "back" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    name = "adapter_model.safetensors"
    assert (place.folder / "back" / name).read_bytes() == (adapter / name).read_bytes()
    assert read_facts(shipment.card)["library_name"] == "peft"


def test_an_export_of_several_folders_travels_whole(place):
    folder = place.folder / "export"
    for name in ("a", "b"):
        write_adapter(folder / "adapters" / name, 1)
    (folder / "router").mkdir()
    for name in ("router/router.json", "serve.sh", "llmisvc.yaml", "run.py"):
        (folder / name).write_text("{}")
    (folder / "export.json").write_text(json.dumps({"folder": str(folder)}))
    shipment = make_shipment(folder, "org/export")
    assert (shipment.found.kind, shipment.found.left_out, shipment.hidden) == ("export", ("run.py",), ("export.json",))
    push(shipment)
    assert pull("org/export", place.folder / "back").kind == "export"
    assert (place.folder / "back/adapters/b/adapter_model.safetensors").is_file()
    assert json.loads((place.folder / "back/export.json").read_text()) == {"folder": "export"}


def test_a_pull_that_was_cut_goes_on_where_it_stopped(place):
    place.push()
    place.hub.forget()
    size = (place.bundle / "model.safetensors").stat().st_size
    place.hub.cuts += [size // 2, 0, 0, 0, 0]
    refusal(lambda: pull(REPO, place.folder / "back"), CheckpointError)
    assert not (place.folder / "back").exists()
    place.hub.cuts.clear()
    pull(REPO, place.folder / "back")
    weights = sum(file.stat().st_size for file in place.bundle.rglob("*.safetensors"))
    assert place.hub.weight_bytes() == weights
    assert sorted(path.name for path in place.folder.iterdir()) == ["back", "cache", "out"]


def test_a_pull_does_not_replace_what_stands_there(place):
    place.push()
    (place.folder / "back").mkdir()
    (place.folder / "back" / "mine.txt").write_text("x")
    assert refusal(lambda: pull(REPO, place.folder / "back")).message == "exists"
    problem = refusal(lambda: pull(REPO, place.folder / "back", overwrite=True))
    assert "not a bundle" in problem.message
    pull(REPO, place.folder / "two")
    pull(REPO, place.folder / "two", overwrite=True)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", ".git/hooks/post-checkout", "a\\..\\evil"])
def test_a_manifest_that_names_files_elsewhere_is_refused(place, name):
    place.push()
    files = dict(place.hub.files(REPO))
    data = json.loads(files[MANIFEST])
    data["files"].append({"name": name, "bytes": 1, "sha256": "0" * 64})
    place.hub.commit(REPO, "main", {**files, MANIFEST: json.dumps(data).encode(), name: b"x"})
    problem = refusal(lambda: pull(REPO, place.folder / "back"), BundleError)
    assert problem.hint == "do not use this bundle"
    assert problem.place.startswith(REPO)
    assert sorted(path.name for path in place.folder.iterdir()) == ["cache", "out"]


def test_a_bundle_that_was_damaged_on_the_hub_is_not_kept(place):
    place.push()
    files = dict(place.hub.files(REPO))
    place.hub.commit(REPO, "main", {**files, "config.json": b"{}"})
    problem = refusal(lambda: pull(REPO, place.folder / "back"), BundleError)
    assert problem.message == "its bytes are not those that were written"
    place.hub.commit(REPO, "main", {name: data for name, data in files.items() if name != "router.safetensors"})
    refusal(lambda: pull(REPO, place.folder / "back"), CheckpointError)
    assert sorted(path.name for path in place.folder.iterdir()) == ["cache", "out"]


def test_a_bundle_in_the_cache_is_a_bundle_like_any_other(place):
    pushed = place.push()
    pulled = pull(REPO, None)
    assert pulled.folder == place.folder / "cache" / "models--org--demo" / "snapshots" / pushed.commit
    assert not verify_bundle(pulled.folder).problems
    place.hub.forget()
    assert pull(REPO, None, offline=True).folder == pulled.folder
    assert pull(REPO, place.folder / "back", offline=True).kind == "bundle"
    assert place.hub.requests == []


def test_the_command_line_says_what_it_did_and_shows_no_token(place, mediator, capsys):
    run = mediator("push", place.bundle, REPO, "--dry-run", "--json")
    plan = json.loads(run.out)
    assert (run.code, plan["private"], plan["files"][-1]["name"]) == (0, True, MANIFEST)
    assert place.hub.requests == []
    run = mediator("push", place.bundle, REPO)
    assert run.code == 0, run.err
    assert "Next: mediator pull org/demo" in run.out
    assert "private" in run.out
    pulled = mediator("pull", REPO)
    assert pulled.code == 0, pulled.err
    assert "Next: mediator generate demo" in pulled.out
    shown = "".join((run.out, run.err, pulled.out, pulled.err))
    stored = b"".join(p.read_bytes() for p in place.folder.rglob("*") if p.is_file())
    assert TOKEN not in shown
    assert TOKEN.encode() not in stored
    assert TOKEN.encode() not in b"".join(place.hub.files(REPO).values())
    assert not [r for r in place.hub.requests if r.server == "cdn" and r.has_token]
    assert mediator("pull", "no/such").code == 2
    assert mediator("push", place.bundle, "noname").code == 2
