"""A headless Chromium that shows a page: a few words of its DevTools protocol, over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The browser; None if there is none here."""


class Tab:
    """A page in the browser.

    Args:
        send, receive: ends of the pipes to the browser and from it.
    """

    def __init__(self, send: Any, receive: Any):
        self._send, self._receive, self._number, self._session = send, receive, 0, {}
        self.errors: list[str] = []
        """What went wrong in scripts, and what a page's policy has kept from it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, fragment: str = "") -> None:
        """Load a file and wait for it."""
        self.call("Page.navigate", url=f"{page.as_uri()}#{fragment}")
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, " ": 32}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key])

    def looks(self, width: int, height: int, scheme: str = "light", mobile: bool = False) -> None:
        """Set the size of the window and the reader's colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def shoot(self, file: Path) -> None:
        """Write a picture of what the window shows."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _next(self) -> dict[str, Any]:
        """The next message; of one that tells of an error, it is kept."""
        parts = []
        while (byte := self._receive.read(1)) != b"\0":
            assert byte, "the browser has ended"
            parts.append(byte)
        message = json.loads(b"".join(parts))
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.errors.append(json.dumps(message["params"]))
        return message


@contextmanager
def tab() -> Iterator[Tab]:
    """A tab of a browser of its own, which ends with it."""
    assert PROGRAM is not None
    here, there = os.pipe(), os.pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # it may still be written to
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        words = [PROGRAM, *flags, "--remote-debugging-pipe", "about:blank"]
        # The browser reads what is its file 3 and writes to its file 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{here[0]} 4>&{there[1]}', "bash", *words]
        with subprocess.Popen(shell, pass_fds=(here[0], there[1]), stderr=subprocess.DEVNULL) as browser:
            os.close(here[0])
            os.close(there[1])
            with os.fdopen(here[1], "wb") as send, os.fdopen(there[0], "rb") as receive:
                try:
                    made = Tab(send, receive)
                    yield made
                finally:
                    browser.terminate()
                    browser.wait()


def main() -> None:
    """Take a picture of a page: PAGE PICTURE WIDTH HEIGHT SCHEME FRAGMENT, the scheme light or dark."""
    page, picture, width, height, scheme, fragment = sys.argv[1:]
    with tab() as browser:
        browser.looks(int(width), int(height), scheme, mobile=int(width) < 500)
        browser.open(Path(page).resolve(), fragment)
        browser.shoot(Path(picture))


if __name__ == "__main__":
    main()
