"""A server that is stopped, killed and begun again, and whose clients go: what is being answered is answered whole, and
nobody gets another's words."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import threading
import time
from typing import Any

from tests.faults.child import Case, Child
from tests.faults.kinds import Kind, Place, Verdict
from tests.faults.material import material

WAYS = ("SIGTERM", "SIGINT", "killed", "clients gone")
REQUESTS, TOKENS = 6, 24
#: seconds until it listens and the base is loaded, on a busy machine
READY = 30.0


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _begun(place: Place, port: int) -> Child:
    words = ("serve", "--model", str(material(place) / "base"), "--device", "cpu", "--port", str(port))
    child = place.forks.start(Case(words, cwd=place.folder, limit_s=90, room=None))
    until = time.monotonic() + READY
    while time.monotonic() < until:
        try:
            if _asked(port, "GET", "/health", timeout=5.0)[0] == 200:
                return child
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.05)
    child.signal(signal.SIGKILL)
    raise AssertionError(f"the server did not begin: {child.wait()}")


def _asked(port: int, verb: str, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(verb, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def _body(number: int) -> dict[str, Any]:
    return {"model": "base", "prompt": f"number {number}", "max_tokens": TOKENS, "temperature": 0}


def _text(port: int, number: int) -> str:
    status, answer = _asked(port, "POST", "/v1/completions", _body(number))
    return str(answer["choices"][0]["text"]) if status == 200 else f"HTTP {status}: {answer}"


def _leave(port: int, rng: random.Random) -> None:
    """A client that asks, or half asks, and goes."""
    content = json.dumps({**_body(99), "stream": True, "max_tokens": 100}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    whole = head + f"Content-Length: {len(content)}\r\n\r\n".encode() + content
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(whole[: rng.randrange(1, len(whole) + 1)])
        time.sleep(rng.random() * 0.1)


def _served(place: Place, seed: int, index: int) -> Verdict:
    rng, way, port = SERVED.random(seed, index), WAYS[index % len(WAYS)], _free_port()
    child = _begun(place, port)
    expected = {number: _text(port, number) for number in range(REQUESTS)}
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        try:
            found[number] = _text(port, number)
        except (OSError, http.client.HTTPException) as error:
            found[number] = f"lost: {error!r}"

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(REQUESTS)]
    for thread in threads:
        thread.start()
    if way == "clients gone":
        for _ in range(8):
            _leave(port, rng)
    else:
        time.sleep(rng.random() * 0.1)
        child.signal(signal.SIGKILL if way == "killed" else signal.Signals[way])
    for thread in threads:
        thread.join()
    if way == "clients gone":
        child.signal(signal.SIGTERM)
    outcome = child.wait()
    wanted = {"SIGTERM": 0, "SIGINT": 130, "killed": -signal.SIGKILL, "clients gone": 0}[way]
    problems = [] if outcome.rc == wanted and not outcome.traceback else [f"expected exit {wanted}: {outcome}"]
    problems += [f"before: {text}" for text in expected.values() if text.startswith("HTTP")]
    lost = [text for text in found.values() if text.startswith(("lost: ", "HTTP 503"))]
    problems += [
        f"request {number} got {text!r}, expected {expected[number]!r}"
        for number, text in found.items()
        if text != expected[number] and (text not in lost or way == "clients gone")
    ]
    if way == "killed":  # the port is free, and answers are the same
        again = _begun(place, port)
        problems += [] if _text(port, 0) == expected[0] else ["another answer after it began again"]
        again.signal(signal.SIGTERM)
        problems += [] if (ended := again.wait()).rc == 0 else [f"the second one: {ended}"]
    return Verdict(f"serve, {way}", problems, {"not taken": len(lost)})


SERVED = Kind(
    "served",
    "`serve` stopped or killed while it answers, or with clients that go in the middle of a request: what was taken is "
    "answered as ever, or not at all; exit 0 or 130; begun again on the same port it answers the same",
    40, _served, quick=4, fast=0,
)  # fmt: skip

KINDS = (SERVED,)
