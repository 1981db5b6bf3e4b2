"""`mediator serve`: what it refuses before it begins, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import Run

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.cli import serve as command
from mediator_cli.errors import BundleError
from mediator_cli.runtime.wanted import read_mixture, wanted_of
from mediator_cli.serve.api.gate import Access
from mediator_cli.serve.listen import bind

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("words", "place", "message"),
    [
        (("--max-body", "big"), "--max-body", "'big' is not a size"),
        (("--cache", "-1"), "--cache", "'-1' is not a size"),
        (("--api-key-file", "nowhere"), "--api-key-file", "cannot read nowhere"),
        (("--allow-origin", "friend.example"), "--allow-origin", "'friend.example' is no origin"),
        (("--allow-origin", "http://friend.example/a"), "--allow-origin", "is no origin"),
        (("--combine", "sums"), "--combine", "no way 'sums'"),
        (("--port", "70000"), "--port", "70000 is no port"),
        (("--host", "nowhere.invalid"), "--port", "cannot listen at nowhere.invalid:8000"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(
    routed: Path, mediator: Callable[..., Run], words: tuple[str, ...], place: str, message: str
) -> None:
    run = mediator("serve", "out", *words)
    assert run.code == 2
    assert f"error: {place}: " in run.err
    assert message in run.err
    assert run.out == ""


@pytest.fixture(autouse=True)
def _never_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that should be refused must not serve for ever."""

    def refuse(*given: object) -> None:
        raise AssertionError(given)

    monkeypatch.setattr(command, "_opened", refuse)


def test_a_taken_port_a_strange_folder_and_a_pin_without_router(
    routed: Path, mediator: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mediator("serve", "base").code == 2
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        run = mediator("serve", "out", "--port", sock.getsockname()[1])
    assert (run.code, "already in use" in run.err) == (2, True)
    whole = read_manifest(routed)
    monkeypatch.setattr(
        "mediator_cli.bundle.manifest.read_manifest", lambda _: whole.model_copy(update={"router": None})
    )
    run = mediator("serve", "out", "--pin")
    assert (run.code, "--pin: there is no router that decides once" in run.err) == (2, True)


@pytest.mark.parametrize("text", ["", " \n", "two words", "clé"])
def test_a_key_is_one_word_of_ascii(routed: Path, mediator: Callable[..., Run], text: str) -> None:
    Path("key.txt").write_text(text)
    run = mediator("serve", "out", "--api-key-file", "key.txt")
    assert (run.code, "holds no key" in run.err) == (2, True)
    assert text.strip() not in run.err or not text.strip()


def test_the_key_comes_from_a_file_or_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
    assert command._api_key(None) is None
    monkeypatch.setenv(command.KEY_VARIABLE, "from-environment")
    assert command._api_key(None) == "from-environment"
    (tmp_path / "key").write_text("from-file\n")
    assert command._api_key(tmp_path / "key") == "from-file"


def test_log_lines_are_for_people_or_for_programs() -> None:
    access = Access("id-1", "POST", CHAT, 200, 12.6, "auto", "maths=0.75,films=0.25")
    assert command._line(access)[25:] == f"POST {CHAT} 200 13 ms auto [maths=0.75,films=0.25]"
    assert command._line(Access("id-2", "GET", "/health", 200, 0.4))[25:] == "GET /health 200 0 ms"
    line = json.loads(command._json_line(access))
    assert (line["request_id"], line["status"], line["mixture"]) == ("id-1", 200, "maths=0.75,films=0.25")


def test_mixtures_are_read_alike_everywhere(routed: Path) -> None:
    assert read_mixture(" a = 0.5,b=-1e-3 ", "here", ("a", "b")) == {"a": 0.5, "b": -0.001}
    for text, message in (("a", "is not NAME=WEIGHT"), ("a=inf", "is not NAME"), ("a=1,a=2", "twice"), ("c=1", "'c'")):
        with pytest.raises(BundleError, match=message):
            read_mixture(text, "here", ("a", "b"))
    assert wanted_of(routed, None, "a=1") == {"a": 1.0}
    assert wanted_of(routed, None, None) is None
    assert read_manifest(routed).router is not None


@contextmanager
def started(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Start the command; give the process, its URL and the lines it printed until it was ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mediator_cli", "serve", *words, "--port", "0"], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    lines: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if line.startswith("try: "):
                break
        url = next(line for line in lines if "chat page at" in line).rsplit(" ", 1)[1]
        yield process, url, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        process.stderr.close()  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish_refuses_new_ones_and_ends_with_zero(routed: Path, number: int) -> None:
    body = {"model": "a", "messages": [{"role": "user", "content": "two"}], "stream": True, "ignore_eos": True}
    with started(str(routed), "--rows", "2") as (process, url, lines), httpx.Client(base_url=url, timeout=60) as client:
        assert lines[-2] == "models: auto, a, b, dense"
        with client.stream("POST", CHAT, json=body | {"max_tokens": 2000}) as reply:
            parts = reply.iter_text()
            next(parts)
            process.send_signal(number)
            end = time.monotonic() + 20
            while (health := httpx.get(f"{url}/health", timeout=5)).status_code == 200:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert health.json()["status"] == "draining"
            refused = httpx.post(f"{url}{CHAT}", json=body | {"stream": False}, timeout=5)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            text = "".join(parts)
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text
        assert process.wait(30) == 0


@pytest.mark.slow
def test_after_the_grace_answers_are_broken_off_and_said_to_be(routed: Path) -> None:
    body = {"model": "a", "messages": [{"role": "user", "content": "two"}], "stream": True, "ignore_eos": True}
    with started(str(routed), "--grace", "0.2") as (process, url, _), httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", CHAT, json=body | {"max_tokens": 2000}) as reply:
            parts = reply.iter_text()
            next(parts)
            process.send_signal(signal.SIGTERM)
            text = "".join(parts)
        assert '"code":"draining"' in text
        assert process.wait(30) == 0


@pytest.mark.slow
def test_a_key_from_the_environment_locks_and_an_open_door_is_warned_of(routed: Path) -> None:
    with started(str(routed), MEDIATOR_API_KEY="sesame") as (_, url, lines):
        assert httpx.get(f"{url}/v1/models", timeout=20).status_code == 401
        good = httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer sesame"}, timeout=20)
        assert good.status_code == 200
        assert "sesame" not in "\n".join(lines)
        assert "$MEDIATOR_API_KEY" in lines[-1]
    with started(str(routed), "--host", "0.0.0.0", MEDIATOR_API_KEY="") as (_, _, lines):
        assert "warning: anybody on the network can use this server" in lines[0]
