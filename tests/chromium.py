"""A headless Chromium, driven over a pipe: no driver to install, no port to find."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


@dataclass
class Browser:
    """One page; commands of the DevTools protocol go out as JSON that ends with a zero byte."""

    out: int
    replies: dict[int, dict] = field(default_factory=dict)
    events: list[dict] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    session: str | None = None
    n_sent: int = 0

    def send(self, method: str, **params: Any) -> dict:
        """Send a command and wait for its reply."""
        self.n_sent += 1
        number = self.n_sent
        message = {"id": number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        with self.changed:
            assert self.changed.wait_for(lambda: number in self.replies, 30), method
        reply = self.replies.pop(number)
        assert "error" not in reply, reply
        return reply["result"]

    def listen(self, source: int) -> None:
        held = b""
        with suppress(OSError):
            while data := os.read(source, 1 << 16):
                *whole, held = (held + data).split(b"\0")
                with self.changed:
                    for message in map(json.loads, whole):
                        if "id" in message:
                            self.replies[message["id"]] = message
                        else:
                            self.events.append(message)
                    self.changed.notify_all()

    def run(self, script: str) -> Any:
        """Run a script in the page and give its value."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30) -> Any:
        """Wait until a script gives something true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never: {script}: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def key(self, name: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """Press a key."""
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self.send("Input.insertText", text=text)

    def shot(self, file: Path, width: int, height: int, *, dark: bool = False) -> None:
        """Write what the page looks like."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextmanager
def browsing(url: str, folder: Path) -> Iterator[Browser]:
    """Open a page in a browser with an empty profile."""
    assert CHROMIUM is not None
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()

    def pipes() -> None:
        # Chromium reads commands from descriptor 3 and writes to 4.
        one, two = os.dup(in_read), os.dup(out_write)
        os.dup2(one, 3)
        os.dup2(two, 4)

    words = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        words, preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(in_read)
    os.close(out_write)
    browser = Browser(in_write)
    listener = threading.Thread(target=browser.listen, args=(out_read,), daemon=True)
    listener.start()
    try:
        made = browser.send("Target.createTarget", url="about:blank")
        browser.session = browser.send("Target.attachToTarget", targetId=made["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser.send(f"{domain}.enable")
        browser.send("Page.navigate", url=url)
        browser.until("location.protocol === 'http:' && document.readyState === 'complete'")
        yield browser
    finally:
        os.close(in_write)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        listener.join(10)
        os.close(out_read)
