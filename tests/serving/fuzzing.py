"""Requests of every bad kind, made by a seed, with good ones among them whose answers are known."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.serving.server import Running

#: what an answer that is no answer may be; 100 is "go on"
REFUSALS = {400, 403, 404, 405, 408, 413, 415, 429, 504}
PATHS = ("/v1/completions", "/v1/chat/completions")
PROMPTS = ("the quick brown fox", "who knows", "yes no maybe", "12 or 10", "the lazy dog", "東京", "a")


@dataclass
class Fuzzer:
    """Plays cases against a server.

    Attributes:
        models: names of served models.
        known: by model and prompt, the text that eight greedy tokens are, asked for alone.
        wrong: what went wrong, by case.
    """

    server: Running
    models: list[str]
    seed: int
    known: dict[tuple[str, str], str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def play(self, count: int, threads: int = 8) -> None:
        for model in self.models:
            for prompt in PROMPTS:
                status, found = self.server.ask(PATHS[0], good(model, prompt))
                assert status == 200, found
                self.known[model, prompt] = found["choices"][0]["text"]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self.one, range(count)))

    def one(self, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        kind = draw.choice(KINDS)
        try:
            kind(self, draw)
        except (AssertionError, ValueError, KeyError, TimeoutError, IndexError) as error:
            self.wrong.append(f"seed {self.seed}, case {number} ({kind.__name__}): {type(error).__name__}: {error}")

    def pick(self, draw: random.Random) -> tuple[str, str]:
        return draw.choice(self.models), draw.choice(PROMPTS)

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as found:
            yield found

    def sent(self, data: bytes) -> bytes:
        """What comes back, until the server closes."""
        with self.connected() as connection:
            with contextlib.suppress(ConnectionError):  # it has been refused before all of it was sent
                connection.sendall(data)
            return everything(connection)

    def refused_or_answered(self, data: bytes) -> None:
        """What comes back is whole: an answer, or an error as OpenAI has it; or nothing at all."""
        answer = self.sent(data)
        if not answer:
            return
        head, _, content = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
        status = int(head.split()[1])
        assert status == 200 or status in REFUSALS, answer[:300]
        if status != 200 and b"application/json" in head:
            assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}, answer[:300]


def good(model: str, prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0} | more


def request(body: bytes, path: str = PATHS[0], method: str = "POST", headers: str = "", length: str = "") -> bytes:
    lines = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{lines}content-length: {length or len(body)}\r\n{headers}\r\n".encode("utf-8", "surrogateescape") + body


def everything(connection: socket.socket) -> bytes:
    found = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return bytes(found)


def well_asked(fuzzer: Fuzzer, draw: random.Random) -> None:
    model, prompt = fuzzer.pick(draw)
    answer = fuzzer.sent(request(json.dumps(good(model, prompt)).encode()))
    found = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert found["choices"][0]["text"] == fuzzer.known[model, prompt], (model, prompt, found)


def well_asked_stream(fuzzer: Fuzzer, draw: random.Random) -> None:
    model, prompt = fuzzer.pick(draw)
    with fuzzer.connected() as connection:
        connection.sendall(request(json.dumps(good(model, prompt, stream=True, n=2)).encode()))
        if draw.random() < 0.3:  # a slow reader
            time.sleep(0.05)
            connection.recv(7)
            time.sleep(0.05)
            assert b"[DONE]" in everything(connection)
            return
        answer = everything(connection).decode()
    texts = ["", ""]
    for line in answer.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
    assert texts == [fuzzer.known[model, prompt]] * 2, (model, prompt, texts)


def a_parameter_is_anything(fuzzer: Fuzzer, draw: random.Random) -> None:
    model, prompt = fuzzer.pick(draw)
    chat = draw.random() < 0.5
    body: dict[str, Any] = good(model, prompt)
    if chat:
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": prompt}]
    keys = (
        *body, "n", "stop", "logprobs", "top_logprobs", "seed", "top_p", "top_k", "stream", "stream_options", "user",
        "max_completion_tokens", "echo", "logit_bias", "tools", "response_format", "best_of", "x" * 50,
    )  # fmt: skip
    for _ in range(draw.randint(1, 3)):
        body[draw.choice(keys)] = anything(draw)
    if chat and draw.random() < 0.5:
        body["messages"] = [{draw.choice(("role", "content", "name", "tool_calls")): anything(draw)} for _ in range(3)]
    fuzzer.refused_or_answered(request(json.dumps(body).encode(), PATHS[chat]))


def any_json(fuzzer: Fuzzer, draw: random.Random) -> None:
    fuzzer.refused_or_answered(request(json.dumps(anything(draw)).encode(), draw.choice(PATHS)))


def broken_json(fuzzer: Fuzzer, draw: random.Random) -> None:
    body = bytearray(json.dumps(good(*fuzzer.pick(draw))).encode())
    for _ in range(draw.randint(1, 4)):
        body[draw.randrange(len(body))] = draw.randrange(256)
    nests = draw.choice(
        (b"[" * 5000, b'{"a":' * 5000, b"", b"null", b"NaN", b'"\\ud800"', bytes(body[: draw.randrange(len(body))]))
    )
    fuzzer.refused_or_answered(request(draw.choice((bytes(body), nests)), draw.choice(PATHS)))


def no_http(fuzzer: Fuzzer, draw: random.Random) -> None:
    data = draw.randbytes(draw.randint(1, 400))
    fuzzer.refused_or_answered(draw.choice((data, b"GET " + data, b"\x16\x03\x01" + data)) + b"\r\n\r\n")


def strange_headers(fuzzer: Fuzzer, draw: random.Random) -> None:
    body = json.dumps(good(*fuzzer.pick(draw))).encode()
    odd = draw.choice((
        request(body, headers="x: " + "y" * 70_000 + "\r\n"), request(body, headers="content-length: 3\r\n"),
        request(body, headers="transfer-encoding: chunked\r\n"), request(body, length="-5"),
        request(body, length="9" * 30), request(body, method=draw.choice(("GET", "PUT", "OPTIONS", "BREW"))),
        request(body, path="/" + "%2e%2e/" * draw.randint(1, 2000)), request(body, headers="host: evil.example\r\n"),
        request(body, headers="expect: 100-continue\r\n"), request(b"", method="GET", path="/v1/models/" + "a" * 5000),
        request(body, headers="upgrade: websocket\r\nsec-websocket-key: x\r\n"), request(body).replace(b"json", b"jso"),
        request(body, headers="content-encoding: gzip\r\n"), request(body, path=draw.choice(("/", "/v1", "//health"))),
    ))  # fmt: skip
    fuzzer.refused_or_answered(odd)


def too_long(fuzzer: Fuzzer, draw: random.Random) -> None:
    model, prompt = fuzzer.pick(draw)
    body = json.dumps(good(model, prompt * draw.choice((30, 3000, 30_000)))).encode()
    if draw.random() < 0.5:
        fuzzer.refused_or_answered(request(body))
        return
    head = request(b"", length="0").replace(b"content-length: 0", b"transfer-encoding: chunked")
    fuzzer.refused_or_answered(head + b"".join(b"%x\r\n%b\r\n" % (len(body), body) for _ in range(2)) + b"0\r\n\r\n")


def leaves_at_once(fuzzer: Fuzzer, draw: random.Random) -> None:
    """A client that is killed: before its request is whole, while it waits, or in the middle of its answer."""
    body = request(json.dumps(good(*fuzzer.pick(draw), stream=draw.random() < 0.7, n=3, max_tokens=24)).encode())
    with fuzzer.connected() as connection:
        connection.sendall(body[: draw.choice((draw.randrange(len(body)), len(body), len(body)))])
        connection.settimeout(0.05)
        with contextlib.suppress(TimeoutError, ConnectionError):
            connection.recv(draw.randint(1, 300))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def anything(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    plain: tuple[Any, ...] = (
        None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 1e308, 0.1, -0.0, "", "a", "\ud800", "\0", "x" * 3000,
        "東京🦊", "tiny", "user", [], {}, [[]], [1, 2, 3], [""], ["a", 1], {"type": "text"}, [-1], [10**9],
    )  # fmt: skip
    choice = draw.random()
    if depth > 3 or choice < 0.7:
        return draw.choice(plain)
    if choice < 0.85:
        return [anything(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    keys = ("role", "content", "text", "type", "model", "prompt", "x")
    return {draw.choice(keys): anything(draw, depth + 1) for _ in range(draw.randint(0, 4))}


KINDS: tuple[Callable[[Fuzzer, random.Random], None], ...] = (
    well_asked, well_asked, well_asked_stream, well_asked_stream, a_parameter_is_anything, a_parameter_is_anything,
    a_parameter_is_anything, any_json, broken_json, no_http, strange_headers, too_long, leaves_at_once, leaves_at_once,
)  # fmt: skip
