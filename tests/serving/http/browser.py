"""Headless Chromium by its DevTools protocol: one page, driven by scripts, keys and screenshots."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.serving.http.conftest import PATIENCE, patient

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    def __init__(self, socket: Any):
        self._socket, self._number = socket, 0
        self.problems: list[str] = []

    def call(self, method: str, **params: Any) -> dict:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(message["params"])[:500])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def value(self, script: str) -> Any:
        """What a script gives."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def until(self, script: str, seconds: float = PATIENCE) -> Any:
        """Wait until a script gives what is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < deadline, (script, self.problems)
            time.sleep(0.05)
        return found

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A page of a new browser, whose profile is in `folder`."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-extensions",
               "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
    with subprocess.Popen([CHROMIUM, *options], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            told, deadline = folder / "DevToolsActivePort", time.monotonic() + PATIENCE
            while not (told.exists() and told.read_text().count("\n")):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            port, path = told.read_text().split()
            with patient.socket(f"ws://127.0.0.1:{port}{path}") as browser:
                targets = Page(browser).call("Target.getTargets")["targetInfos"]
                target = next(each["targetId"] for each in targets if each["type"] == "page")
                with patient.socket(f"ws://127.0.0.1:{port}/devtools/page/{target}") as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        page.call(f"{domain}.enable")
                    yield page
        finally:
            process.terminate()
