"""A headless Chromium, spoken to over a pipe in the DevTools protocol."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"Enter": 13, "Backspace": 8, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}


class DevToolsError(Exception):
    """The browser refused a command."""


class Page:
    """One page of the browser; `requests` has the address of everything that it asked for."""

    def __init__(self, to_browser, from_browser):
        self._out, self._in, self._held, self._number = to_browser, from_browser, b"", 0
        self.session = None
        self.requests, self.errors, self.downloads = [], [], 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Sends a command and waits for its reply; events that come before are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                if "error" in found:
                    raise DevToolsError(f"{method}: {found['error']}")
                return found["result"]
            self._note(found)

    def open(self, address):
        self._load("Page.navigate", url=address)

    def reload(self):
        self._load("Page.reload")

    def size(self, width, height, *, mobile=False, dark=False):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script):
        """The value of an expression in the page, of a promise what it comes to."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key):
        """Presses and releases a key as a keyboard does."""
        typed = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = KEYS.get(key, ord(key.upper()[0]))
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def click(self, selector):
        """Clicks with the mouse in the middle of an element."""
        x, y = self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            "one.scrollIntoView({block: 'center'}); const box = one.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def save_downloads(self, folder):
        self.call(
            "Browser.setDownloadBehavior",
            behavior="allow",
            downloadPath=str(folder),
            eventsEnabled=True,
        )

    def wait_for_download(self, number):
        while self.downloads < number:
            self._note(self._read())

    def screenshot(self, path, *, whole=True):
        """Writes a picture of the window, or of the whole page."""
        # The picture is that of the last frame drawn.
        self.run("new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))")
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def _load(self, method, **parameters):
        """Returns when another document than the present one is complete."""
        self.run("window.isOld = true")
        self.call(method, **parameters)
        done = False
        while not done:
            time.sleep(0.02)
            with contextlib.suppress(DevToolsError):  # Between two documents there is none.
                done = self.run("!window.isOld && document.readyState === 'complete'")

    def _note(self, found):
        method, parameters = found.get("method"), found.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"])
        elif method == "Browser.downloadProgress":
            self.downloads += parameters["state"] == "completed"
            assert parameters["state"] != "canceled"

    def _read(self):
        while b"\0" not in self._held:
            found = os.read(self._in, 1 << 16)
            assert found, "the browser has gone"
            self._held += found
        message, self._held = self._held.split(b"\0", 1)
        return json.loads(message)


@contextlib.contextmanager
def chromium():
    """A page of a browser with a profile of its own; the test is skipped where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser among {', '.join(NAMES)}")
    read_commands, write_commands = os.pipe()
    read_replies, write_replies = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads commands from descriptor 3 and replies to 4.
        process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{read_commands} 4>&{write_replies}',
                "bash",
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--no-first-run",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
            ],
            pass_fds=(read_commands, write_replies),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_replies)
        try:
            page = Page(write_commands, read_replies)
            yield page
            page.call("Browser.close")
            process.wait()
        finally:
            process.kill()
            process.wait()
            os.close(write_commands)
            os.close(read_replies)
