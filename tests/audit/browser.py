"""A headless Chromium, spoken to over its DevTools pipe: what a page asks for, what its console says, how it looks."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name)) is not None), None)
TIMEOUT = 120.0
_COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


@dataclass(kw_only=True)
class Visit:
    """What became of a page: addresses that it asked for, console entries, and answers to the scripts that were run."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)


def visit(
    page: Path,
    *scripts: str,
    folder: Path,
    width: int = 1280,
    dark: bool = False,
    screenshot: Path | None = None,
) -> Visit:
    """Open a page without a network, and run scripts in it.

    Args:
        page: the file.
        scripts: JavaScript expressions, evaluated one after the other.
        folder: for the browser's profile.
        width: of the window, CSS pixels.
        dark: whether the reader prefers dark pages.
        screenshot: PNG file for the whole page.

    Returns:
        What happened.
    """
    to_browser, own_end = os.pipe()
    from_own, from_browser = os.pipe()
    fds = {3: to_browser, 4: from_browser}
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    command += ["--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}"]
    # The browser expects the pipe at file descriptors 3 and 4.
    shell = f'exec "$@" 3<&{fds[3]} 4>&{fds[4]}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        pass_fds=tuple(fds.values()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in fds.values():
        os.close(end)
    try:
        return _visit(_Pipe(own_end, from_own), page, scripts, width, dark, screenshot)
    finally:
        os.close(own_end)
        os.close(from_own)
        process.kill()
        process.wait()


class _Pipe:
    """Requests and events, as JSON that NUL ends."""

    def __init__(self, write: int, read: int) -> None:
        self.write, self.read = write, read
        self.buffer = b""
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        self.sent = 0

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.receive())

    def receive(self) -> dict[str, Any]:
        limit = time.monotonic() + TIMEOUT
        while b"\0" not in self.buffer:
            ready, _, _ = select([self.read], [], [], max(limit - time.monotonic(), 0.0))
            data = os.read(self.read, 1 << 20) if ready else b""
            assert data, "the browser went away, or does not answer"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)


def _visit(pipe: _Pipe, page: Path, scripts: tuple[str, ...], width: int, dark: bool, screenshot: Path | None) -> Visit:
    target = pipe.ask("Target.createTarget", url="about:blank")["targetId"]
    pipe.session = pipe.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Network", "Runtime", "Log"):
        pipe.ask(f"{domain}.enable")
    pipe.ask("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    pipe.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    pipe.ask("Emulation.setEmulatedMedia", features=[scheme])
    pipe.ask("Page.navigate", url=page.resolve().as_uri())
    pipe.wait_for("Page.loadEventFired")
    found = Visit()
    for script in scripts:
        answer = pipe.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        found.answers.append(answer["result"].get("value"))
    if screenshot is not None:
        image = pipe.ask("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        screenshot.write_bytes(base64.b64decode(image["data"]))
    for event in pipe.events:
        if event["method"] == "Network.requestWillBeSent":
            found.requests.append(event["params"]["request"]["url"])
        elif event["method"] in _COMPLAINTS:
            found.complaints.append(json.dumps(event["params"]))
    return found
