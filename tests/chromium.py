"""A real browser for tests, without a driver: Chromium, spoken to over its debugging pipe.

Found as `CHROMIUM` in the environment, or on the path.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowDown": (40, ""), "ArrowRight": (39, ""), "End": (35, "")}


def find_chromium():
    """Path of a Chromium, `None` without one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page of a headless Chromium."""

    def __init__(self, sent, received):
        self._sent, self._received, self._number = sent, received, 0
        self._session = None
        self.requests = []
        self.errors = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Call a method of the DevTools protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._sent.write(json.dumps(message).encode() + b"\0")
        self._sent.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        parts = []
        while True:
            byte = self._received.peek(1)
            assert byte, "the browser has ended"
            end = byte.find(b"\0")
            parts.append(self._received.read(len(byte) if end < 0 else end + 1))
            if end >= 0:
                break
        message = json.loads(b"".join(parts)[:-1])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"])
        return message

    def show(self, width=1280, height=900, dark=False, phone=False):
        """Set the size of the window and the color scheme."""
        scale = 2 if phone else 1
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def open(self, path):
        """Open a file and wait until it is loaded."""
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        self.run("new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def run(self, expression):
        """Value of an expression of JavaScript, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression, seconds=20):
        """Wait until an expression is true."""
        self.run(
            f"new Promise((done, fail) => {{ const end = performance.now() + {1000 * seconds}; const look = () => "
            f"({expression}) ? done() : performance.now() > end ? fail(new Error({json.dumps(expression)})) : "
            f"setTimeout(look, 20); look(); }})"
        )

    def press(self, key):
        """Press and release a key."""
        code, text = KEYS.get(key, (0, ""))
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in event.items() if k != "text"})

    def screenshot(self, path, whole=False):
        """Save what is in view, or the whole page."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(taken["data"]))


@contextlib.contextmanager
def chromium(program=None):
    """A page of a new browser, which ends with the block."""
    program = program or find_chromium()
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-background-networking"]
        # A shell puts the ends of the pipes where Chromium expects them: it reads from 3 and writes to 4
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}', program, *options]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        browser = subprocess.Popen(shell, pass_fds=(to_browser, from_browser), start_new_session=True, **silent)
        os.close(to_browser)
        os.close(from_browser)
        try:
            with open(from_us, "wb") as sent, open(to_us, "rb") as received:
                page = Page(sent, received)
                yield page
                page._session = None
                page.call("Browser.close")
        finally:
            try:
                browser.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(browser.pid, 9)
                browser.wait()
