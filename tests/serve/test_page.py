"""The chat page in a real browser."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from chromium import CHROMIUM, Browser, browsing
from fake_engine import FakeEngine, serving
from tiny_tokens import WORDS

from mediator_cli.errors import Problem
from mediator_cli.serve.engine.request import Failed

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


def test_the_page_loads_nothing_and_runs_nothing_but_itself() -> None:
    with serving(FakeEngine()) as server:
        reply = server.client.get("/")
    policy = reply.headers["content-security-policy"]
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2
    for trap in ("innerHTML", "http://", "https://", "eval(", "localStorage", "sessionStorage", "document.cookie"):
        assert trap not in reply.text
    assert " style=" not in reply.text
    assert " onclick=" not in reply.text


def say(page: Browser, text: str) -> None:
    page.run("document.getElementById('text').focus()")
    page.type(text)
    page.key("Enter", 13, "\r")


def is_idle(page: Browser, n_answers: int) -> None:
    page.until(f"document.querySelectorAll('.assistant .speed').length === {n_answers} && !running")


def faults(page: Browser) -> list[dict]:
    return [
        event for event in page.events
        if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
        and event["params"].get("entry", {}).get("level") not in ("info", "verbose")
    ]  # fmt: skip


@pytest.mark.slow
@needs_browser
def test_a_conversation_by_keyboard_shows_who_answered_and_how_sure_the_router_was(tmp_path: Path) -> None:
    engine = FakeEngine()
    with serving(engine) as server, browsing(server.url, tmp_path) as page:
        page.until("document.querySelectorAll('#model option').length === 4")
        assert page.run("document.title") == "tales · mediator"
        assert page.run("document.activeElement.id") == "text"
        page.run("document.getElementById('most').value = 3")
        say(page, "two plus three")
        is_idle(page, 1)
        assert page.run("document.querySelector('.user .text').textContent") == "two plus three"
        assert page.run("document.querySelector('.assistant .text').textContent") == " <|bot|> three plus"
        shown = page.run("[...document.querySelectorAll('.mixture li')].map((row) => row.innerText.split('\\n'))")
        assert shown == [["films", "75 %"], ["maths", "25 %"]]
        widths = page.run("[...document.querySelectorAll('.mixture .rail div')].map((bar) => bar.style.width)")
        assert widths == ["75%", "25%"]
        sure = page.run("document.querySelector('.sure').textContent")
        assert sure == "This is unlike anything the router has seen (uncertainty 0.13)."
        assert "3 tokens" in page.run("document.querySelector('.speed').textContent")
        page.run("document.getElementById('pin').checked = true")
        say(page, "film")
        is_idle(page, 2)
        second = engine.tickets[-1].request
        assert [WORDS[token] for token in second.prompt].count("<|user|>") == 2
        assert second.route_on == (3, 5, 7, 6, 4)
        page.run("document.getElementById('model').value = 'films'")
        say(page, "plot")
        is_idle(page, 3)
        assert page.run("[...document.querySelectorAll('.sure')].at(-1).textContent") == "Chosen by you."
        page.run("document.getElementById('new').click()")
        assert page.run("turns.length === 0 && document.querySelectorAll('article').length === 0")
        assert faults(page) == []


@pytest.mark.slow
@needs_browser
def test_stop_errors_and_what_a_user_writes(tmp_path: Path) -> None:
    engine = FakeEngine(hold=threading.Event())
    with serving(engine) as server, browsing(server.url, tmp_path) as page:
        page.until("document.querySelectorAll('#model option').length === 4")
        say(page, "<img src=x onerror=alert(1)> two")
        page.until("document.querySelector('.assistant .text')?.textContent.length > 0")
        page.key("Escape", 27)
        page.until("!running")
        assert engine.tickets[0].cancelled.wait(10)
        told = page.run("document.querySelector('.told').innerText")
        assert "The router was fairly sure (uncertainty 0.13)." in told
        assert "Stopped." in told
        assert page.run("document.querySelectorAll('img').length") == 0
        assert page.run("document.querySelector('.user .text').textContent") == "<img src=x onerror=alert(1)> two"
        engine.hold, engine.fails = None, Failed(Problem("", "the model failed"), is_ours=True)
        say(page, "film")
        page.until("document.querySelector('[role=alert]') !== null")
        assert page.run("document.querySelector('[role=alert]').textContent") == "No answer: the model failed"
        assert page.run("document.getElementById('text').value") == "film"
        assert page.run("turns.length") == 2


@pytest.mark.slow
@needs_browser
def test_the_key_is_asked_for_and_kept_in_memory_alone(tmp_path: Path) -> None:
    with serving(FakeEngine(), api_key="sesame") as server, browsing(server.url, tmp_path) as page:
        page.until("!document.getElementById('key-box').hidden")
        assert page.run("document.querySelectorAll('#model option').length") == 0
        page.run("document.getElementById('key').focus()")
        page.type("wrong")
        page.run("document.getElementById('key').blur()")
        page.until("document.getElementById('state').textContent === 'wrong API key'")
        page.run("document.getElementById('key').value = ''; document.getElementById('key').focus()")
        page.type("sesame")
        page.run("document.getElementById('key').blur()")
        page.until("document.querySelectorAll('#model option').length === 4")
        page.run("document.getElementById('most').value = 2")
        say(page, "two")
        is_idle(page, 1)
        assert page.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0


@pytest.mark.slow
@needs_browser
def test_every_control_has_a_name_and_the_page_fits_a_telephone(tmp_path: Path) -> None:
    with serving(FakeEngine()) as server, browsing(server.url, tmp_path) as page:
        page.until("document.querySelectorAll('#model option').length === 4")
        say(page, "two plus three " * 5)
        is_idle(page, 1)
        nodes = page.send("Accessibility.getFullAXTree")["nodes"]
        controls = [
            node for node in nodes
            if node.get("role", {}).get("value") in ("button", "combobox", "textbox", "checkbox", "spinbutton", "list")
        ]  # fmt: skip
        assert len(controls) >= 6
        assert [node for node in controls if not node.get("name", {}).get("value")] == []
        page.shot(tmp_path / "narrow.png", 360, 640)
        assert page.run("document.documentElement.scrollWidth") == 360
