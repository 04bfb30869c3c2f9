"""A real server on a thread of the test process, and clients of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai

from spectune.serving.bounds import Bounds
from spectune.serving.catalogue import Catalogue
from spectune.serving.loaded import Loaded
from spectune.serving.server import Serving, address_of, listen, serve


@dataclass
class Running:
    """A server that runs. `ended`: what it ended with, an exit code or an error."""

    url: str
    stop: Callable[[], None]
    thread: threading.Thread
    ended: list[Any]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options: Any) -> openai.OpenAI:
        """The official one, which tries nothing twice."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)

    def connection(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> tuple[int, Any]:
        """Status and content; what is no JSON as text."""
        with contextlib.closing(self.connection()) as connection:
            data = json.dumps(body) if isinstance(body, dict | list) else body
            kind = {} if body is None else {"content-type": "application/json"}
            connection.request(method or ("GET" if body is None else "POST"), path, data, {**kind, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode()
        return answer.status, json.loads(text) if "json" in answer.headers["content-type"] else text

    def metric(self, name: str) -> float:
        """A counter, over all its labels, or a gauge."""
        lines = [line for line in self.ask("/metrics")[1].splitlines() if line.startswith(f"spectune_{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def wait_until_ready(self, seconds: float = 60) -> None:
        wait_for(lambda: self.ask("/health")[0] == 200, seconds)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@contextlib.contextmanager
def running(
    load: Callable[[], Loaded], catalogue: Catalogue, *, bounds: Bounds | None = None, api_key: str | None = None,
    host: str = "127.0.0.1", unfinished: Callable[[int], None] = lambda code: None,
) -> Iterator[Running]:  # fmt: skip
    """A server at a free port, until the end of the block."""
    listening = listen(host, 0)
    url, stops, ended = address_of(listening), list[Callable[[], None]](), list[Any]()
    serving = Serving(load, catalogue, host, api_key, bounds or Bounds(), started=stops.append, unfinished=unfinished)

    def run() -> None:
        try:
            ended.append(serve(serving, listening))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, name="served")
    thread.start()
    wait_for(lambda: bool(stops))
    try:
        yield Running(url, stops[0], thread, ended)
    finally:
        stops[0]()
        thread.join(60)
        assert not thread.is_alive()
