"""A headless chromium for tests, spoken to over its debugging pipe: no driver, no package, no port.

Chromium reads commands of its DevTools protocol from file descriptor 3 and answers on 4, each a JSON text that ends in
a null byte.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
TIMEOUT_S = 60.0


def find_chromium() -> str | None:
    """Path of an installed chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _high(descriptor: int) -> int:
    """The descriptor under a number above 9, clear of 3 and 4, which the shell moves it to."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved


class Browser:
    """One chromium with one page.

    Args:
        program: path of chromium.
        profile: an empty folder for its profile.

    Attributes:
        events: what the page reported since ``open``: exceptions, console and policy messages, requests, dialogs.
    """

    WATCHED = frozenset(
        {
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Network.requestWillBeSent",
            "Page.javascriptDialogOpening",
        }
    )

    def __init__(self, program: str, profile: Path) -> None:
        read_commands, self._commands = (_high(end) for end in os.pipe())
        self._answers, write_answers = (_high(end) for end in os.pipe())
        self._process = subprocess.Popen(
            # The shell puts the pipes where chromium looks for them.
            ["bash", "-c", f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}', program, *FLAGS]
            + [f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._number, self._received = 0, b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End chromium."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its result.

        Raises:
            RuntimeError: chromium refused it, ended, or did not answer in time.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._commands, rest) :]
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            while b"\0" in self._received:
                text, _, self._received = self._received.partition(b"\0")
                answer = json.loads(text)
                if answer.get("method") in self.WATCHED:
                    self.events.append(answer)
                if answer.get("id") == self._number:
                    if "error" in answer:
                        raise RuntimeError(f"{method}: {answer['error']}")
                    return answer["result"]
            if not select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RuntimeError(f"{method}: no answer in {TIMEOUT_S:.0f} s")
            chunk = os.read(self._answers, 1 << 20)
            if not chunk:
                raise RuntimeError(f"{method}: chromium has ended")
            self._received += chunk

    def open(self, path: Path) -> None:
        """Open a file and wait until it has drawn itself."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("location.protocol === 'file:' && document.documentElement?.dataset.ready === 'yes'")

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression in the page.

        Raises:
            RuntimeError: the script threw.
        """
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript condition holds."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.run(condition):
            if time.monotonic() > deadline:
                raise RuntimeError(f"never: {condition}; events {self.events}")
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click with the mouse on the middle of the first element that matches."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, selector: str) -> None:
        """Move the mouse to the middle of the first element that matches."""
        x, y = self.middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def middle(self, selector: str) -> tuple[float, float]:
        """Viewport coordinates of an element's middle, after it was scrolled there."""
        found = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return found[0], found[1]

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press and release one key; ``code`` is its Windows key code."""
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def look(self, width: int = 1200, height: int = 900, dark: bool = False, scale: float = 1.0) -> None:
        """Size of the window in CSS pixels, and light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 500,
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
