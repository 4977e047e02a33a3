"""Drive a headless Chromium over its debugging pipe; standard library only."""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import time

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Browser:
    """One page; ``events`` holds what the browser told since the start, ``(method, params)``."""

    def __init__(self, profile, timeout=60.0):
        self.deadline = time.monotonic() + timeout
        (theirs, self._to), (self._from, ours) = os.pipe(), os.pipe()
        quiet = os.open(os.devnull, os.O_WRONLY)
        moves = [(theirs, 3), (ours, 4), (quiet, 1), (quiet, 2)]
        # first out of the way of 3 and 4 themselves
        high = [os.dup(fd) for fd, _ in moves]
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, (_, to) in zip(high, moves, strict=True)]
        argv = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self.pid = os.posix_spawn(
            CHROMIUM, argv, dict(os.environ), file_actions=actions, setpgroup=0
        )
        for fd in (*high, theirs, ours, quiet):
            os.close(fd)
        self.events, self._buffer, self._number, self._session = [], b"", 0, None
        pages = self("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in pages if t["type"] == "page")
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            left = self.deadline - time.monotonic()
            ready, _, _ = select.select([self._from], [], [], max(0.0, left))
            part = os.read(self._from, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, path):
        seen = len(self.events)
        self("Page.navigate", url=path.as_uri())
        while not any(name == "Page.loadEventFired" for name, _ in self.events[seen:]):
            self._read()

    def size(self, width, height):
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **screen)

    def media(self, **features):
        pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self("Emulation.setEmulatedMedia", features=pairs)

    def value(self, expression):
        result = self(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path):
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def requests(self):
        return [
            p["request"]["url"] for name, p in self.events if name == "Network.requestWillBeSent"
        ]

    def complaints(self):
        """Console messages, log entries and exceptions."""
        wanted = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [(name, p) for name, p in self.events if name in wanted]

    def close(self):
        for fd in (self._to, self._from):
            os.close(fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def browser(profile):
    opened = Browser(profile)
    try:
        yield opened
    finally:
        opened.close()
