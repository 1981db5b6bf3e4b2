"""A small Hugging Face Hub on loopback: API, resolve addresses, a CDN of another origin, ranges, all its refusals.

It takes pushes too: repositories and branches made, uploads to a store of large files, commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

TOKEN = "hf_loopbackSecretToken0123456789"
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/?]+)(/revision/(?P<revision>[^/?]+))?(\?.*)?$")
_COLLECTION = re.compile(r"/api/collections/(?P<slug>[^/]+/[^/?]+)$")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)$")
_PREUPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/?]+)$")
_COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/?]+)$")
_BRANCH = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/?]+)$")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch$")
_CDN = re.compile(r"/cdn/(?P<repo>[^/]+/[^/]+)/(?P<commit>[^/]+)/(?P<name>.+)$")


@dataclass(frozen=True)
class Request:
    """What came in: at the hub or its CDN, which path, which range, whether a token came along."""

    server: str
    method: str
    path: str
    range: str | None
    has_token: bool


@dataclass
class Repo:
    """One repository: its files by commit, and what its branches and tags mean."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


@dataclass
class LoopbackHub:
    """The hub's state and what it was asked.

    `cuts` are bytes after which bodies of weights break off, `faults` are (pattern of `METHOD /path`, status, headers);
    both are used up one by one. `collections` are kind and id of their items, by slug.
    """

    url: str = ""
    cdn: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    collections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    faults: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    knows_ranges: bool = True
    bad_tokens: bool = False
    nonsense: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, as pushes bring them."""
    uploads: list[str] = field(default_factory=list)
    """The SHA-256 of each large file that came whole, in order."""
    upload_limit: int | None = None
    """Bytes of large files after which connections break off."""
    writers: set[str] = field(default_factory=lambda: {"org"})
    """Owners for whom the token may write."""
    ignored: set[str] = field(default_factory=set)
    """Names that a .gitignore leaves out."""
    messages: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repo_id: str, folder: Path, *refs: str, gated: bool = False, private: bool = False) -> str:
        """Put a folder up as a new commit, which the refs, default `main`, mean from now on."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo = self.repos.setdefault(repo_id, Repo())
        repo.gated, repo.private = gated, private
        repo.commits[commit] = files
        repo.refs |= dict.fromkeys(refs or ("main",), commit)
        return commit

    def weight_bytes(self) -> int:
        """Count the bytes of weights that were served."""
        return sum(n for path, n in self.served.items() if path.endswith((".safetensors", ".bin", ".gguf")))

    def forget(self) -> None:
        """Forget what was asked, served and uploaded; what is stored stays."""
        self.requests.clear()
        self.served.clear()
        self.uploads.clear()

    def commit(self, repo_id: str, revision: str, files: dict[str, bytes]) -> str:
        """Make a commit of these files, which the branch means from now on."""
        repo = self.repos[repo_id]
        commit = hashlib.sha1(repr((len(repo.commits), sorted(files.items()))).encode()).hexdigest()
        repo.commits[commit] = files
        repo.refs[revision] = commit
        return commit

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Give the files that a branch of a repository has."""
        repo = self.repos[repo_id]
        return repo.commits[repo.refs[revision]]


def _etag(name: str, data: bytes) -> str:
    if name.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    place: str
    protocol_version = "HTTP/1.1"
    # Head and body are two packets; without this the second waits for 40 ms.
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        token = self.headers.get("Authorization")
        with self.hub.lock:
            self.hub.requests.append(
                Request(self.place, method, self.path, self.headers.get("Range"), token is not None)
            )
            fault = next((f for f in self.hub.faults if re.search(f[0], f"{method} {self.path}")), None)
            if fault:
                self.hub.faults.remove(fault)
        if fault:
            return self.refuse(fault[1], fault[2])
        if self.place == "cdn":
            match = _CDN.match(unquote(self.path))
            return self.send_file(method, self.hub.repos[match["repo"]].commits[match["commit"]], match["name"])
        if self.hub.bad_tokens and token:
            return self.refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        return self.serve(method, token)

    def do_POST(self) -> None:
        self.take("POST")

    def do_PUT(self) -> None:
        self.take("PUT")

    def take(self, method: str) -> None:
        """Answer a request that brings a body."""
        token, size = self.headers.get("Authorization"), int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            self.hub.requests.append(Request(self.place, method, self.path, None, token is not None))
            fault = next((f for f in self.hub.faults if re.search(f[0], f"{method} {self.path}")), None)
            if fault:
                self.hub.faults.remove(fault)
        if self.place == "cdn":
            return self.store(size)
        body = self.rfile.read(size)
        if fault:
            return self.refuse(fault[1], fault[2])
        if self.hub.bad_tokens or token != f"Bearer {TOKEN}":
            return self.refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        return self.write(unquote(self.path), body)

    def store(self, size: int) -> None:
        """Take a large file, at its signed address; break off where the limit is reached."""
        with self.hub.lock:
            left = self.hub.upload_limit
            if left is not None:
                self.hub.upload_limit = max(0, left - size)
        body = self.rfile.read(size if left is None else min(size, left))
        if len(body) < size:
            self.close_connection = True
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        with self.hub.lock:
            self.hub.objects[oid] = body
            self.hub.uploads.append(oid)
        self.send(200, {"ETag": '"x"'}, b"", "PUT")

    def write(self, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            return self.send_json({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        matches = ((pattern.match(path), answer) for pattern, answer in self.answers())
        match, answer = next((found for found in matches if found[0]), (None, None))
        if match is None or answer is None or match["repo"] not in self.hub.repos:
            return self.refuse(404, {"X-Error-Code": "RepoNotFound"})
        if match["repo"].split("/")[0] not in self.hub.writers:
            return self.refuse(403, {"X-Error-Message": "You don't have the rights to write here"})
        return answer(match, body)

    def answers(self):
        return (
            (_PREUPLOAD, self.preupload), (_BATCH, self.batch), (_COMMIT, self.take_commit), (_BRANCH, self.branch),
        )  # fmt: skip

    def create(self, asked: dict[str, str]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.hub.repos:
            return self.refuse(409, {})
        if asked["organization"] not in self.hub.writers:
            return self.refuse(403, {"X-Error-Message": "You don't have the rights to create a model here"})
        self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.send_json({"url": f"{self.hub.url}/{repo_id}"})

    def branch(self, match: re.Match[str], body: bytes) -> None:
        refs = self.hub.repos[match["repo"]].refs
        refs[match["revision"]] = refs["main"]
        self.send_json({})

    def preupload(self, match: re.Match[str], body: bytes) -> None:
        there = self.hub.files(match["repo"], match["revision"])
        rows = []
        for name in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if name.endswith(".safetensors") else "regular"
            oid = _etag(name, there[name]) if name in there else None
            rows.append({"path": name, "uploadMode": mode, "shouldIgnore": name in self.hub.ignored, "oid": oid})
        self.send_json({"files": rows})

    def batch(self, match: re.Match[str], body: bytes) -> None:
        rows = json.loads(body)["objects"]
        for row in rows:
            if row["oid"] not in self.hub.objects:
                row["actions"] = {"upload": {"href": f"{self.hub.cdn}/upload/{row['oid']}"}}
        self.send_json({"transfer": "basic", "objects": rows})

    def take_commit(self, match: re.Match[str], body: bytes) -> None:
        head, *operations = (json.loads(line) for line in body.splitlines())
        repo = self.hub.repos[match["repo"]]
        if head["value"].get("parentCommit", repo.refs[match["revision"]]) != repo.refs[match["revision"]]:
            return self.refuse(412, {"X-Error-Message": "A commit has happened since."})
        files = dict(self.hub.files(match["repo"], match["revision"]))
        for operation in operations:
            name = operation["value"]["path"]
            if operation["key"] == "deletedFile":
                del files[name]
            elif operation["key"] == "lfsFile":
                files[name] = self.hub.objects[operation["value"]["oid"]]
            else:
                files[name] = base64.b64decode(operation["value"]["content"])
        with self.hub.lock:
            commit = self.hub.commit(match["repo"], match["revision"], files)
            self.hub.messages.append(head["value"]["summary"])
        url = f"{self.hub.url}/{match['repo']}/commit/{commit}"
        return self.send_json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": ""})

    def serve(self, method: str, token: str | None) -> None:
        if self.hub.nonsense:
            return self.send(200, {"Content-Type": "application/json"}, self.hub.nonsense.encode(), method)
        if listed := _COLLECTION.match(self.path):
            return self.send_collection(listed["slug"])
        match = _API.match(self.path) or _RESOLVE.match(self.path)
        repo = self.hub.repos.get(match["repo"]) if match else None
        if repo is None or (repo.private and token != f"Bearer {TOKEN}"):
            return self.refuse(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
        revision = unquote(match["revision"] or "main")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
        if "name" not in match.groupdict():
            return self.send_json(self.info(match["repo"], repo, commit))
        if repo.gated and token != f"Bearer {TOKEN}":
            return self.refuse(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        return self.resolve(method, match["repo"], repo, commit, unquote(match["name"]))

    def info(self, repo_id: str, repo: Repo, commit: str) -> dict[str, object]:
        siblings: list[dict[str, object]] = []
        for name, data in repo.commits[commit].items():
            lfs = {"lfs": {"size": len(data), "sha256": _etag(name, data), "pointerSize": 130}}
            row = {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            siblings.append(row | (lfs if name.endswith(".safetensors") else {}))
        return {"id": repo_id, "sha": commit, "siblings": siblings, "private": repo.private, "tags": []}

    def send_collection(self, slug: str) -> None:
        if slug not in self.hub.collections:
            return self.refuse(404, {})
        items = [
            {"_id": f"{n:024x}", "id": name, "type": kind, "position": n}
            for n, (kind, name) in enumerate(self.hub.collections[slug])
        ]
        facts = {"slug": slug, "title": "t", "owner": {"name": "org"}, "items": items, "private": False}
        numbers = {"lastUpdated": "2026-01-02T03:04:05.000Z", "position": 0, "upvotes": 0}
        return self.send_json(facts | numbers | {"theme": "green"})

    def resolve(self, method: str, repo_id: str, repo: Repo, commit: str, name: str) -> None:
        data = repo.commits[commit].get(name)
        if data is None:
            return self.refuse(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if not name.endswith(".safetensors"):
            return self.send_file(method, repo.commits[commit], name, {"X-Repo-Commit": commit})
        facts = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{_etag(name, data)}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.cdn}/cdn/{repo_id}/{commit}/{name}",
        }
        return self.send(302, facts, b"", method)

    def send_file(self, method: str, files: dict[str, bytes], name: str, facts: dict[str, str] | None = None) -> None:
        data, headers, status = files[name], {"ETag": f'"{_etag(name, files[name])}"', **(facts or {})}, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and self.hub.knows_ranges:
            start, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
            data, status = data[start : last + 1], 206
        self.send(status, headers, data, method, name)

    def send_json(self, data: object) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(data).encode(), "GET")

    def refuse(self, status: int, headers: dict[str, str]) -> None:
        self.send(status, headers, b"", self.command)

    def send(self, status: int, headers: dict[str, str], data: bytes, method: str, name: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if method == "HEAD":
            return
        with self.hub.lock:
            # Only bodies of weight files are cut, so that a test knows which request it hits.
            is_cut = self.hub.cuts and name.endswith(".safetensors") and len(data) > self.hub.cuts[0]
            cut = self.hub.cuts.pop(0) if is_cut else None
            body = data if cut is None else data[:cut]
            self.hub.served[name] = self.hub.served.get(name, 0) + len(body)
        self.wfile.write(body)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that has read enough goes away."""


@contextmanager
def serving() -> Iterator[LoopbackHub]:
    """Serve a hub and its CDN on two ports of loopback."""
    hub = LoopbackHub()
    kinds = [type("Handler", (_Handler,), {"hub": hub, "place": place}) for place in ("hub", "cdn")]
    servers = [_Server(("127.0.0.1", 0), kind) for kind in kinds]
    # Another name of the same machine, so that the CDN is another host, as it is for the real Hub.
    hub.url, hub.cdn = (
        f"http://{name}:{s.server_port}" for name, s in zip(("127.0.0.1", "localhost"), servers, strict=True)
    )
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def joined(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[LoopbackHub]:
    """Serve a hub that huggingface_hub takes for the real one, with an empty cache, no token and no waiting."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Xet's own servers are not part of this hub; without them large files go to its store as they are.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("mediator_cli.checkpoint.hub.files.WAITS", (0.0, 0.0))
        yield hub
