"""A real browser without a window, Debian's chromium, that tests talk to by the DevTools protocol over two pipes.

Source of the protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import io
import itertools
import json
import os
import select
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_LONGEST = 100  # seconds
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--use-gl=angle",  # WebGL by the CPU
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Browser:
    """One page. `requests` are the addresses that it asked for, `errors` what it complained of since `open`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._numbers = commands, answers, itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol."""
        number = next(self._numbers)
        request = {"id": number, "method": method, "params": params}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._commands, json.dumps(request).encode() + b"\0")
        while (message := self._read()).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    def open(self, path: Path, *, width: int = 1000, height: int = 800, scheme: str = "light") -> None:
        """Load a file, and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.requests.clear()
        self.errors.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of an expression, or of its promise."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def pixels(self, name: str) -> NDArray[np.float32]:
        """(H, W, 3) colours of an element as drawn, after the next two frames."""
        from matplotlib.image import imread

        self.run("new Promise((f) => requestAnimationFrame(() => requestAnimationFrame(f)))")
        self.run(f"document.getElementById('{name}').scrollIntoView({{block: 'center'}})")
        box = self.run(
            f"(({{x, y, width, height}}) => ({{x: x + scrollX, y: y + scrollY, width, height, scale: 1}}))"
            f"(document.getElementById('{name}').getBoundingClientRect())"
        )
        found = self.call("Page.captureScreenshot", format="png", clip=box, captureBeyondViewport=True)
        return imread(io.BytesIO(base64.b64decode(found["data"])))[..., :3]

    def drag(self, name: str, right: int, down: int) -> None:
        """Drag the mouse from the middle of an element."""
        x, y = self.run(
            f"document.getElementById('{name}').scrollIntoView({{block: 'center'}}), "
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.getElementById('{name}').getBoundingClientRect())"
        )
        for kind, place in (
            ("mousePressed", (x, y)),
            ("mouseMoved", (x + right, y + down)),
            ("mouseReleased", (x + right, y + down)),
        ):
            where = {"x": place[0], "y": place[1], "button": "left", "buttons": 1, "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def key(self, name: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._answers], [], [], _LONGEST)[0] or not (more := os.read(self._answers, 1 << 20)):
                raise TimeoutError(f"chromium has not answered for {_LONGEST} s, or has ended")
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        match message.get("method"), message.get("params"):
            case "Network.requestWillBeSent", params:
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown", params:
                self.errors.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled", params if params["type"] in ("error", "assert"):
                self.errors.append(str(params["args"]))
            case "Log.entryAdded", params if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start chromium with a new profile, and end it."""
    assert CHROMIUM is not None
    pipes = [os.pipe(), os.pipe()]
    theirs_in, ours_out, ours_in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for p in pipes for end in p)
    for end in itertools.chain(*pipes):
        os.close(end)
    quiet = os.open(os.devnull, os.O_WRONLY)
    process = os.posix_spawn(
        CHROMIUM,
        [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        {**os.environ, "HOME": str(profile)},
        file_actions=[  # the protocol's pipes are those numbers
            (os.POSIX_SPAWN_DUP2, theirs_in, 3),
            (os.POSIX_SPAWN_DUP2, theirs_out, 4),
            (os.POSIX_SPAWN_DUP2, quiet, 2),
        ],
        setsid=True,
    )
    for end in (theirs_in, theirs_out, quiet):
        os.close(end)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        os.close(ours_out)
        os.close(ours_in)
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
