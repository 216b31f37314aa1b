"""A headless Chromium, driven through chromedriver's WebDriver interface with nothing but the standard library."""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,900",
)
KEYS = {"up": "\ue013", "down": "\ue015", "left": "\ue012", "right": "\ue014", "home": "\ue011", "end": "\ue010"}
KEYS |= {"enter": "\ue007", "escape": "\ue00c"}


def missing() -> str | None:
    """Why there is no browser to test in, or None."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} on the PATH (Debian: chromium chromium-driver)" if absent else None


class Browser:
    """One session. Paths are those of the WebDriver specification, below the session's."""

    def __init__(self, base: str, profile: str):
        self._base = base
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        chrome = {"args": [*OPTIONS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": logs}
        self._path = ""
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._path = f"/session/{session['sessionId']}"

    def open(self, file: Path) -> None:
        """Opens a local page; what it logs and loads from now on is in `console` and `requests`."""
        self._call("POST", "/url", {"url": file.as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        """The value that a function body returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def press(self, *keys: str) -> None:
        """Presses keys one after another, by a name of KEYS or as a character."""
        typed = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": key} for key in typed for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def click(self, x: int, y: int) -> None:
        """At a place of the page, in CSS pixels."""
        move = {"type": "pointerMove", "duration": 0, "x": x, "y": y}
        actions = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def console(self) -> list[str]:
        """Warnings and errors since the last call: of scripts, of the content policy, of the network."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """URLs that were asked for since the last call."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def emulate(self, **features: str) -> None:
        """Media features, such as prefers_color_scheme="dark"."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        params = {"features": listed}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": params})

    def resize(self, width: int, height: int) -> None:
        self._call("POST", "/window/rect", {"width": width, "height": height})

    def screenshot(self) -> bytes:
        """As PNG."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def close(self) -> None:
        self._call("DELETE", "")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._base + self._path + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=240) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            told = json.load(error)["value"]
            raise RuntimeError(f"{method} {path}: {told['error']}: {told['message'].splitlines()[0]}") from None


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A fresh browser with an empty profile; it and its driver end with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        environment = os.environ | {"HOME": profile}
        driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        try:
            assert driver.stdout is not None
            said = ""
            while (port := re.search(r"successfully on port (\d+)", said)) is None:
                line = driver.stdout.readline()
                assert line, f"chromedriver did not start: {said}"
                said += line
            started = Browser(f"http://127.0.0.1:{port[1]}", profile)
            try:
                yield started
            finally:
                started.close()
        finally:
            driver.terminate()
            driver.wait(10)
