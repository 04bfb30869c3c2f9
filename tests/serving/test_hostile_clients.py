"""Whatever clients do, the server goes on, and nobody's answer is touched by it."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest

from spectune.serving.bounds import Bounds
from tests.serving.conftest import METHODS, Material
from tests.serving.fuzzing import Fuzzer, everything, good, request
from tests.serving.server import Running, running, wait_for

#: small enough that their other side is met often
BOUNDS = Bounds(max_queue=64, max_new_tokens=24, max_choices=16, max_body_bytes=20_000, receive_seconds=0.5)


@pytest.fixture(scope="module")
def guarded(material: Material) -> Iterator[Running]:
    with running(material.load(), material.catalogue(), bounds=BOUNDS) as server:
        server.wait_until_ready()
        yield server


def play(server: Running, models: list[str], seed: int, count: int) -> None:
    fuzzer = Fuzzer(server, models, seed)
    fuzzer.play(count)
    assert not fuzzer.wrong, "\n".join(fuzzer.wrong[:20])
    wait_for(lambda: server.metric("waiting_choices") == 0 == server.metric("running_rows"))
    assert server.ask("/health") == (200, {"status": "ok"})
    fuzzer.play(0)  # each answer is what it was


def test_a_few_of_ten_thousand_bad_requests(guarded: Running) -> None:
    play(guarded, ["tiny", "lora", "prefix"], int(time.time()) // 86_400, 200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_bad_requests(guarded: Running) -> None:
    play(guarded, ["tiny", *METHODS], 0, 10_000)


def test_the_row_of_a_client_that_is_gone_is_free_again(guarded: Running) -> None:
    before = guarded.metric("abandoned_total")
    for stream in (True, False):
        body = json.dumps(good("tiny", "the quick brown fox", max_tokens=24, n=16, stream=stream)).encode()
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
                connection.sendall(request(body))
                wait_for(lambda: guarded.metric("running_rows") > 0)
    wait_for(lambda: guarded.metric("waiting_choices") == 0 == guarded.metric("running_rows"))
    assert guarded.metric("abandoned_total") > before


def test_a_client_that_does_not_read_holds_up_nobody(guarded: Running) -> None:
    body = json.dumps(good("tiny", "a", max_tokens=24, n=16, stream=True, logprobs=20)).encode()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with contextlib.closing(slow):
        slow.connect(("127.0.0.1", guarded.port))
        slow.sendall(request(body))
        wait_for(lambda: guarded.metric("running_rows") > 0)
        assert guarded.ask("/v1/completions", good("lora", "who knows"))[0] == 200
        wait_for(lambda: guarded.metric("waiting_choices") == 0 == guarded.metric("running_rows"))


def test_who_does_not_send_a_whole_request_is_left(guarded: Running) -> None:
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", guarded.port)
        connections = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(3)]
        for connection, sent in zip(
            connections, (b"", b"POST /v1/completions HT", request(b"{", length="100")), strict=True
        ):
            connection.sendall(sent)
        answers = [everything(connection) for connection in connections]
    assert answers[:2] == [b"", b""]
    assert b" 408 " in answers[2].splitlines()[0]


def test_a_body_that_is_too_long_is_refused_before_it_is_read(guarded: Running) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=20) as connection:
        connection.sendall(request(b"{", length=str(10**9)))
        assert b" 413 " in connection.recv(4096).splitlines()[0]


def test_more_than_the_queue_holds_is_refused_and_told_when_to_come_again(guarded: Running) -> None:
    body = json.dumps(good("tiny", "a", max_tokens=24, n=16, stream=True)).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", guarded.port)))
            connection.sendall(request(body))
        wait_for(lambda: guarded.metric("refused_total") > 0 or refused(guarded))
    wait_for(lambda: guarded.metric("waiting_choices") == 0 == guarded.metric("running_rows"))


def refused(server: Running) -> bool:
    with contextlib.closing(server.connection()) as connection:
        body = json.dumps(good("tiny", "a", n=16))
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        said = json.loads(answer.read())
    return answer.status == 429 and answer.headers["retry-after"] == "1" and said["error"]["code"] == "queue_full"


def test_no_more_connections_are_kept_than_there_may_be(material: Material) -> None:
    with (
        running(material.load(), material.catalogue(), bounds=Bounds(max_connections=3)) as server,
        contextlib.ExitStack() as stack,
    ):
        server.wait_until_ready()
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(5)]
        held[4].settimeout(20)
        assert everything(held[4]) == b""
        for connection in held:
            connection.close()
        wait_for(lambda: _answers(server))


def _answers(server: Running) -> bool:
    with contextlib.suppress(ConnectionError, OSError):
        return server.ask("/health")[0] == 200
    return False
