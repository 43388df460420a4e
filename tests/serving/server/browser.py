"""A headless Chromium over its DevTools protocol, on a pair of pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "headless no-sandbox disable-gpu disable-dev-shm-usage no-first-run disable-background-networking "
    "disable-component-update disable-extensions disable-sync remote-debugging-pipe"
)


class Page:
    """One page. errors: exceptions and messages of its console; requests: addresses that it asked for."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._number = read, write, b"", 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, address: str, headers: dict[str, str] | None = None) -> None:
        """Go there, and wait until it is loaded."""
        self.call("Network.setExtraHTTPHeaders", headers=headers or {})
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"still not true: {script}; {self.errors}"
            time.sleep(0.05)

    def text(self, identifier: str) -> str:
        """Of an element."""
        return self.run(f"document.getElementById({json.dumps(identifier)}).textContent")

    def fill(self, **values: str) -> None:
        """Put values into fields."""
        for identifier, value in values.items():
            self.run(f"document.getElementById({json.dumps(identifier)}).value = {json.dumps(value)}")

    def click(self, identifier: str) -> None:
        """Click on a button."""
        self.run(f"document.getElementById({json.dumps(identifier)}).click()")

    def screenshot(self, path: Path) -> None:
        """A picture of the whole page."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], seconds)[0], "the browser does not answer"
            found = os.read(self._read, 1 << 16)
            assert found, "the browser has ended"
            self._rest += found
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a browser that keeps its files in `folder`."""
    assert CHROMIUM is not None
    commands, answers = os.pipe(), os.pipe()  # the browser reads its descriptor 3 and writes to its 4

    def hand_over() -> None:
        reads, writes = os.dup(commands[0]), os.dup(answers[1])  # neither is 3 or 4
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    process = subprocess.Popen(
        [CHROMIUM, *(f"--{flag}" for flag in FLAGS.split()), f"--user-data-dir={folder}"],
        preexec_fn=hand_over,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Page(answers[0], commands[1])
    finally:
        os.close(commands[1])  # then it ends
        os.close(answers[0])
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
