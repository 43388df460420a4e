"""A server in a process of its own, and requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ENVIRONMENT = {  # one thread, little memory, no network
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
START_SECONDS = 900


class EngineError(Exception):
    """A server that does not start, or an answer that is an error; with the HTTP status, if there is one."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Engine:
    """A server with the prefixes of a store, from entering the block until leaving it. vLLM's, unless `command`.

    Args:
        python: interpreter of the environment that has vLLM.
        model, store: as `ctkernels serve` takes them.
        log: file for what it prints.
        own, options: further words of the command, before and behind `--`.
        environment: further variables.
        command: words of another server's command, with {model}, {store} and {port}; its base model is `base`.
    """

    def __init__(
        self,
        python: Path,
        model: str,
        store: Path,
        log: Path,
        own: Sequence[str] = (),
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = (str(python), "-m", "ctkernels", "serve", "--engine", "vllm")
        words += ("--model", "{model}", "--store", "{store}", "--port", "{port}")
        words += (*own, "--", "--served-model-name", "base", *options)
        place = {"{model}": model, "{store}": str(store), "{port}": str(self.port)}
        self._words = [place.get(word, word) for word in command or words]
        self._environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self._log = log
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Engine:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._words, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        self.kill()
        raise EngineError(f"the server did not start; {self._log} ends: {self._log.read_text()[-2000:]}")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is None or self._process.poll() is not None:
            self.kill()
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """End all of its processes at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # of its own session
            self._process.wait()

    def get(self, path: str) -> str:
        """The text at a path."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=600) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric's values."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def complete(self, model: str, **fields: Any) -> dict[str, Any]:
        """A greedy completion, by the token. Raises EngineError: an answer that is an error."""
        body = {"model": model, "temperature": 0, "repetition_penalty": 1.0, "return_token_ids": True, **fields}
        try:
            with self._post(body) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            raise EngineError(error.read().decode(errors="replace"), error.code) from None

    def stream(self, model: str, **fields: Any) -> Iterator[float]:
        """The moments (`time.perf_counter`) at which the tokens of a greedy completion arrive."""
        body = {"model": model, "temperature": 0, "repetition_penalty": 1.0, "stream": True, **fields}
        with self._post(body) as answer:
            for line in answer:
                if line.startswith(b'data: {"error"'):
                    raise EngineError(line.decode())
                if line.startswith(b"data: {"):
                    yield time.perf_counter()

    def _post(self, body: Mapping[str, Any]) -> Any:
        data, header = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", data, header)
        return urllib.request.urlopen(request, timeout=1800)
