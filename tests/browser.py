"""A headless Chromium for the tests of pages: spoken to over a pipe, so that no port and no driver is needed.

with Browser.start() as browser:
    page = browser.open(path, width=390)
    page.requests, page.errors, page.run("document.title"), page.screenshot()
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE_S = 120.0


def find_chromium() -> str:
    """The browser's command; skips the test where there is none."""
    found = next((path for path in map(shutil.which, NAMES) if path is not None), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return found


def axe_source() -> str:
    """The script of axe-core, from FEDHYPEVAE_AXE or from npm's registry by its client; skips where there is none."""
    known = os.environ.get("FEDHYPEVAE_AXE")
    if known is not None:
        return Path(known).read_text(encoding="utf-8")
    if shutil.which("npm") is None:
        pytest.skip("no axe-core: install npm, or name axe.min.js in FEDHYPEVAE_AXE")
    cache = Path(tempfile.gettempdir()) / f"fedhypevae-axe-{os.getuid()}"
    script = cache / "node_modules" / "axe-core" / "axe.min.js"
    if not script.is_file():
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(cache), "axe-core@4"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, check=False, timeout=60)
    if not script.is_file():
        pytest.skip("axe-core can't be had from npm here: name axe.min.js in FEDHYPEVAE_AXE")
    return script.read_text(encoding="utf-8")


@dataclass
class Page:
    """An open page, and what it did."""

    browser: Browser
    session: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.browser.call(
            "Runtime.evaluate", self.session, expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def screenshot(self) -> NDArray[np.uint8]:
        """The whole page as pixels (h, w, 3)."""
        answer = self.browser.call("Page.captureScreenshot", self.session, format="png", captureBeyondViewport=True)
        with Image.open(io.BytesIO(base64.b64decode(answer["data"]))) as image:
            return np.asarray(image.convert("RGB"))

    def boxes(self, selector: str) -> list[tuple[int, int, int, int]]:
        """Left, top, right, bottom of the elements, in pixels of the screenshot."""
        script = (
            f"[...document.querySelectorAll({json.dumps(selector)})].map(e => {{ const b = e.getBoundingClientRect();"
            " return [b.left + scrollX, b.top + scrollY, b.right + scrollX, b.bottom + scrollY].map(Math.round); })"
        )
        return [tuple(box) for box in self.run(script)]


class Browser:
    """One Chromium process."""

    def __init__(self, process: subprocess.Popen[bytes], out: int, into: int) -> None:
        self._process, self._out, self._into = process, out, into
        self._buffer, self._number = b"", 0
        self._pages: dict[str, Page] = {}
        self._loaded: set[str] = set()

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Browser]:
        """Start it with an empty profile; every way to a network is closed."""
        read_commands, write_commands = os.pipe()
        read_answers, write_answers = os.pipe()
        with tempfile.TemporaryDirectory() as profile:
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
            flags += ["--no-first-run", "--disable-extensions", "--disable-background-networking"]
            flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
            shell = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
            process = subprocess.Popen(
                ["bash", "-c", shell, "bash", find_chromium(), *flags],
                pass_fds=(read_commands, write_answers),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            os.close(read_commands)
            os.close(write_answers)
            browser = cls(process, write_commands, read_answers)
            try:
                yield browser
            finally:
                with contextlib.suppress(OSError, RuntimeError):
                    browser.call("Browser.close")
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                os.close(write_commands)
                os.close(read_answers)

    def open(self, path: Path, width: int, height: int = 900) -> Page:
        """Open a file and wait until it is drawn."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        self.call("Page.navigate", session, url=path.resolve().as_uri())
        end = time.monotonic() + _PATIENCE_S
        while session not in self._loaded and time.monotonic() < end:
            self._take(self._read(end))
        return page

    def call(self, method: str, session: str | None = None, /, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._number += 1
        number, message = self._number, {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._send(json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _PATIENCE_S
        while True:
            answer = self._read(end)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._take(answer)

    def _send(self, content: bytes) -> None:
        while content:
            content = content[os.write(self._out, content) :]

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._into], [], [], max(end - time.monotonic(), 0.0))
            chunk = os.read(self._into, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("Chromium does not answer")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _take(self, event: dict[str, Any]) -> None:
        """Note what a page did."""
        page, method, values = self._pages.get(event.get("sessionId", "")), event.get("method"), event.get("params", {})
        if page is None:
            return
        if method == "Network.requestWillBeSent":
            page.requests.append(values["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            page.errors.append(json.dumps(values["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "assert", "warning"):
            page.errors.append(json.dumps(values["args"])[:500])
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            page.errors.append(values["entry"]["text"])
        elif method == "Page.loadEventFired":
            self._loaded.add(page.session)
